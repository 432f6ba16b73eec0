"""The merchant of `glamd dev` that buys credits: what it does to a daemon, and what is shown of it.

The daemon, its database, NATS and the stand-in's HTTP are real; only the pace is not that of a
demo.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
from rich.text import Text

from glamd.clock import SystemClock
from glamd.embedded import demo_credits, money_lines
from glamd.embedded.demo_credits import DOMAIN, Audience, Kept, Pace, Storefront, perform
from glamd.embedded.demo_events import Gathering, Happening
from glamd.embedded.demo_shopify import DemoShopify
from glamd.embedded.settings import LOOPBACK
from glamd.errors import UnavailableError
from tests.support.nats import NatsServer, delete_stream, nats_client
from tests.support.site import Site, running_site

T = TypeVar("T")

LONG_S = 20.0
NOWHERE = "http://127.0.0.1:1"
FAST = Pace(
    quick_matches=150,
    quick_every_s=0.3,
    slow_matches=60,
    slow_every_s=0.3,
    rest_s=0.05,
    retry_s=0.05,
)


@dataclass
class Seen:
    """An audience that remembers; `line` says what was told, as the screen would say it."""

    happenings: list[Happening] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def audience(self) -> Audience:
        """To be handed to the play."""
        return Audience(
            show=self._into(self.happenings, money_lines.of),
            checkout=lambda pack, page: self._into(
                self.pages, lambda shown: money_lines.of_checkout(pack, shown)
            )(page),
            trouble=self._into(self.troubles, money_lines.of_trouble),
        )

    def kinds(self) -> list[str]:
        """What happened, without repetitions in a row."""
        kinds = [each.subject.removeprefix("evt.").removesuffix(".v1") for each in self.happenings]
        return [kind for n, kind in enumerate(kinds) if n == 0 or kinds[n - 1] != kind]

    async def until(self, condition: Callable[[], object]) -> None:
        """Return when something that was told makes it so."""
        async with asyncio.timeout(LONG_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def _into(self, told: list[T], line: Callable[[T], Text]) -> Callable[[T], None]:
        def tell(what: T) -> None:
            told.append(what)
            self.lines.append(line(what).plain)
            self._changed.set()

        return tell


def event(name: str, **data: object) -> tuple[str, Mapping[str, object]]:
    """Subject and data, as the bus has them."""
    return f"evt.{name}.v1", data


def gathered(name: str, data: Mapping[str, object]) -> Happening:
    """One event, as it is told in the end."""
    gathering = Gathering()
    told = gathering.add(*event(name, **data)) + gathering.take()
    return told[0]


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    """The merchant of a state directory."""
    return Kept.of(tmp_path / "demo")


@pytest.fixture
async def empty_bus(nats_server: NatsServer) -> AsyncIterator[str]:
    """The URL of a server with no stream, since the daemon would consume what others left."""
    async with nats_client(nats_server.url) as client:
        await delete_stream(client)
    yield nats_server.url
    async with nats_client(nats_server.url) as client:
        await delete_stream(client)


@asynccontextmanager
async def shop_site(
    folder: Path, database_url: str, nats_url: str, kept: Kept
) -> AsyncIterator[tuple[Site, DemoShopify]]:
    """A daemon beside the stand-in, with the merchant, as `glamd dev` puts them together."""
    async with (
        demo_credits.platform(kept, SystemClock()) as shopify,
        running_site(
            folder, database_url, nats_url=nats_url, changes=demo_credits.settings_for(shopify)
        ) as site,
    ):
        shopify.webhooks_url = f"{url_of(site)}/webhooks/shopify"
        await demo_credits.seed(site.daemon.onboarding, kept)
        yield site, shopify


def url_of(site: Site) -> str:
    """The api listener's."""
    return f"http://{LOOPBACK}:{site.daemon.http_port}"


def jwt_of(site: Site, kept: Kept) -> str:
    """A token of the merchant that buys."""
    return site.mint.client(merchant_id=str(kept.merchant_id), shop=DOMAIN, scope="bff:call")


