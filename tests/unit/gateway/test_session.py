"""The device session between a store that a test can move under it and a real DUKPT actor.

The store keeps what the database would: counters with a version, and answers by id. What the
statements do to real tables is `tests/integration/test_vault.py`'s.
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import cast
from uuid import UUID

import orjson
import pytest
from structlog.testing import capture_logs

from device_gateway import session, wire
from device_gateway.session import RECENT_LIMIT, SessionParts, Uplink
from glamd.actor import Ref, System
from glamd.actor.testing import VirtualClock, run_virtual
from glamd.clock import Clock
from glamd.crypto import dukpt
from glamd.crypto.aead import Sealer
from glamd.crypto.dukpt import Dukpt, Profile
from glamd.db import Connection, Database, Row
from glamd.errors import CryptoError, UnavailableError
from glamd.journal import Journal
from glamd.keys.key_sets.service import DeviceKey
from glamd.payments import cipher
from glamd.payments.counter import CounterWindow
from glamd.payments.model import IDEMPOTENCY_TTL, Spend
from glamd.payments.vault import Vault

DEVICE = "dev_1"
MERCHANT = UUID(int=7)
PROFILE = Profile(scheme="aes-dukpt")
BDK = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
KSN = bytes.fromhex("123456781234567800000000")
KEY_ID = dukpt.initial_key_id("aes-dukpt", KSN)
TRACK = b";4242424242424242=49122010000?"
COUNTERS = [n for n in range(1, 200) if dukpt.valid_counter("aes-dukpt", n)]

Fields = dict[str, object]


class Store(Database):
    """One device's rows in memory, with the version check of the real statement."""

    def __init__(self) -> None:
        self.record: dict[str, object] | None = {
            "merchant_id": MERCHANT,
            "status": "active",
            "key_set": "set",
            "key_set_status": "active",
            "scheme": "aes-dukpt",
            "counter_window": 64,
            "initial_ksn": KSN,
            "initial_key_id": KEY_ID,
            "counter_id": 1,
            "version": 0,
            "highest": 0,
            "seen": b"",
            "token_ttl_s": None,
            "sensitive_data": "drop",
        }
        self.answers: dict[str, tuple[bytes, bytes, datetime]] = {}
        self.reads = 0
        self.lookups = 0
        self.firmware: list[object] = []
        self.away = False
        self.before_commit: list[Callable[[Spend], object]] = []
        """Done one by one, each before a commit: what another gateway does meanwhile."""
        self.loses_outcomes = False
        self.usable_key = "v1"

    @asynccontextmanager
    async def dedicated(self) -> AsyncIterator[Connection]:
        """A connection to nowhere."""
        yield Connection(None)

    async def fetchrow(self, sql: str, *args: object, timeout_s: float | None = None) -> Row | None:
        """The device's record, or the stored answer of an id."""
        del sql, timeout_s
        if self.away:
            raise UnavailableError("The database is not available.")
        if len(args) == 1:
            self.reads += 1
            return None if self.record is None else dict(self.record)
        self.lookups += 1
        found = self.answers.get(cast("str", args[1]))
        if found is None or found[2] <= cast("datetime", args[2]):
            return None
        return {"content_hash": found[0], "answer": found[1]}

    async def execute(self, sql: str, *args: object, timeout_s: float | None = None) -> str:
        """The only statement that a session runs itself: the firmware of its device."""
        del sql, timeout_s
        self.firmware.append(args[1])
        return "UPDATE 1"

    async def commit(self, _connection: Connection, spends: Sequence[Spend]) -> Sequence[bool]:
        """Apply each spend whose version still holds."""
        if self.before_commit:
            self.before_commit.pop(0)(spends[0])
        if self.away:
            raise UnavailableError("The database is not available.")
        applied = [self.apply(spend) for spend in spends]
        if self.loses_outcomes:
            raise UnavailableError("Whether the database stored it is not known.")
        return applied

    def apply(self, spend: Spend) -> bool:
        """What the statement does with one spend."""
        assert self.record is not None
        if spend.counter_version != self.record["version"]:
            return False
        if spend.issued is not None and spend.issued.card.key_version != self.usable_key:
            return False
        self.move(spend.window)
        ends = spend.at + IDEMPOTENCY_TTL
        self.answers[spend.request_id] = (spend.content_hash, spend.answer, ends)
        return True

    def move(self, window: CounterWindow) -> None:
        """Set the counters, as any gateway does: with a new version."""
        assert self.record is not None
        version = cast("int", self.record["version"]) + 1
        self.record |= {"version": version, "highest": window.highest, "seen": window.seen_bytes()}

    def elsewhere(self, counter: int) -> None:
        """Another gateway spends a counter."""
        self.move(self.window.spend(counter))

    @property
    def window(self) -> CounterWindow:
        """What is spent."""
        assert self.record is not None
        highest, seen = cast("int", self.record["highest"]), cast("bytes", self.record["seen"])
        return CounterWindow.load(size_bits=64, highest=highest, seen=seen)


