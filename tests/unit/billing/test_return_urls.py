"""Where a merchant may return to: every trick first, then the addresses that apps really use."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.billing.return_urls import check_return_url, is_host
from glamd.errors import InputError

HOSTS = {"cool.myshopify.com", "kool.myshopify.com", "app.example.com"}


@pytest.mark.parametrize(
    "url",
    [
        "",
        "cool.myshopify.com",
        "//cool.myshopify.com/back",
        "http://cool.myshopify.com/back",
        "ftp://cool.myshopify.com/",
        "javascript:alert(1)//https://cool.myshopify.com/",
        "https:cool.myshopify.com/",
        "https:///cool.myshopify.com/",
        "https:/cool.myshopify.com/",
        "https://evil.example/",
        "https://evil.example/https://cool.myshopify.com/",
        "https://cool.myshopify.com.evil.example/",
        "https://evilcool.myshopify.com/",
        "https://sub.cool.myshopify.com/",
        "https://myshopify.com/",
        "https://cool.myshopify.com./",
        "https://cool.myshopify.com@evil.example/",
        "https://user@cool.myshopify.com/",
        "https://user:password@cool.myshopify.com/",
        "https://evil.example\\@cool.myshopify.com/",
        "https://cool.myshopify.com\\.evil.example/",
        "https://evil.example#@cool.myshopify.com/",
        "https://evil.example?@cool.myshopify.com/",
        "https://cool.myshopify.com:443/",
        "https://cool.myshopify.com:8443/",
        "https://cool.myshopify.com:/",
        "https://cool.myshopify.com%00.evil.example/",
        "https://cool%2emyshopify.com/",
        "https://cool.myshopify.com\t/",
        "https://cool.myshopify.com/\r\nSet-Cookie: a=b",
        " https://cool.myshopify.com/",
        "https://cool.myshopify.com/ ",
        "https://cool.myshopify.com/a b",
        'https://cool.myshopify.com/"><script>',
        "https://\u0441ool.myshopify.com/",
        "https://xn--ool-rxc.myshopify.com/",
        "https://cool\u3002myshopify.com/",
        "https://\u212aool.myshopify.com/",
        "https://\uff43ool.myshopify.com/",
        "https://[::1]/",
        "https://127.0.0.1/",
        "https://cool.myshopify.com/" + "a" * 2048,
    ],
)
def test_nobody_is_sent_to_a_host_that_is_not_the_shops(url: str) -> None:
    with pytest.raises(InputError) as caught:
        check_return_url(url, HOSTS)
    assert [error.field for error in caught.value.fields] == ["return_url"]
    assert "evil" not in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "https://cool.myshopify.com",
        "https://cool.myshopify.com/",
        "HTTPS://Cool.MyShopify.com/admin/apps/glam",
        "https://cool.myshopify.com/admin/apps/glam?a=b&c=%20d#/billing",
        "https://app.example.com?shop=cool.myshopify.com",
        "https://app.example.com#done",
        "https://app.example.com//evil.example/",
        "https://app.example.com/@user:80/",
    ],
)
def test_a_page_of_the_shop_or_of_a_configured_host_is_taken(url: str) -> None:
    check_return_url(url, HOSTS)


@given(st.text(max_size=60))
def test_no_text_between_the_scheme_and_the_host_gets_through(text: str) -> None:
    url = f"https://{text}evil.example/"
    with pytest.raises(InputError):
        check_return_url(url, HOSTS)


def test_a_host_name_is_one_in_small_letters_with_a_dot() -> None:
    assert is_host("app.example.com")
    for text in ("", "localhost", "App.example.com", ".example.com", "a..b", "a.b.", "https://a.b"):
        assert not is_host(text)
