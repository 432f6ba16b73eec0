"""Checkout at Shopify, by the GraphQL Admin API of the merchant's own shop.

One bounded POST a request, with the shop's access token, which leaves in that one header and
nowhere else. What the answers mean is `shopify_answers`', what webhooks say `shopify_webhooks`'.

A charge carries our purchase's id in its name: `appPurchaseOneTimeCreate` knows no idempotency key,
so that after an answer that did not come this is how the charge is found again, and why a charge is
only asked for again where the first request was certainly not executed.
"""

import asyncio
import ipaddress
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, TypeAlias
from urllib.parse import urlsplit
from uuid import UUID

import aiohttp
import orjson
from prometheus_client import Histogram

from glamd.billing.model import PlatformName, Report, ids_of_charge
from glamd.billing.platforms import shopify_answers as answers
from glamd.billing.platforms import shopify_webhooks as webhooks
from glamd.billing.platforms.interface import (
    Checkout,
    Delivery,
    NotSoldError,
    Order,
    UnansweredError,
)
from glamd.errors import ConfigError, FieldError, NotFoundError, TransientError

API_VERSION: Final = "2026-10"
TIMEOUT_MAX_S: Final = 20.0
"""Above it an HTTP handler would be cut off, which then nobody could answer any more."""

ATTEMPTS_LIMIT: Final = 3
"""How often a request is sent that is throttled, which is all that is sent again."""

ANSWER_LIMIT_BYTES: Final = 256 * 1024
PAGE_SIZE: Final = 25
PAGES_LIMIT: Final = 20
CLOCK_LEEWAY: Final = timedelta(hours=2)
"""A charge is looked for among those that are no older than its purchase by more than this: our
clock may be an hour ahead."""

_SHOP_HOST: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.myshopify\.com", re.ASCII)
_VERSION: Final = re.compile(r"20[0-9]{2}-(?:01|04|07|10)|unstable", re.ASCII)

_CHARGE: Final = "id name status test createdAt price { amount currencyCode }"
_CREATE: Final = f"""
mutation($name: String!, $price: MoneyInput!, $returnUrl: URL!, $test: Boolean) {{
  appPurchaseOneTimeCreate(name: $name, price: $price, returnUrl: $returnUrl, test: $test) {{
    appPurchaseOneTime {{ {_CHARGE} }}
    confirmationUrl
    userErrors {{ field message }}
  }}
}}
"""
_BY_ID: Final = (
    f"query($id: ID!) {{ node(id: $id) {{ ... on AppPurchaseOneTime {{ {_CHARGE} }} }} }}"
)
_NEWEST: Final = f"""
query($first: Int!, $after: String) {{
  currentAppInstallation {{
    oneTimePurchases(first: $first, after: $after, sortKey: CREATED_AT, reverse: true) {{
      nodes {{ {_CHARGE} }}
      pageInfo {{ hasNextPage endCursor }}
    }}
  }}
}}
"""

