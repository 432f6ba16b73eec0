"""The merchant of `glamd dev` that buys credits: its shop, its back end, and the play of both.

The trial starts, a pack is bought through the stand-in checkout, and matches consume credits until
none are left; then a pack is bought again, and so on at a slower pace. It is played from outside as
by a real shop: over HTTP with the merchant's JWT, at the checkout page as its browser, and over the
bus as the service that makes matches. What comes of it is seen by `demo_events`.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from uuid import UUID, uuid4

import aiohttp
import orjson

from glamd.clock import Clock
from glamd.embedded.demo_events import Happening, Watch
from glamd.embedded.demo_shopify import DemoShop, DemoShopify
from glamd.embedded.files import write_private
from glamd.errors import UnavailableError
from glamd.events.bus import Bus
from glamd.onboarding import Onboarding

DOMAIN: Final = "demo-credits.example"
"""No name below `myshopify.com`, which might be somebody's: a browser is sent back there."""

SHOP_NUMBER: Final = 548_380_010
SHOP_ID: Final = f"gid://shopify/Shop/{SHOP_NUMBER}"
RETURN_URL: Final = f"https://{DOMAIN}/credits"
APP_KEY: Final = "glamd-dev"
PACK: Final = "small"
MATCHED: Final = "evt.ai.match.completed.v1"

REQUEST_TIMEOUT_S: Final = 20.0
PURCHASE_POLLS: Final = 100
PURCHASE_POLL_S: Final = 0.1
"""How often it is looked for a purchase that is approved; the webhook takes milliseconds."""

FLUSH_TIMEOUT_S: Final = 5.0
QUICK_ABOVE: Final = 100
"""More credits than this are consumed quickly at any time, so that their end is seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How many matches at once and how often: until the first exhaustion, and afterwards.

    The trial's 500 credits and a pack's 100 last 36 s, a further pack a minute.
    """

    quick_matches: int = 50
    quick_every_s: float = 3.0
    slow_matches: int = 10
    slow_every_s: float = 6.0
    rest_s: float = 10.0
    """Without any credit, before the next pack is bought."""
    retry_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Kept:
    """What a further start has to find as it was."""

    merchant_id: UUID
    api_secret: str = field(repr=False)
    access_token: str = field(repr=False)

    @classmethod
    def of(cls, folder: Path) -> Self:
        """That of this folder, made at the first call."""
        path = folder / "credits.json"
        if not path.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = {
                "merchant_id": str(uuid4()),
                "api_secret": f"shpss_{secrets.token_hex(16)}",
                "access_token": f"shpat_{secrets.token_hex(16)}",
            }
            write_private(path, orjson.dumps(made))
        found = orjson.loads(path.read_bytes())
        return cls(UUID(found["merchant_id"]), found["api_secret"], found["access_token"])


def platform(kept: Kept, clock: Clock) -> DemoShopify:
    """The stand-in where the shop is, not started yet.

    It has forgotten the charges of earlier starts, and gives none of their numbers again.
    """
    shopify = DemoShopify(
        api_secret=kept.api_secret, numbers_after=int(clock.now().timestamp() * 1000)
    )
    shopify.shops.append(DemoShop(DOMAIN, SHOP_NUMBER, access_token=kept.access_token))
    return shopify


def settings_for(shopify: DemoShopify) -> dict[str, dict[str, object]]:
    """The sections that take the daemon to this stand-in, once that is started."""
    section: dict[str, object] = {
        "api_key": APP_KEY,
        "api_secrets": [shopify.api_secret],
        "base_url": shopify.url,
    }
    return {"shopify": section}


async def seed(onboarding: Onboarding, kept: Kept) -> None:
    """Make the merchant, where it is missing."""
    await onboarding.create(
        platform="shopify", shop_id=SHOP_ID, domain=DOMAIN, merchant_id=kept.merchant_id
    )


