"""The device session: one actor a device, whatever carries its messages.

It holds the device's record and counters in memory, decides what each request may have, and lets
nothing out before it is committed. Requests of one device are served one after the other, which is
what makes the in-memory counters right; that another gateway may have moved them meanwhile shows
when the commit is fenced, and then it reads again and decides again.

No MQTT here, no SQL, and no clear card data: that never leaves the DUKPT actor.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

import structlog
from prometheus_client import Counter

from device_gateway import store, wire
from device_gateway.model import SessionRecord
from glamd.actor import Actor, ActorSpec, System
from glamd.clock import Clock
from glamd.crypto import dukpt
from glamd.db import Database
from glamd.errors import GlamError, InputError, InternalError, RateLimitedError, TransientError
from glamd.payments import cipher
from glamd.payments.counter import CounterWindow
from glamd.payments.model import IDEMPOTENCY_TTL, IssuedToken, SealedCard, Spend
from glamd.payments.vault import Vault, new_token

KIND: Final = "session"
IDLE_S: Final = 300.0
MAILBOX_LIMIT: Final = 64
"""More than a device's receive maximum, so that a full one means that something is wrong."""
CIPHER_TIMEOUT_S: Final = 5.0
RECENT_LIMIT: Final = 16
"""Answers kept in memory; older ones are in the database."""
FENCED_LIMIT: Final = 3
"""How often a request is decided again because another node moved the counters or a key."""

log = structlog.get_logger()
_ANSWERS = Counter("glamd_gateway_answers_total", "Answers to devices, by type and code.", ["code"])
_OK: Final = _ANSWERS.labels("ok")

_FINAL_CODES: Final = frozenset(
    {
        *("MALFORMED", "UNSUPPORTED", "DEVICE_UNKNOWN", "DEVICE_SUSPENDED", "DEVICE_REVOKED"),
        *("KEY_SET_UNKNOWN", "KSN_MISMATCH", "KSN_INVALID", "KSN_REPLAYED", "KSN_TOO_OLD"),
        *("MAC_INVALID", "DECRYPT_FAILED", "REQUEST_ID_REUSED"),
    }
)
"""The errors of spec 2 that stay the same however often the request is sent."""

_STATE_REFUSALS: Final = {
    "suspended": ("DEVICE_SUSPENDED", "the device is suspended"),
    "revoked": ("DEVICE_REVOKED", "the device is revoked"),
}
_KSN_MESSAGES: Final = {
    "KSN_REPLAYED": "the transaction counter was used before",
    "KSN_TOO_OLD": "the transaction counter is behind the window",
}


@dataclass(frozen=True, slots=True, repr=False)
class Uplink:
    """One message of a device, as it came in."""

    channel: Literal["request", "status"]
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionParts:
    """What every session is given."""

    database: Database
    vault: Vault
    system: System
    cipher: ActorSpec[cipher.OpenCard, SealedCard]
    clock: Clock
    default_ttl: timedelta
    rate_per_s: float
    rate_burst: float
    reload_keys: Callable[[], Awaitable[None]]
    """Reads the data keys anew; many sessions may ask at once. CryptoError, UnavailableError."""


