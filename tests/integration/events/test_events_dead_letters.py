"""Dead letters: what is kept of an event, what is not, and how it gets its effect after all."""

import asyncio
from collections.abc import Iterator, MutableMapping
from datetime import timedelta
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from glamd.db import Database
from glamd.errors import (
    ConflictError,
    FieldError,
    GlamError,
    InputError,
    InternalError,
    NotFoundError,
    UnavailableError,
)
from glamd.events import dead_letters
from glamd.events.dead_letters import DeadLetters
from glamd.events.envelope import Event
from glamd.events.schemas import CreditsPurchased, PurchaseUpdated
from glamd.events.subscription import Subscription
from tests.support.events_world import merchant
from tests.support.settable_clock import SettableClock

PURCHASED = "evt.billing.credits.purchased.v1"
UPDATED = "evt.webhook.app.purchase_updated.v1"
PAN = "4111111111111111"


class Till:
    """Handles purchases, as it is told."""

    def __init__(self) -> None:
        self.handled: list[str] = []
        self.error: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def purchased(self, event: Event[CreditsPurchased]) -> None:
        """Take a purchase."""
        await self.open.wait()
        if self.error is not None:
            raise self.error
        self.handled.append(event.data.purchase_id)

    async def updated(self, event: Event[PurchaseUpdated]) -> None:
        """Take a charge's state."""
        if self.error is not None:
            raise self.error
        self.handled.append(f"{event.data.charge_id} {event.data.status}")


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """What is logged, in which no card number may be."""
    with capture_logs() as logs:
        yield logs
    assert PAN not in repr(logs)


@pytest.fixture
def till() -> Till:
    """A till that works."""
    return Till()


@pytest.fixture
def letters(database: Database, till: Till, clock: SettableClock) -> DeadLetters:
    """Letters whose events the till handles."""
    subscriptions = [
        Subscription(CreditsPurchased, till.purchased),
        Subscription(PurchaseUpdated, till.updated),
    ]
    return DeadLetters(database, subscriptions=subscriptions, clock=clock)


def purchase(name: str, **more: object) -> bytes:
    """The body of a purchase."""
    data = {"merchant_id": str(merchant(1)), "purchase_id": name, "credits": 100, **more}
    return orjson.dumps({"event_id": f"e-{name}", "event_type": PURCHASED, "data": data})


async def keep(letters: DeadLetters, payload: bytes, *, subject: str = PURCHASED) -> int:
    """Keep a letter."""
    return await letters.keep(
        subject=subject, payload=payload, headers={}, reason="NOT_FOUND: It is not.", attempts=10
    )


# ---- replay


async def test_a_replay_that_fails_again_says_why_and_leaves_the_letter_open(
    letters: DeadLetters, till: Till, clock: SettableClock
) -> None:
    letter_id = await keep(letters, purchase("p-1"))
    clock.advance(60)
    till.error = ConflictError("It is another.", code="DUPLICATE_TRANSACTION")
    with pytest.raises(ConflictError):
        await letters.replay(letter_id)
    found = await letters.show(letter_id)
    assert found.reason == "DUPLICATE_TRANSACTION: It is another."
    assert (found.attempts, found.resolved_at) == (11, None)
    assert found.replayed_at == clock.now()
    assert found.received_at == clock.now() - timedelta(seconds=60)


async def test_a_bug_in_a_replay_is_told_as_ours(letters: DeadLetters, till: Till) -> None:
    letter_id = await keep(letters, purchase("p-1"))
    till.error = ZeroDivisionError(PAN)
    with pytest.raises(InternalError):
        await letters.replay(letter_id)
    assert "INTERNAL_ERROR" in (await letters.show(letter_id)).reason


async def test_a_handler_that_never_ends_does_not_keep_the_operator(
    letters: DeadLetters, till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "REPLAY_TIMEOUT_S", 0.02)
    letter_id = await keep(letters, purchase("p-1"))
    till.open.clear()
    with pytest.raises(UnavailableError):
        await letters.replay(letter_id)
    assert (await letters.show(letter_id)).reason.startswith("HANDLER_TIMEOUT")


async def test_a_replay_that_succeeds_resolves_the_letter_for_good(
    letters: DeadLetters, till: Till, clock: SettableClock
) -> None:
    letter_id = await keep(letters, purchase("p-1"))
    await letters.replay(letter_id)
    assert till.handled == ["p-1"]
    found = await letters.show(letter_id)
    assert found.resolved_at == found.replayed_at == clock.now()
    assert await letters.listed() == ()
    assert await letters.listed(resolved_too=True) == (found,)
    with pytest.raises(ConflictError) as caught:
        await letters.replay(letter_id)
    assert caught.value.code == "DEAD_LETTER_RESOLVED"
    assert till.handled == ["p-1"]


async def test_what_is_invalid_stays_invalid(letters: DeadLetters, till: Till) -> None:
    letter_id = await keep(letters, purchase("p-1", credits=-5))
    with pytest.raises(InputError):
        await letters.replay(letter_id)
    assert "credits: it is too small" in (await letters.show(letter_id)).reason
    assert till.handled == []


@pytest.mark.parametrize("letter_id", [0, -1, 12345, 2**63, 2**70])
async def test_a_letter_that_is_not_there_is_not_found(
    letters: DeadLetters, letter_id: int
) -> None:
    for call in (letters.show, letters.replay):
        with pytest.raises(NotFoundError) as caught:
            await call(letter_id)
        assert caught.value.code == "DEAD_LETTER_NOT_FOUND"