_SECONDS: Final = Histogram(
    "glamd_billing_platform_seconds",
    "Requests to a platform, with their retries.",
    ["platform", "request"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShopAccess:
    """A shop's names, of which one has to be its host at Shopify, and its clear access token."""

    domain: str
    shop_id: str
    access_token: str = field(repr=False)


AccessOf: TypeAlias = Callable[[UUID], Awaitable[ShopAccess]]
"""The access to a merchant's shop. NotFoundError where there is no token that can be used,
TransientError where it cannot be had now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShopifySettings:
    """Our app at Shopify. ConfigError names every field that is wrong.

    `api_secrets` are the app's client secrets that may sign webhooks, the current one first.
    `is_test` makes charges that nobody pays. `base_url` is for tests and development: a stand-in on
    loopback that every shop is taken to.
    """

    api_secrets: tuple[str, ...] = field(repr=False)
    api_version: str = API_VERSION
    is_test: bool = False
    timeout_s: float = 10.0
    base_url: str | None = None

    def __post_init__(self) -> None:
        """Refuse what could send an access token to the wrong place, or wait without end."""
        mistakes = []
        if not self.api_secrets or not all(self.api_secrets):
            mistakes.append(("api_secrets", "is missing"))
        if _VERSION.fullmatch(self.api_version) is None:
            mistakes.append(("api_version", "should be like 2026-10"))
        if not 0.1 <= self.timeout_s <= TIMEOUT_MAX_S:
            mistakes.append(("timeout_s", f"should be 0.1 to {TIMEOUT_MAX_S:g}"))
        if self.base_url is not None and not _is_loopback(self.base_url):
            mistakes.append(("base_url", "is for development: http:// to loopback"))
        if mistakes:
            told = "; ".join(f"{name} {why}" for name, why in mistakes)
            fields = [FieldError(name, why) for name, why in mistakes]
            raise ConfigError(f"Billing at Shopify: {told}.", fields=fields)

    def url_for(self, access: ShopAccess) -> str | None:
        """The shop's GraphQL endpoint; None where no name of it is a host of Shopify's.

        The names come out of a row that the merchant's own client wrote. What is sent there is that
        shop's token, and the sender is inside of our network, so it goes to Shopify or nowhere.
        """
        path = f"/admin/api/{self.api_version}/graphql.json"
        if self.base_url is not None:
            return self.base_url.rstrip("/") + path
        for name in (access.domain, access.shop_id):
            # Beyond ASCII there are letters whose small form is an ASCII one.
            if name.isascii() and _SHOP_HOST.fullmatch(name.lower()):
                return f"https://{name.lower()}{path}"
        return None


def open_session(*, connections: int, tls: ssl.SSLContext | None = None) -> aiohttp.ClientSession:
    """A session for Shopify, with at most so many connections at once.

    No connection is used twice, because one that breaks under a second use would leave open whether
    the request had its effect. `tls` is for a certificate authority of one's own.
    """
    connector = aiohttp.TCPConnector(
        limit=connections, force_close=True, ssl=True if tls is None else tls
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
    )


class Shopify:
    """Shopify as a platform that collects money."""

    name: PlatformName = "shopify"
    can_be_asked = True

    def __init__(
        self, settings: ShopifySettings, *, session: aiohttp.ClientSession, access_of: AccessOf
    ) -> None:
        self.settings = settings
        self._session = session
        self._access_of = access_of

    @property
    def is_test(self) -> bool:
        """Whether its charges are tests."""
        return self.settings.is_test

    async def check_out(self, order: Order) -> Checkout:
        """Make a charge in the merchant's shop. Raises NotSoldError, UnansweredError."""
        variables = {
            "name": name_of(order),
            "price": {"amount": order.price.amount, "currencyCode": order.price.currency},
            "returnUrl": order.return_url,
            "test": order.is_test,
        }
        access = await self._access(order.merchant_id)
        made = answers.checkout_of(await self._ask("create", access, _CREATE, variables))
        if self.settings.base_url is None and not made.url.lower().startswith("https://"):
            raise UnansweredError("BAD_ANSWER")
        return made

    async def find(self, order: Order, charge_id: str | None) -> Report | None:
        """What became of a charge, by its id or else by the name that we gave it."""
        access = await self._access(order.merchant_id)
        if charge_id is not None:
            variables = {"id": ids_of_charge(charge_id)[0]}
            return answers.charge_of(await self._ask("node", access, _BY_ID, variables))
        return await self._find_by_name(order, access)

    def receive(self, body: bytes, headers: Mapping[str, str], now: datetime) -> Delivery:
        """Check a webhook's signature; UnauthenticatedError."""
        del now  # nothing that is signed says when
        return webhooks.receive(self.settings.api_secrets, body, headers)

    def concerns(self, topic: str) -> bool:
        """Whether webhooks of this topic are about charges."""
        return topic == webhooks.TOPIC

    def read(self, delivery: Delivery, body: bytes) -> Report:
        """What a webhook says of a charge; InputError."""
        return webhooks.read(delivery, body)

    async def _find_by_name(self, order: Order, access: ShopAccess) -> Report | None:
        name, oldest = name_of(order), order.created_at - CLOCK_LEEWAY
        cursor: str | None = None
        for _ in range(PAGES_LIMIT):
            variables = {"first": PAGE_SIZE, "after": cursor}
            page = answers.charges_of(await self._ask("list", access, _NEWEST, variables))
            for charge_name, created_at, report in page.charges:
                if created_at < oldest:
                    return None
                if charge_name == name:
                    return report
            if page.next_cursor is None:
                return None
            cursor = page.next_cursor
        raise UnansweredError("TOO_MANY")

    async def _access(self, merchant_id: UUID) -> ShopAccess:
        try:
            return await self._access_of(merchant_id)
        except NotFoundError:
            raise NotSoldError("NO_TOKEN") from None
        except TransientError as error:
            raise NotSoldError(
                "TOKEN_UNAVAILABLE", may_pass=True, retry_after_s=error.retry_after_s
            ) from None

    async def _ask(
        self, request: str, access: ShopAccess, document: str, variables: Mapping[str, object]
    ) -> Mapping[str, object]:
        """The data of an answer, within `timeout_s`, waiting out a throttle where that suffices."""
        url = self.settings.url_for(access)
        if url is None:
            raise NotSoldError("HOST_NOT_ALLOWED")
        body = orjson.dumps({"query": document, "variables": variables})
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + self.settings.timeout_s
        with _SECONDS.labels(self.name, request).time():
            for attempt in range(1, ATTEMPTS_LIMIT + 1):
                try:
                    return answers.data_of(await self._post(url, access, body, ends_s))
                except answers.ThrottledError as throttled:
                    if attempt == ATTEMPTS_LIMIT or loop.time() + throttled.wait_s >= ends_s:
                        after_s = max(1, round(throttled.wait_s))
                        raise NotSoldError(
                            "THROTTLED", may_pass=True, retry_after_s=after_s
                        ) from None
                    await asyncio.sleep(throttled.wait_s)
        raise AssertionError("the last attempt returns or raises")

    async def _post(
        self, url: str, access: ShopAccess, body: bytes, ends_s: float
    ) -> answers.RawAnswer:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "glamd",
            "X-Shopify-Access-Token": access.access_token,
        }
        try:
            async with (
                asyncio.timeout_at(ends_s),
                self._session.post(
                    url, data=body, headers=headers, allow_redirects=False
                ) as response,
            ):
                return answers.RawAnswer(
                    status=response.status,
                    retry_after=response.headers.get("Retry-After"),
                    body=await _bounded(response.content),
                )
        # What these carry names hosts at most; still, nothing of it travels on.
        except TimeoutError:
            raise UnansweredError("TIMEOUT") from None
        except aiohttp.ClientConnectorError:
            # Before the first byte: no name, no route, no TLS. Nothing has been asked for.
            raise NotSoldError("CONNECT_FAILED", may_pass=True) from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise UnansweredError("CONNECTION_FAILED") from None


def name_of(order: Order) -> str:
    """A charge's name, which the merchant reads and by which we know it."""
    return f"{order.credits} credits (purchase {order.purchase_id})"


async def _bounded(content: aiohttp.StreamReader) -> bytes:
    body = bytearray()
    while chunk := await content.read(ANSWER_LIMIT_BYTES):
        body += chunk
        if len(body) > ANSWER_LIMIT_BYTES:
            raise UnansweredError("ANSWER_TOO_LARGE")
    return bytes(body)


def _is_loopback(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme == "http"
            and "@" not in parts.netloc
            and parts.path in {"", "/"}
            and not parts.query
            and ipaddress.ip_address(parts.hostname or "").is_loopback
        )
    except ValueError:
        return False
