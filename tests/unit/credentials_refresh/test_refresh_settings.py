"""Where a client secret may be sent: nowhere that a merchant's row could choose."""

from collections.abc import Callable
from typing import Any

import pytest

from glamd.credentials.model import ShopConnection
from glamd.credentials.refresh.settings import OAuthSettings
from glamd.errors import ConfigError

Connect = Callable[[str, str], ShopConnection]

SHOP = "https://{domain}/admin/oauth/access_token"


def settings(**changes: Any) -> OAuthSettings:
    """Settings that are right but for the changes."""
    right: dict[str, Any] = {
        "platform": "shopify",
        "token_url": SHOP,
        "allowed_hosts": (".myshopify.com",),
        "client_id": "app",
        "client_secret": "our-secret",
    }
    return OAuthSettings(**{**right, **changes})


@pytest.mark.parametrize(
    "domain",
    [
        "evil.example",
        "myshopify.com",  # nobody's shop
        ".myshopify.com",
        "evilmyshopify.com",
        "shop.myshopify.com.evil.example",
        "shop.myshopify.com.",
        "shop.myshopify.com:8443",
        "shop.myshopify.com@evil.example",
        "evil.example/shop.myshopify.com",
        "evil.example#.myshopify.com",
        "evil.example?.myshopify.com",
        "evil.example\\.myshopify.com",
        "user:password@shop.myshopify.com",
        "shop .myshopify.com",
        "shop\n.myshopify.com",
        "shop.myshopify.com\n",
        "shop%2emyshopify.com",
        "shóp.myshopify.com",
        "shop.myshopify\N{FULLWIDTH FULL STOP}com",
        "-shop.myshopify.com",
        "a..myshopify.com",
        f"{'a' * 64}.myshopify.com",
        f"{'a.' * 121}myshopify.com",
        "127.0.0.1",
        "[::1]",
        "localhost",
        "169.254.169.254",
        "{domain}",
        "",
    ],
)
def test_a_merchant_cannot_name_the_host_that_gets_our_secret(
    domain: str, connection: Connect
) -> None:
    assert settings().url_for(connection(domain, domain)) is None


@pytest.mark.parametrize(
    ("domain", "shop_id", "host"),
    [
        ("cool.myshopify.com", "77", "cool.myshopify.com"),
        ("Cool.MyShopify.com", "77", "cool.myshopify.com"),
        ("shop.example", "cool.myshopify.com", "cool.myshopify.com"),
        ("a.myshopify.com", "b.myshopify.com", "a.myshopify.com"),
    ],
)
def test_the_domain_is_asked_or_else_the_shop_id_whichever_is_the_platforms(
    domain: str, shop_id: str, host: str, connection: Connect
) -> None:
    found = settings().url_for(connection(domain, shop_id))
    assert found == f"https://{host}/admin/oauth/access_token"


def test_a_host_without_a_leading_dot_stands_for_itself_alone(connection: Connect) -> None:
    one = settings(allowed_hosts=("shop.example",))
    assert one.url_for(connection("shop.example", "")) is not None
    assert one.url_for(connection("a.shop.example", "")) is None


def test_a_fixed_endpoint_is_the_same_for_every_shop(connection: Connect) -> None:
    one = settings(token_url="https://login.example:8443/token?v=2", allowed_hosts=())
    assert one.url_for(connection("evil.example", "")) == "https://login.example:8443/token?v=2"


@pytest.mark.parametrize(
    "url",
    [
        "http://login.example/token",
        "ftp://login.example/token",
        "login.example/token",
        "https://",
        "https:///token",
        "https://user@login.example/token",
        "https://user:password@login.example/token",
        "https://login.example/token#part",
        "https://login.example:0/token",
        "https://login.example:99999/token",
        "https://login.example/to ken",
        "https://login.example/token\n",
        "https://lögin.example/token",
        "https://[::1/token",
        "https://{shop}/token",
        "https://{domain}.evil.example/token",
        "https://evil.{domain}/token",
        "https://evil.example/{domain}",
        "https://evil.example/?{domain}",
        "https://{domain}/{domain}",
        "https://{domain}@evil.example/token",
        "https://{domain}/{token}",
        "https://{DOMAIN}/token",
        "https://{Domain}:8443/token",
        "https://{DOMAIN}/{domain}",
    ],
)
def test_an_endpoint_that_could_leak_or_fails_for_sure_is_a_wrong_setting(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(token_url=url)
    assert "token_url" in {one.field for one in caught.value.fields}


def test_without_allowed_hosts_a_placeholder_is_refused() -> None:
    with pytest.raises(ConfigError, match="allowed_hosts is required"):
        settings(allowed_hosts=())


@pytest.mark.parametrize("host", [".", "", "*.myshopify.com", "https://x", "a b", "a:1", "..x"])
def test_an_allowed_host_is_a_name_or_a_suffix(host: str) -> None:
    with pytest.raises(ConfigError, match="allowed_hosts"):
        settings(allowed_hosts=(host,))


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("http://127.0.0.1:8090/token", ()),
        ("http://[::1]:8090/token", ()),
        ("http://localhost/token", ()),
        ("http://{domain}:8090/token", ("localhost", ".localhost")),
    ],
)
def test_http_is_for_loopback_and_only_where_it_is_asked_for(
    url: str, hosts: tuple[str, ...]
) -> None:
    settings(token_url=url, allowed_hosts=hosts, allow_insecure_loopback=True)
    with pytest.raises(ConfigError, match="must be https"):
        settings(token_url=url, allowed_hosts=hosts)


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("http://10.0.0.1/token", ()),
        ("http://localhost.evil.example/token", ()),
        ("http://{domain}/token", (".localhost", ".myshopify.com")),
    ],
)
def test_http_to_anywhere_else_stays_refused(url: str, hosts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="must be https"):
        settings(token_url=url, allowed_hosts=hosts, allow_insecure_loopback=True)


def test_every_mistake_is_named_at_once_and_no_secret() -> None:
    with pytest.raises(ConfigError) as caught:
        settings(
            token_url="http://x.example",
            client_id="",
            timeout_s=31.0,
            refresh_before_s=float("nan"),
            assumed_lifetime_s=1.0,
        )
    assert [one.field for one in caught.value.fields] == [
        "client_id",
        "token_url",
        "refresh_before_s",
        "timeout_s",
        "assumed_lifetime_s",
    ]
    assert "our-secret" not in caught.value.message


def test_the_client_secret_does_not_show() -> None:
    assert "our-secret" not in repr(settings())


def test_shopify_is_renewed_ten_minutes_early_at_the_shops_own_endpoint(
    connection: Connect,
) -> None:
    one = OAuthSettings.shopify("app", "our-secret")
    assert one.url_for(connection("cool.myshopify.com", "")) == (
        "https://cool.myshopify.com/admin/oauth/access_token"
    )
    assert one.url_for(connection("cool.example", "cool")) is None
    assert (one.refresh_before_s, one.client_auth) == (600.0, "body")
