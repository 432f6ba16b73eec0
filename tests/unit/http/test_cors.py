"""Which origins are exact ones."""

import pytest

from glamd.errors import ConfigError
from glamd.http.cors import Cors
from glamd.origins import MAX_ORIGINS


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "",
        "https://*",
        "https://*.example.com",
        "https://a_b.example",
        "https://shop.example/",
        "https://shop.example/path",
        "https://shop.example?x",
        "https://shop.example#x",
        "https://user@shop.example",
        "https://Shop.example",
        "HTTPS://shop.example",
        "https://shop.example ",
        "https://shop.example\n",
        "https://shop.example:",
        "https://shop.example:0443",
        "https://shop.example.",
        "https://-shop.example",
        "https://",
        "http://shop.example",
        "http://127.0.0.2",
        "http://localhost.evil.example",
        "ftp://shop.example",
        "shop.example",
        "https://shop.example,https://other.example",
        "https://schöner.example",
    ],
)
def test_what_is_no_exact_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError):
        Cors([origin])


@pytest.mark.parametrize(
    "origin",
    [
        "https://shop.example",
        "https://shop.example:8443",
        "https://xn--schner-fua.example",
        "https://192.0.2.1",
        "https://[2001:db8::1]:8443",
        "https://intranet",
        "http://localhost",
        "http://localhost:5173",
        "http://127.0.0.1:8080",
        "http://[::1]:8080",
    ],
)
def test_an_exact_origin_is_taken(origin: str) -> None:
    Cors([origin])


def test_there_are_only_so_many() -> None:
    with pytest.raises(ConfigError):
        Cors(f"https://shop-{n}.example" for n in range(MAX_ORIGINS + 1))