class Provider:
    """Derives the initial key, or fails, or hangs, as it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.fails: Exception | None = None
        self.hangs = False

    async def initial_key(self, key_set: str, ksn: bytes) -> DeviceKey:
        """The key of `KSN`."""
        assert (key_set, ksn) == ("set", KSN)
        self.asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.fails is not None:
            raise self.fails
        return DeviceKey(PROFILE, "generic", dukpt.initial_key("aes-dukpt", BDK, ksn))


class Stage:
    """A session's address and everything that stands around it."""

    def __init__(self, clock: Clock) -> None:
        self.store = Store()
        self.provider = Provider()
        self.vault = Vault(self.store, connections=1, batch_limit=16)
        self.vault.journal = Journal(
            name="test", database=self.store, commit=self.store.commit, connections=1
        )
        self.system = System(clock=clock)
        sealer = Sealer(bytes(32))
        self.active = "v1"
        self.reloads = 0
        self.reload_fails: Exception | None = None
        parts = SessionParts(
            database=self.store,
            vault=self.vault,
            system=self.system,
            cipher=cipher.spec(
                initial_key=self.provider.initial_key,
                active_key=lambda: (self.active, sealer),
                fingerprint_key=bytes(32),
            ),
            clock=clock,
            default_ttl=timedelta(hours=24),
            rate_per_s=1.0,
            rate_burst=60.0,
            reload_keys=self._reload_keys,
        )
        self.ref: Ref[Uplink, bytes | None] = self.system.ref(session.spec(parts), DEVICE)
        key = dukpt.initial_key("aes-dukpt", BDK, KSN)
        self._terminal = Dukpt(PROFILE, key, KEY_ID)

    async def _reload_keys(self) -> None:
        """What another node made of the keys becomes known here."""
        self.reloads += 1
        if self.reload_fails is not None:
            raise self.reload_fails
        self.active = self.store.usable_key

    def request(self, number: int, *, request_id: str | None = None) -> bytes:
        """The tap with the `number`th counter."""
        counter = COUNTERS[number]
        return orjson.dumps(
            {
                "v": 1,
                "id": request_id or f"r{number}",
                "type": "tokenize",
                "ksn": dukpt.ksn_with_counter("aes-dukpt", KEY_ID, counter).hex(),
                "data": base64.b64encode(self._terminal.encrypt(counter, TRACK)).decode(),
                "scheme": "aes-dukpt",
                "format": "track2",
                "entry_mode": "magstripe",
            }
        )

    async def ask(self, payload: bytes) -> Fields:
        """The session's answer."""
        answer = await self.ref.ask(Uplink("request", payload), timeout_s=30.0)
        assert answer is not None
        fields: Fields = orjson.loads(answer)
        return fields

    async def tap(self, number: int) -> Fields:
        """The answer to the tap with the `number`th counter."""
        return await self.ask(self.request(number))


@asynccontextmanager
async def staged(clock: Clock) -> AsyncIterator[Stage]:
    """A stage whose journal runs, drained at the end."""
    stage = Stage(clock)
    await stage.vault.journal.start()
    try:
        yield stage
    finally:
        await stage.system.drain(1.0)
        await stage.vault.journal.stop(1.0)


def in_virtual_time(scenario: Callable[[Stage, VirtualClock], Awaitable[None]]) -> None:
    """Play a scenario in which no real time passes."""

    async def main(clock: VirtualClock) -> None:
        async with staged(clock) as stage:
            await scenario(stage, clock)

    run_virtual(main)


def code(answer: Fields) -> object:
    """`ok`, or the error's code."""
    return answer.get("code", answer["status"])


# ---- when something is away


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (UnavailableError("The key provider does not answer in time."), "UNAVAILABLE"),
        # A key that does not unwrap is our fault, and for somebody here to mend.
        (CryptoError("the wrapped key does not open"), "INTERNAL"),
    ],
)
def test_without_the_devices_key_nothing_is_spent_and_the_resend_succeeds(
    failure: Exception, expected: str
) -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        stage.provider.fails = failure
        refused = await stage.tap(0)
        assert (refused["code"], refused["retryable"]) == (expected, True)
        assert "key" not in str(refused["message"])
        assert stage.store.answers == {}
        assert stage.store.window.seen == 0
        stage.provider.fails = None
        answer = await stage.tap(0)
        assert (code(answer), answer["replayed"]) == ("ok", False)

    in_virtual_time(scenario)