@asynccontextmanager
async def playing(
    url: str, nats_url: str, kept: Kept, jwt: Callable[[], str], seen: Seen
) -> AsyncIterator[None]:
    """The play, going on beside the test until the end of the context."""
    play = asyncio.create_task(
        perform(
            url=url,
            nats_url=nats_url,
            kept=kept,
            jwt=jwt,
            clock=SystemClock(),
            audience=seen.audience(),
            pace=FAST,
        )
    )
    play.add_done_callback(lambda _: seen._changed.set())
    try:
        yield
        assert not play.done(), "it ended by itself"
    finally:
        play.cancel()
        [ended] = await asyncio.gather(play, return_exceptions=True)
    assert isinstance(ended, asyncio.CancelledError), ended


# ---- what is away or refuses


async def test_a_daemon_that_does_not_answer_is_told_of_once_and_asked_again(
    empty_bus: str, kept: Kept
) -> None:
    asked = asyncio.Semaphore(0)

    def jwt() -> str:
        asked.release()
        return "none"

    seen = Seen()
    async with playing(NOWHERE, empty_bus, kept, jwt, seen), asyncio.timeout(LONG_S):
        for _ in range(3):
            await asked.acquire()
    assert seen.troubles == ["GET /api/billing/trials is not answered."]
    assert seen.lines[0].split() == ["demo", "waits", *seen.troubles[0].split()]


async def test_a_checkout_page_that_is_not_there_is_an_error_of_ours(kept: Kept) -> None:
    async with (
        demo_credits.platform(kept, SystemClock()) as shopify,
        Storefront(NOWHERE, kept=kept, jwt=str) as storefront,
    ):
        with pytest.raises(UnavailableError, match="answers 404"):
            await storefront.approve(f"{shopify.url}/admin/charges/1/confirm")
        with pytest.raises(UnavailableError, match="does not answer"):
            await storefront.approve(NOWHERE)


# ---- the play


async def test_a_trial_and_a_pack_are_consumed_to_the_end_and_a_restart_goes_on(
    tmp_path: Path, database_url: str, empty_bus: str, kept: Kept
) -> None:
    first, second = Seen(), Seen()
    async with shop_site(tmp_path / "site", database_url, empty_bus, kept) as (site, shopify):
        async with Storefront(
            url_of(site), kept=kept, jwt=lambda: jwt_of(site, kept)
        ) as storefront:
            await storefront.connect_shop()
        async with playing(url_of(site), empty_bus, kept, lambda: jwt_of(site, kept), first):
            await first.until(lambda: "credits.insufficient" in first.kinds())
            await first.until(lambda: len(first.pages) == 2)
            await first.until(lambda: first.kinds().count("billing.credits.purchased") == 2)
        numbers = {charge.number for charge in shopify.charges}
        verified = await (await site.admin.post("/v1/ledger/verify", json={})).json()
    subjects = [each.subject.removeprefix("evt.").removesuffix(".v1") for each in first.happenings]
    assert subjects[:4] == [
        "credits.granted",
        "billing.trial.started",
        "credits.granted",
        "billing.credits.purchased",
    ]
    end = subjects.index("credits.exhausted")
    assert subjects[end - 3 : end] == [
        "credits.consumed",
        "credits.low_balance",
        "credits.consumed",
    ]
    assert consumed(first.happenings[:end]) == 600
    assert first.troubles == []
    assert verified["ok"]
    async with (
        shop_site(tmp_path / "site", database_url, empty_bus, kept) as (site, shopify),
        playing(url_of(site), empty_bus, kept, lambda: jwt_of(site, kept), second),
    ):
        await second.until(lambda: "billing.credits.purchased" in second.kinds())
    assert "billing.trial.started" not in second.kinds()
    assert second.troubles == []
    assert not numbers & {charge.number for charge in shopify.charges}


def consumed(happenings: Sequence[Happening]) -> int:
    """The credits whose consumption was shown."""
    return sum(each.amount for each in happenings if "consumed" in each.subject)


