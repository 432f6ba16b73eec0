"""What a platform's token endpoint is called, who we are there, and where it may be. Pure.

Where a template holds `{domain}`, the host comes out of a row that a merchant's own client wrote.
What is sent there carries our client secret and the merchant's refresh token, so that a host counts
only if it is among `allowed_hosts`: otherwise anybody who may store a token could have the secret
sent to a server of theirs, or glamd speak to a machine of our own network. Nothing is sent here;
`oauth` does that.
"""

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import SplitResult, urlsplit

from glamd.credentials.model import Platform, ShopConnection
from glamd.errors import ConfigError, FieldError

DOMAIN: Final = "{domain}"
"""The only placeholder of a template, and only as its whole host."""

SHOPIFY_TOKEN_URL: Final = f"https://{DOMAIN}/admin/oauth/access_token"
SHOPIFY_HOSTS: Final = (".myshopify.com",)

REFRESH_BEFORE_MAX_S: Final = 86_400.0
TIMEOUT_MAX_S: Final = 30.0
"""Bounds how long a claim must last; see `store.LEASE_S`."""

LIFETIME_MIN_S: Final = 60.0
LIFETIME_MAX_S: Final = 10 * 365 * 86_400.0
"""A longer life than this is no lifetime but a mistake."""

ClientAuth = Literal["body", "basic"]

_NAME_CHARS: Final = 253
_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class OAuthSettings:
    """How the tokens of one platform are renewed (RFC 6749, 6).

    `token_url` is https without user, password or fragment; its host is fixed or `{domain}`, for
    which the connection's domain stands, or its shop id where that one is the host that fits.
    `allowed_hosts` are hosts, or suffixes that begin with a dot; they must be given where the host
    is not fixed. `client_auth` says whether we identify ourselves in the form or by HTTP Basic.
    `assumed_lifetime_s` is what a token lives whose answer does not say it. ConfigError names every
    field that is wrong. `allow_insecure_loopback` is for tests and development.
    """

    platform: Platform
    token_url: str
    client_id: str
    client_secret: str = field(repr=False)
    allowed_hosts: tuple[str, ...] = ()
    client_auth: ClientAuth = "body"
    refresh_before_s: float = 600.0
    timeout_s: float = 10.0
    assumed_lifetime_s: float = 3600.0
    allow_insecure_loopback: bool = False

    def __post_init__(self) -> None:
        """Refuse what could send a secret to the wrong place, or wait without end."""
        mistakes = [FieldError(name, why) for name, why in self._mistakes()]
        if mistakes:
            told = "; ".join(f"{one.field} {one.message}" for one in mistakes)
            raise ConfigError(f"Renewing tokens of {self.platform}: {told}.", fields=mistakes)

    @classmethod
    def shopify(cls, client_id: str, client_secret: str) -> "OAuthSettings":
        """Shopify's expiring offline tokens: they live 3600 s, and are renewed 600 s before.

        The endpoint is the shop's own, and the refresh token, good for 90 days, is replaced at each
        use (shopify.dev: "Offline access tokens now support expiry and refresh", "Use expiring
        offline access tokens").
        """
        return cls(
            platform="shopify",
            token_url=SHOPIFY_TOKEN_URL,
            allowed_hosts=SHOPIFY_HOSTS,
            client_id=client_id,
            client_secret=client_secret,
        )

    def url_for(self, connection: ShopConnection) -> str | None:
        """The token endpoint for this shop; None where no host that we know of it is allowed."""
        if DOMAIN not in self.token_url:
            return self.token_url
        for name in (connection.domain, connection.platform_shop_id):
            host = name.lower()
            if _is_name(host) and any(_fits(host, allowed) for allowed in self.allowed_hosts):
                return self.token_url.replace(DOMAIN, host)
        return None

    def _mistakes(self) -> list[tuple[str, str]]:
        mistakes = [
            (name, "is missing")
            for name in ("client_id", "client_secret")
            if not getattr(self, name)
        ]
        why = self._wrong_url()
        if why is not None:
            mistakes.append(("token_url", why))
        if DOMAIN in self.token_url and not self.allowed_hosts:
            mistakes.append(("allowed_hosts", f"is required, because token_url holds {DOMAIN}"))
        if not all(_is_name(host.removeprefix(".")) for host in self.allowed_hosts):
            mistakes.append(
                ("allowed_hosts", "should be host names, or suffixes such as .shop.example")
            )
        for name, value, least, most in (
            ("refresh_before_s", self.refresh_before_s, 0.0, REFRESH_BEFORE_MAX_S),
            ("timeout_s", self.timeout_s, 0.1, TIMEOUT_MAX_S),
            ("assumed_lifetime_s", self.assumed_lifetime_s, LIFETIME_MIN_S, LIFETIME_MAX_S),
        ):
            if not least <= value <= most:
                mistakes.append((name, f"should be {least:g} to {most:g}"))
        return mistakes

    def _wrong_url(self) -> str | None:
        try:
            parts = urlsplit(self.token_url)
            port = parts.port
        except ValueError:
            return "cannot be read"
        # `hostname` is in lower case, in which another spelling would pass for the placeholder.
        placeholders = int(parts.hostname == DOMAIN and DOMAIN in self.token_url)
        if any(self.token_url.count(brace) != placeholders for brace in "{}"):
            return f"may hold {DOMAIN} as its whole host, and no other placeholder"
        if "@" in parts.netloc or parts.fragment:
            return "must not have a user, a password or a fragment"
        plain = (
            self.token_url.isascii() and self.token_url.isprintable() and " " not in self.token_url
        )
        if not parts.hostname or port == 0 or not plain:
            return "should be like https://host/path"
        return self._wrong_scheme(parts)

    def _wrong_scheme(self, parts: SplitResult) -> str | None:
        if parts.scheme == "https":
            return None
        hosts = self.allowed_hosts if DOMAIN in self.token_url else (parts.hostname or "",)
        if (
            parts.scheme == "http"
            and self.allow_insecure_loopback
            and all(map(_is_loopback, hosts))
        ):
            return None
        return "must be https (http only to loopback, for development)"


def _is_name(host: str) -> bool:
    return len(host) <= _NAME_CHARS and _NAME.fullmatch(host) is not None


def _fits(host: str, allowed: str) -> bool:
    """The dot that a suffix begins with keeps `evil-shop.example` out of `.shop.example`."""
    return host.endswith(allowed) if allowed.startswith(".") else host == allowed


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