def test_a_key_provider_that_hangs_is_not_waited_for_for_ever() -> None:
    async def scenario(stage: Stage, clock: VirtualClock) -> None:
        stage.provider.hangs = True
        assert code(await stage.tap(0)) == "UNAVAILABLE"
        assert clock.monotonic_s() <= session.CIPHER_TIMEOUT_S + 1
        assert stage.store.answers == {}

    in_virtual_time(scenario)


def test_a_commit_whose_outcome_is_unknown_is_unavailable_and_found_by_the_resend() -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        assert code(await stage.tap(0)) == "ok"
        stage.store.loses_outcomes = True
        assert code(await stage.tap(1)) == "UNAVAILABLE"
        stage.store.loses_outcomes = False
        again = await stage.tap(1)
        assert (code(again), again["replayed"]) == ("ok", True)
        # What was learnt is where to go on from.
        assert code(await stage.tap(2)) == "ok"
        assert code(await stage.ask(stage.request(1, request_id="x"))) == "KSN_REPLAYED"

    in_virtual_time(scenario)


def test_with_the_database_away_nothing_is_decided_from_memory_alone() -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        assert code(await stage.tap(0)) == "ok"
        stage.store.away = True
        assert code(await stage.tap(1)) == "UNAVAILABLE"
        assert code(await stage.tap(2)) == "UNAVAILABLE"
        stage.store.away = False
        assert code(await stage.tap(1)) == "ok"
        assert sorted(stage.store.answers) == ["r0", "r1"]

    in_virtual_time(scenario)


def test_a_device_that_is_not_there_is_looked_for_again_with_its_next_request() -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        record, stage.store.record = stage.store.record, None
        assert code(await stage.tap(0)) == "DEVICE_UNKNOWN"
        stage.store.record = record
        assert code(await stage.tap(0)) == "ok"

    in_virtual_time(scenario)


# ---- another gateway


def test_a_decision_that_another_gateway_overtook_is_made_again_on_what_holds_now() -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        assert code(await stage.tap(0)) == "ok"
        stage.store.before_commit = [lambda _: stage.store.elsewhere(COUNTERS[50])]
        assert code(await stage.tap(1)) == "ok"
        window = stage.store.window
        assert window.highest == COUNTERS[50]
        assert all(window.refusal(COUNTERS[n]) == "KSN_REPLAYED" for n in (0, 1, 50))
        assert stage.store.reads == 2

    in_virtual_time(scenario)


def test_a_counter_that_another_gateway_spent_meanwhile_is_replayed_and_has_no_token() -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        stage.store.before_commit = [lambda _: stage.store.elsewhere(COUNTERS[1])]
        assert code(await stage.tap(1)) == "KSN_REPLAYED"
        assert stage.store.answers == {}

    in_virtual_time(scenario)


def test_a_request_that_another_gateway_answered_meanwhile_gets_that_answer() -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        theirs = wire.encode_plain_ok("r1")
        stage.store.before_commit = [
            lambda spend: stage.store.apply(replace(spend, answer=theirs)),
        ]
        assert await stage.tap(1) == orjson.loads(theirs) | {"replayed": True}

    in_virtual_time(scenario)


def test_a_device_that_is_served_elsewhere_all_the_time_is_told_to_come_again() -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        others = iter(COUNTERS[10:])
        stage.store.before_commit = [
            lambda _: stage.store.elsewhere(next(others)),
        ] * session.FENCED_LIMIT
        refused = await stage.tap(1)
        assert (refused["code"], refused["retryable"]) == ("UNAVAILABLE", True)
        assert stage.store.answers == {}
        assert code(await stage.tap(1)) == "ok"

    in_virtual_time(scenario)


# ---- a key that another node has taken out of use


def test_a_token_under_a_key_that_was_retired_meanwhile_is_sealed_again_under_the_next() -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        assert code(await stage.tap(0)) == "ok"
        stage.store.usable_key = "v2"
        answer = await stage.tap(1)
        assert (code(answer), stage.reloads) == ("ok", 1)
        assert stage.store.window.highest == COUNTERS[1]
        # The next one knows it from the start.
        assert code(await stage.tap(2)) == "ok"
        assert stage.reloads == 1

    in_virtual_time(scenario)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (UnavailableError("The database is not available."), "UNAVAILABLE"),
        (CryptoError("the keyring payment-tokens has no active version"), "INTERNAL"),
    ],
)
def test_a_key_that_cannot_be_read_anew_spends_nothing_and_the_resend_succeeds(
    failure: Exception, expected: str
) -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        stage.store.usable_key, stage.reload_fails = "v2", failure
        refused = await stage.tap(0)
        assert (refused["code"], refused["retryable"]) == (expected, True)
        assert stage.store.answers == {}
        stage.reload_fails = None
        assert code(await stage.tap(0)) == "ok"

    in_virtual_time(scenario)