async def test_without_its_token_the_shop_sells_nothing_and_the_trial_is_consumed_all_the_same(
    tmp_path: Path, database_url: str, empty_bus: str, kept: Kept
) -> None:
    seen = Seen()
    async with (
        shop_site(tmp_path / "site", database_url, empty_bus, kept) as (site, shopify),
        playing(url_of(site), empty_bus, kept, lambda: jwt_of(site, kept), seen),
    ):
        await seen.until(lambda: "credits.exhausted" in seen.kinds())
    assert seen.troubles[0] == "POST /api/billing/purchases: 502 PLATFORM_ERROR."
    assert shopify.charges == []
    assert consumed(seen.happenings) == 500


# ---- what is kept


def test_a_further_start_finds_merchant_and_secrets_as_they_were(tmp_path: Path) -> None:
    made = Kept.of(tmp_path / "demo")
    assert Kept.of(tmp_path / "demo") == made
    assert made.access_token not in repr(made)
    assert made.api_secret not in repr(made)
    assert (tmp_path / "demo" / "credits.json").stat().st_mode & 0o777 == 0o600
    assert Kept.of(tmp_path / "other").merchant_id != made.merchant_id


# ---- how it looks


def test_many_of_a_kind_are_one_until_another_comes() -> None:
    gathering = Gathering()
    for balance in (102, 101, 100):
        assert gathering.add(*event("credits.consumed", amount=1, balance=balance)) == []
    told = gathering.add(*event("credits.low_balance", balance=99, threshold=100))
    assert [(each.subject, each.times, each.amount) for each in told] == [
        ("evt.credits.consumed.v1", 3, 3),
        ("evt.credits.low_balance.v1", 1, 0),
    ]
    assert told[0].data["balance"] == 100
    assert gathering.is_empty
    assert gathering.take() == []


def test_one_kind_of_many_ends_the_other() -> None:
    gathering = Gathering()
    assert gathering.add(*event("credits.consumed", amount=1, balance=0)) == []
    [told] = gathering.add(*event("credits.insufficient", attempted_amount=1, balance=0))
    assert told.subject == "evt.credits.consumed.v1"
    [left] = gathering.take()
    assert (left.subject, left.times, left.amount) == ("evt.credits.insufficient.v1", 1, 0)


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        (
            "credits.granted",
            {"amount": 500, "balance": 500, "reference_type": "trial"},
            "credits granted +500 balance 500 (trial)",
        ),
        ("credits.consumed", {"amount": 1, "balance": 9}, "credits consumed -1 balance 9"),
        (
            "credits.low_balance",
            {"balance": 99, "threshold": 100},
            "credits low_balance balance 99, below 100",
        ),
        ("credits.exhausted", {}, "credits exhausted nothing is left"),
        ("credits.insufficient", {"balance": 0}, "credits insufficient refused, balance 0"),
        (
            "billing.trial.started",
            {"credits": 500, "ends_at": "2030-01-31T12:00:00+00:00"},
            "billing trial.started 500 until 2030-01-31",
        ),
        (
            "billing.trial.expired",
            {"expired_at": "2030-01-31T12:00:00+00:00"},
            "billing trial.expired at 2030-01-31",
        ),
        (
            "billing.credits.purchased",
            {"credits": 100, "amount": "9.99", "platform": "shopify"},
            "billing credits.purchased 100 for 9.99 at shopify",
        ),
        ("credits.of_tomorrow", {}, "credits of_tomorrow"),
    ],
)
def test_every_event_about_money_has_its_line(
    name: str, data: Mapping[str, object], line: str
) -> None:
    assert " ".join(money_lines.of(gathered(name, data)).plain.split()) == line


def test_the_page_of_a_checkout_is_shown_without_its_signature() -> None:
    shown = money_lines.of_checkout("small", "http://127.0.0.1:1/charges/1/confirm?signature=x")
    assert shown.plain.split() == [
        *("billing", "checkout", "small", "approves", "at"),
        "http://127.0.0.1:1/charges/1/confirm",
    ]