class DeviceSession(Actor[Uplink, bytes | None]):
    """Serves one device's messages in order; the reply is the answer's bytes, or None."""

    def __init__(self, device_id: str, parts: SessionParts) -> None:
        self._device_id = device_id
        self._parts = parts
        self._record: SessionRecord | None = None
        self._window = CounterWindow(8)
        self._version = 0
        self._stale = True
        self._firmware: str | None = None
        self._recent: OrderedDict[str, tuple[bytes, bytes, float]] = OrderedDict()
        self._allowance = parts.rate_burst
        self._allowance_at_s = parts.clock.monotonic_s()

    async def receive(self, message: Uplink) -> bytes | None:
        """Serve one message; a request is answered whatever is wrong with it."""
        if message.channel == "status":
            try:
                self._take_allowance()
                await self._status(message.payload)
            except TransientError as error:
                # What it says of itself it will say again; nobody waits for an answer.
                log.info("device_status_passed_over", device_id=self._device_id, code=error.code)
            return None
        request_id: str | None = None
        try:
            request = wire.decode_request(message.payload)
            request_id = request.id
            self._take_allowance()
            record = await self._fresh_record()
            if isinstance(request, wire.Tokenize):
                answer = await self._tokenize(request, record)
            else:
                answer = wire.encode_plain_ok(request.id)
        except GlamError as error:
            if isinstance(error, wire.WireError):
                request_id = error.request_id
            return refusal(request_id, error)
        _OK.inc()
        return answer

    async def _status(self, payload: bytes) -> None:
        try:
            status = wire.decode_status(payload)
        except wire.WireError as error:
            log.warning("device_status_refused", device_id=self._device_id, reason=error.message)
            return
        if status.firmware is not None and status.firmware != self._firmware:
            await store.set_firmware(self._parts.database, self._device_id, status.firmware)
            self._firmware = status.firmware

    def _take_allowance(self) -> None:
        now_s = self._parts.clock.monotonic_s()
        earned = (now_s - self._allowance_at_s) * self._parts.rate_per_s
        self._allowance = min(self._parts.rate_burst, self._allowance + earned)
        self._allowance_at_s = now_s
        if self._allowance < 1.0:
            raise RateLimitedError("the device sends more often than it may")
        self._allowance -= 1.0

    async def _fresh_record(self) -> SessionRecord:
        if self._stale or self._record is None:
            self._record = await store.session_record(self._parts.database, self._device_id)
            if self._record is not None:
                self._window = self._record.window
                self._version = self._record.counter_version
            self._stale = False
        if self._record is None:
            self._stale = True
            raise InputError("the device is not enrolled", code="DEVICE_UNKNOWN")
        if self._record.status != "active":
            code, message = _STATE_REFUSALS[self._record.status]
            raise InputError(message, code=code)
        return self._record

    async def _tokenize(self, request: wire.Tokenize, record: SessionRecord) -> bytes:
        """Decide, seal and commit; decide again while others are faster: a gateway, a rotation."""
        for _ in range(FENCED_LIMIT):
            remembered = self._remembered(request)
            if remembered is not None:
                return remembered
            spend = await self._decide(request, record)
            if isinstance(spend, bytes):
                return spend
            if await self._commit(spend):
                return self._applied(request, spend)
            stored = await self._stored(request)
            if stored is not None:
                return stored
            record = await self._fresh_record()
            if spend.issued is not None and self._version == spend.counter_version:
                # Nobody moved the counters: the key that sealed the token, or the key set, is not
                # usable any more, which another node has decided and this one has not heard of.
                await self._parts.reload_keys()
        raise TransientError("the device is served elsewhere at the same time")

    async def _decide(self, request: wire.Tokenize, record: SessionRecord) -> Spend | bytes:
        """What to commit; or the first answer, where the request had one that is not in memory.

        A request that would be refused without leaving a trace is looked up first: its id is
        judged before its KSN and its MAC (spec 2). One that goes through is judged by the commit.
        """
        parts = self._parts
        try:
            counter = self._counter(request, record)
            token = new_token()
            sealed = await parts.system.ref(parts.cipher, self._device_id).ask(
                cipher.OpenCard(
                    key_set=record.key_set,
                    initial_ksn=record.initial_ksn,
                    counter=counter,
                    data=request.data,
                    mac=request.mac,
                    format=request.format,
                    token=token,
                    merchant_id=record.merchant_id,
                    # What was keyed in has a security code where a track has discretionary data.
                    keep_sensitive=record.keep_sensitive and request.entry_mode != "manual",
                ),
                timeout_s=CIPHER_TIMEOUT_S,
            )
        except TransientError:
            raise
        except GlamError as error:
            if error.code == "DECRYPT_FAILED":
                failed = wire.encode_error(request.id, error.code, error.message, False)
                return self._spend(request, record, counter, answer=failed, at=parts.clock.now())
            stored = await self._stored(request)
            if stored is not None:
                return stored
            raise
        now = parts.clock.now()
        issued = IssuedToken(
            token=token,
            entry_mode=request.entry_mode,
            card=sealed,
            expires_at=now + (record.token_ttl or parts.default_ttl),
        )
        answer = wire.encode_ok(
            request.id,
            token=token,
            brand=sealed.brand,
            last4=sealed.last4,
            exp_month=sealed.exp_month,
            exp_year=sealed.exp_year,
            expires_at=issued.expires_at,
            replayed=False,
        )
        return self._spend(request, record, counter, answer=answer, at=now, issued=issued)

    def _counter(self, request: wire.Tokenize, record: SessionRecord) -> int:
        """The KSN's counter, judged as far as that goes without a key; InputError."""
        if record.key_set_status != "active":
            raise InputError("the device's key set is retired", code="KEY_SET_UNKNOWN")
        scheme = record.scheme
        if (
            request.scheme != scheme
            or dukpt.initial_key_id(scheme, request.ksn) != record.initial_key_id
        ):
            raise InputError("the KSN is not this device's", code="KSN_MISMATCH")
        counter = dukpt.counter_of(scheme, request.ksn)
        if not dukpt.valid_counter(scheme, counter):
            raise InputError("a device never uses this transaction counter", code="KSN_INVALID")
        code = self._window.refusal(counter)
        if code is not None:
            raise InputError(_KSN_MESSAGES[code], code=code)
        return counter

    def _spend(
        self,
        request: wire.Tokenize,
        record: SessionRecord,
        counter: int,
        *,
        answer: bytes,
        at: datetime,
        issued: IssuedToken | None = None,
    ) -> Spend:
        return Spend(
            counter_id=record.counter_id,
            counter_version=self._version,
            window=self._window.spend(counter),
            device_id=self._device_id,
            request_id=request.id,
            content_hash=request.content_hash,
            answer=answer,
            at=at,
            issued=issued,
        )

    async def _commit(self, spend: Spend) -> bool:
        # Until the commit is known to be done, the memory may be behind the database.
        self._stale = True
        return await self._parts.vault.journal.submit(spend)

    def _applied(self, request: wire.Tokenize, spend: Spend) -> bytes:
        self._window = spend.window
        self._version += 1
        self._stale = False
        ends_s = self._parts.clock.monotonic_s() + IDEMPOTENCY_TTL.total_seconds()
        # What orjson returns holds on to a buffer many times its length; a copy does not.
        kept = bytes(memoryview(spend.answer))
        self._recent[request.id] = (request.content_hash, kept, ends_s)
        if len(self._recent) > RECENT_LIMIT:
            self._recent.popitem(last=False)
        return spend.answer

    def _remembered(self, request: wire.Tokenize) -> bytes | None:
        found = self._recent.get(request.id)
        if found is None or found[2] <= self._parts.clock.monotonic_s():
            return None
        return _again(request, found[0], found[1])

    async def _stored(self, request: wire.Tokenize) -> bytes | None:
        found = await self._parts.vault.answer_of(
            self._device_id, request.id, now=self._parts.clock.now()
        )
        return None if found is None else _again(request, found.content_hash, found.answer)