class Storefront:
    """The merchant's own back end and its browser; an asynchronous context manager.

    Every method raises UnavailableError where it does not get the answer that it is there for.
    """

    def __init__(self, url: str, *, kept: Kept, jwt: Callable[[], str]) -> None:
        """`url` is the api listener's; `jwt` gives a token of the merchant that is valid now."""
        self._url = url
        self._kept = kept
        self._jwt = jwt
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S), trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def connect_shop(self) -> None:
        """Hand the shop's access token over to the vault, where billing finds it."""
        await self._ask(
            "POST",
            "/api/v1/tokens",
            {
                "merchant_id": str(self._kept.merchant_id),
                "platform_name": "shopify",
                "platform_shop_id": SHOP_ID,
                "domain": DOMAIN,
                "token_type": "oauth",
                "token_data": {"access_token": self._kept.access_token},
            },
        )

    async def start_trial(self) -> bool:
        """Start the trial; False where it was used already."""
        if not (await self._ask("GET", "/api/billing/trials"))["available"]:
            return False
        await self._ask("POST", "/api/billing/trials")
        return True

    async def balance(self) -> int:
        """The credits that are left."""
        return int(str((await self._ask("GET", "/api/credits"))["balance"]))

    async def begin_purchase(self, pack: str) -> tuple[str, str]:
        """Begin to buy a pack; the purchase's id, and the page where it is paid."""
        wanted = {"pack": pack, "platform": "shopify", "return_url": RETURN_URL}
        begun = await self._ask("POST", "/api/billing/purchases", wanted)
        return str(begun["purchase_id"]), str(begun["checkout_url"])

    async def approve(self, page: str) -> None:
        """Press the button on the page; it is not followed back to the shop, which nobody built."""
        try:
            async with self._session.post(
                page, data={"act": "approve"}, allow_redirects=False
            ) as answer:
                if answer.status != HTTPStatus.FOUND:
                    raise UnavailableError(f"The checkout page answers {answer.status}.")
        except (aiohttp.ClientError, TimeoutError):
            raise UnavailableError("The checkout page does not answer.") from None

    async def wait_completed(self, purchase_id: str) -> None:
        """Return when the purchase is completed."""
        for _ in range(PURCHASE_POLLS):
            found = await self._ask("GET", f"/api/billing/purchases/{purchase_id}")
            if found["status"] == "completed":
                return
            await asyncio.sleep(PURCHASE_POLL_S)
        raise UnavailableError("The purchase is not completed.")

    async def _ask(
        self, method: str, path: str, body: Mapping[str, object] | None = None
    ) -> Mapping[str, object]:
        """The data of a success."""
        try:
            async with self._session.request(
                method,
                self._url + path,
                json=body,
                headers={"Authorization": f"Bearer {self._jwt()}"},
            ) as response:
                answer = orjson.loads(await response.read())
        except (aiohttp.ClientError, TimeoutError, ValueError):
            raise UnavailableError(f"{method} {path} is not answered.") from None
        if response.status >= 400:
            raise UnavailableError(f"{method} {path}: {response.status} {answer['code']}.")
        found: Mapping[str, object] = answer["data"]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Audience:
    """Who is told: of each event, of each pack with the page where it is approved, of trouble."""

    show: Callable[[Happening], None]
    checkout: Callable[[str, str], None]
    trouble: Callable[[str], None]


async def perform(
    *,
    url: str,
    nats_url: str,
    kept: Kept,
    jwt: Callable[[], str],
    clock: Clock,
    audience: Audience,
    pace: Pace | None = None,
) -> None:
    """Play, and tell the audience what the bus says of it, until cancelled."""
    bus = Bus([nats_url], name="glamd-dev-demo")
    watch = Watch(bus, kept.merchant_id, audience.show)
    async with Storefront(url, kept=kept, jwt=jwt) as storefront, asyncio.TaskGroup() as group:
        group.create_task(bus.run(), name="demo:bus")
        group.create_task(watch.run(), name="demo:events")
        # Before anybody listens nothing happens that somebody would want to see.
        await watch.listening.wait()
        play = Play(
            storefront,
            bus,
            merchant_id=kept.merchant_id,
            clock=clock,
            audience=audience,
            pace=pace or Pace(),
        )
        await play.run()


class Play:
    """What the merchant and its shoppers do, for as long as `run` runs."""

    def __init__(
        self,
        storefront: Storefront,
        bus: Bus,
        *,
        merchant_id: UUID,
        clock: Clock,
        audience: Audience,
        pace: Pace,
    ) -> None:
        self._storefront = storefront
        self._bus = bus
        self._merchant_id = merchant_id
        self._clock = clock
        self._audience = audience
        self._pace = pace
        self._has_begun = False
        self._was_exhausted = False

    async def run(self) -> None:
        """Play until cancelled. What is away for a while is waited for."""
        told = ""
        while True:
            try:
                await self._act()
                told = ""
            except UnavailableError as error:
                if error.message != told:
                    told = error.message
                    self._audience.trouble(told)
                await asyncio.sleep(self._pace.retry_s)

    async def _act(self) -> None:
        """One round: the trial, once in a merchant's life; matches; a pack where that is due."""
        pace = self._pace
        if not self._has_begun:
            if await self._storefront.start_trial():
                await self._buy()
            self._has_begun = True
        balance = await self._storefront.balance()
        if balance == 0:
            # Shoppers do not know: they are refused.
            self._was_exhausted = True
            await self._matches(pace.slow_matches)
            await asyncio.sleep(pace.rest_s)
            await self._buy()
        elif balance > QUICK_ABOVE or not self._was_exhausted:
            await self._matches(pace.quick_matches)
            await asyncio.sleep(pace.quick_every_s)
        else:
            await self._matches(pace.slow_matches)
            await asyncio.sleep(pace.slow_every_s)

    async def _buy(self) -> None:
        purchase_id, page = await self._storefront.begin_purchase(PACK)
        self._audience.checkout(PACK, page)
        await self._storefront.approve(page)
        await self._storefront.wait_completed(purchase_id)

    async def _matches(self, count: int) -> None:
        """Publish so many matches, as their service does."""
        link = await self._bus.link()
        for _ in range(count):
            await link.publish(MATCHED, self._match())
        await link.flush(timeout_s=FLUSH_TIMEOUT_S)

    def _match(self) -> bytes:
        data = {
            "merchant_id": str(self._merchant_id),
            "match_id": str(uuid4()),
            "shopper_id": f"shopper-{secrets.randbelow(1000)}",
            "matched_items_count": 1 + secrets.randbelow(8),
        }
        return orjson.dumps(
            {
                "event_id": str(uuid4()),
                "event_type": MATCHED,
                "correlation_id": str(uuid4()),
                "timestamp": self._clock.now().isoformat(),
                "source_service": "demo-matches",
                "data": data,
                "metadata": {},
            }
        )