def test_a_key_that_is_never_usable_is_asked_for_a_bounded_number_of_times() -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        versions = iter(range(2, 100))
        stage.store.before_commit = [
            lambda _: setattr(stage.store, "usable_key", f"v{next(versions)}"),
        ] * session.FENCED_LIMIT
        refused = await stage.tap(0)
        assert (refused["code"], refused["retryable"]) == ("UNAVAILABLE", True)
        assert stage.reloads == session.FENCED_LIMIT

    in_virtual_time(scenario)


def test_counters_that_another_gateway_moved_are_no_reason_to_read_the_keys() -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        stage.store.before_commit = [lambda _: stage.store.elsewhere(COUNTERS[50])]
        assert code(await stage.tap(1)) == "ok"
        assert stage.reloads == 0

    in_virtual_time(scenario)


# ---- what is kept in memory


def test_only_the_latest_answers_are_kept_in_memory_and_older_ones_are_found_all_the_same() -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        taps = RECENT_LIMIT + 4
        answers = [await stage.tap(number) for number in range(taps)]
        assert stage.store.lookups == 0
        again = [await stage.tap(number) for number in range(taps)]
        assert again == [answer | {"replayed": True} for answer in answers]
        assert stage.store.lookups == 4
        assert stage.store.reads == 1

    in_virtual_time(scenario)


def test_an_answer_in_memory_is_forgotten_when_its_day_is_over() -> None:
    async def scenario(stage: Stage, clock: VirtualClock) -> None:
        assert code(await stage.tap(0)) == "ok"
        # Kept busy, or it would have forgotten everything long before.
        for _ in range(8):
            await clock.pass_s(IDEMPOTENCY_TTL.total_seconds() / 8)
            assert code(await stage.ask(b'{"v":1,"id":"p","type":"ping"}')) == "ok"
        assert code(await stage.tap(0)) == "KSN_REPLAYED"

    in_virtual_time(scenario)


def test_a_quiet_device_is_forgotten_with_its_keys_and_served_again_as_if_it_had_not() -> None:
    async def scenario(stage: Stage, clock: VirtualClock) -> None:
        first = await stage.tap(0)
        assert len(stage.system.stats().actors) == 2
        await clock.pass_s(2 * max(session.IDLE_S, cipher.IDLE_S))
        assert stage.system.stats().actors == ()
        assert await stage.tap(0) == first | {"replayed": True}
        assert code(await stage.ask(stage.request(0, request_id="x"))) == "KSN_REPLAYED"
        assert code(await stage.tap(1)) == "ok"
        assert (stage.store.reads, stage.provider.asked) == (2, 2)

    in_virtual_time(scenario)


def test_a_rate_is_earned_back_in_time_and_what_it_refused_was_not_looked_at() -> None:
    async def scenario(stage: Stage, clock: VirtualClock) -> None:
        for number in range(60):
            assert code(await stage.tap(number)) == "ok"
        refused = await stage.tap(60)
        assert (refused["code"], refused["retryable"], refused["id"]) == (
            "RATE_LIMITED",
            True,
            "r60",
        )
        assert "r60" not in stage.store.answers
        await clock.pass_s(1.0)
        assert code(await stage.tap(60)) == "ok"
        assert code(await stage.tap(61)) == "RATE_LIMITED"

    in_virtual_time(scenario)


def test_a_status_notes_the_firmware_and_a_broken_one_is_only_a_line_in_the_log() -> None:
    async def scenario(stage: Stage, _: VirtualClock) -> None:
        good = b'{"state":"online","firmware":"1.2"}'
        assert await stage.ref.ask(Uplink("status", good), timeout_s=1.0) is None
        with capture_logs() as logs:
            broken = Uplink("status", b'{"state":"4242424242424242"}')
            assert await stage.ref.ask(broken, timeout_s=1.0) is None
        assert stage.store.firmware == ["1.2"]
        (line,) = logs
        assert line["event"] == "device_status_refused"
        assert "4242" not in str(line)

    in_virtual_time(scenario)