def _again(request: wire.Tokenize, content_hash: bytes, answer: bytes) -> bytes:
    """The first answer once more; InputError `REQUEST_ID_REUSED` where the content differs."""
    if content_hash != request.content_hash:
        raise InputError("the id was used for another request", code="REQUEST_ID_REUSED")
    return wire.as_replayed(answer)


def refusal(request_id: str | None, error: GlamError) -> bytes:
    """The answer that says no, in the contract's words; a device is told nothing of our insides."""
    if isinstance(error, RateLimitedError):
        code, message = "RATE_LIMITED", error.message
    elif isinstance(error, InternalError):
        code, message = "INTERNAL", "something went wrong here; send it again"
    elif isinstance(error, TransientError):
        code, message = "UNAVAILABLE", "not now; send it again"
    elif error.code in _FINAL_CODES:
        code, message = error.code, error.message
    else:
        # Such as a key that does not unwrap: nothing that a device did, or could mend.
        log.error("request_failed", code=error.code, reason=error.message)
        code, message = "INTERNAL", "something went wrong here; send it again"
    _ANSWERS.labels(code).inc()
    return wire.encode_error(request_id, code, message, code not in _FINAL_CODES)


def spec(parts: SessionParts) -> ActorSpec[Uplink, bytes | None]:
    """How the system makes a session; its key is the device id."""
    return ActorSpec(
        kind=KIND,
        factory=lambda device_id: DeviceSession(device_id, parts),
        mailbox_limit=MAILBOX_LIMIT,
        idle_s=IDLE_S,
    )