async def test_a_letter_that_nobody_handles_any_more_says_so(letters: DeadLetters) -> None:
    letter_id = await keep(letters, b"{}", subject="evt.old.v1")
    with pytest.raises(ConflictError) as caught:
        await letters.replay(letter_id)
    assert caught.value.code == "DEAD_LETTER_NO_HANDLER"


async def test_all_open_letters_of_a_subject_are_replayed_oldest_first_each_once(
    letters: DeadLetters, till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "REPLAY_PAGE", 2)
    for n in range(5):
        await keep(letters, purchase(f"p-{n}"))
    await keep(letters, purchase("bad", credits="1"))
    await keep(letters, b"?", subject=UPDATED)
    await letters.replay(1 + (await letters.listed(limit=7))[-1].letter_id)
    done = await letters.replay_all(subject=PURCHASED)
    assert (done.resolved, done.failed) == (4, 1)
    assert till.handled == ["p-1", "p-0", "p-2", "p-3", "p-4"]
    assert [each.subject for each in await letters.listed()] == [UPDATED, PURCHASED]
    done = await letters.replay_all()
    assert (done.resolved, done.failed) == (0, 2)


async def test_one_of_our_own_events_is_resolved_without_an_effect(
    letters: DeadLetters, till: Till
) -> None:
    ours = {"source_service": "glamd", "event_type": PURCHASED, "data": {}}
    letter_id = await keep(letters, orjson.dumps(ours))
    await letters.replay(letter_id)
    assert till.handled == []
    assert await letters.measure() == 0


# ---- what is kept


@pytest.mark.parametrize("number", [PAN, "4111 1111 1111 1111", "4111-1111-1111-1111"])
async def test_a_card_number_is_hidden_and_such_a_letter_is_not_replayed(
    letters: DeadLetters, till: Till, database: Database, number: str
) -> None:
    payload = purchase("p-1", platform=number)
    letter_id = await letters.keep(
        subject=PURCHASED,
        payload=payload,
        headers={"Nats-Msg-Id": number, "Authorization": "Bearer secret"},
        reason=f"WRONG: it is {number}",
        attempts=1,
    )
    row = await database.fetchrow("SELECT * FROM glam.dead_letters WHERE id = $1", letter_id)
    assert row is not None
    assert number not in repr(tuple(row))
    assert row["payload"] == payload.replace(number.encode(), b"[card number]")
    assert row["headers"] == {"Nats-Msg-Id": "[card number]"}
    with pytest.raises(ConflictError) as caught:
        await letters.replay(letter_id)
    assert caught.value.code == "DEAD_LETTER_CHANGED"
    assert till.handled == []


async def test_the_long_numbers_of_shop_platforms_are_no_card_numbers(
    letters: DeadLetters, till: Till
) -> None:
    body = {
        "merchant_id": str(merchant(1)),
        # A good check digit, and no scheme's number.
        "charge_id": 1017262355000,
        "status": "ACTIVE",
    }
    letter_id = await keep(letters, orjson.dumps(body), subject=UPDATED)
    await letters.replay(letter_id)
    assert till.handled == ["1017262355000 active"]


async def test_of_a_huge_payload_the_beginning_is_kept(letters: DeadLetters) -> None:
    # The number lies across the end of what is kept.
    payload = b"x" * (dead_letters.KEPT_BYTES - 8) + PAN.encode() + b"x" * 1_000_000
    found = await letters.show(await keep(letters, payload))
    assert len(found.payload) == dead_letters.KEPT_BYTES
    assert found.payload.endswith(b"x[card nu")


async def test_reasons_are_short_and_ids_are_none_where_there_is_none(
    letters: DeadLetters,
) -> None:
    error = InputError("No.", fields=[FieldError("field", "x" * 300)] * 5)
    letter_id = await letters.keep(
        subject=PURCHASED,
        payload=b"\x00\xff",
        headers={"Nats-Msg-Id": "a b\x00" * 100},
        reason=dead_letters.reason_of(error),
        attempts=1,
    )
    found = await letters.show(letter_id)
    assert len(found.reason) == dead_letters.REASON_CHARS
    assert found.event_id is None
    assert "\x00" not in found.headers["Nats-Msg-Id"]
    assert "payload" not in repr(found)


async def test_letters_are_paged_newest_first(letters: DeadLetters) -> None:
    ids = [await keep(letters, purchase(f"p-{n}")) for n in range(5)]
    first = await letters.listed(limit=3)
    assert [each.letter_id for each in first] == ids[:1:-1]
    rest = await letters.listed(limit=3, before=first[-1].letter_id)
    assert [each.letter_id for each in rest] == ids[1::-1]
    assert await letters.measure() == 5
    for limit in (0, 201):
        with pytest.raises(InputError):
            await letters.listed(limit=limit)


def test_a_reason_names_code_and_fields() -> None:
    plain = GlamError("It is so.", code="SO")
    assert dead_letters.reason_of(plain) == "SO: It is so."
    fields = InputError("No.", fields=[FieldError("a", "is b"), FieldError("c", "is d")])
    assert dead_letters.reason_of(fields) == "VALIDATION_ERROR: No. (a: is b; c: is d)"


async def test_what_was_resolved_goes_after_a_while_and_what_is_open_stays(
    letters: DeadLetters, clock: SettableClock
) -> None:
    resolved, still_open = [await keep(letters, purchase(f"p-{n}")) for n in range(2)]
    await letters.replay(resolved)
    clock.advance(dead_letters.RESOLVED_KEPT.total_seconds())
    assert await letters.purge() == 0
    clock.advance(1)
    assert await letters.purge() == 1
    assert [each.letter_id for each in await letters.listed(limit=10)] == [still_open]
