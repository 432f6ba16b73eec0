"""Detokenizing: a worker's look at card data, granted, limited, audited before it is answered.

Every attempt becomes an audit row, whatever comes of it; where the row cannot be written,
nothing is revealed. Who the worker is was settled by mutual TLS before anything gets here.
"""

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

import orjson
import structlog
from prometheus_client import Counter

from glamd.clock import Clock
from glamd.db import Database
from glamd.errors import (
    CryptoError,
    ForbiddenError,
    GlamError,
    GoneError,
    InternalError,
    NotFoundError,
    RateLimitedError,
)
from glamd.journal import Journal
from glamd.keys.keyrings import DataKey, Keyring
from glamd.payments import store
from glamd.payments.audit import Audit
from glamd.payments.audit_chain import AuditEntry
from glamd.payments.cipher import associated_data, sensitive_associated_data
from glamd.payments.model import SENSITIVE_FIELDS, Grant, Look, PaymentToken, SealedToken

log = structlog.get_logger()
_LOOKS = Counter("glamd_payments_looks_total", "Attempts to detokenize, by outcome.", ["outcome"])
_AUTHORIZED = Counter(
    "glamd_payments_authorized_total", "Reports that a payment is authorized.", ["outcome"]
)
_DAMAGED = Counter("glamd_payments_damaged_tokens_total", "Ciphertexts that did not open.")
BURST_S: Final = 1.0
"""Seconds of its rate that a worker may use at once."""

DAMAGED: Final = "CIPHERTEXT_DAMAGED"
"""How the audit tells a ciphertext that is not what was sealed there from other faults of ours."""

Clear = dict[str, str | None]
Action = Literal["decrypt", "authorized"]


Find = Callable[[str], Awaitable[SealedToken | None]]

LOOK_UP_BATCH_LIMIT: Final = 128


def look_ups(database: Database) -> Journal[str, SealedToken | None]:
    """Reads tokens' rows; its `submit` is what a Detokenizer finds them by.

    Those that wait at one moment are read in one statement: each by itself cost a fifth of the
    daemon's time.
    """
    return Journal(
        name="looks",
        database=database,
        commit=store.sealed,
        connections=1,
        batch_limit=LOOK_UP_BATCH_LIMIT,
    )


class _DamagedError(InternalError):
    """A ciphertext that does not verify in its row; to the worker it is any fault of ours."""


@dataclass(slots=True)
class _Allowance:
    tokens: float
    at_s: float


class Detokenizer:
    """Opens payment tokens for workers inside their grants."""

    def __init__(
        self,
        database: Database,
        *,
        find: Find,
        audit: Audit,
        keyring: Keyring[DataKey],
        grants: Iterable[Grant],
        clock: Clock,
    ) -> None:
        """`find` reads a token's row, as `look_ups` does."""
        self._database = database
        self._find = find
        self._audit = audit
        self._keyring = keyring
        self._clock = clock
        self._grants: Mapping[str, Grant] = {grant.worker: grant for grant in grants}
        self._allowances: dict[str, _Allowance] = {}

    def replace_grants(self, grants: Iterable[Grant]) -> None:
        """Hold every look from now on to these grants.

        What a worker has used up of its rate stays used up.
        """
        self._grants = {grant.worker: grant for grant in grants}
        self._allowances = {
            worker: allowance
            for worker, allowance in self._allowances.items()
            if worker in self._grants
        }

    @property
    def grants(self) -> tuple[Grant, ...]:
        """The grants in force, by worker."""
        return tuple(self._grants[worker] for worker in sorted(self._grants))

    async def decrypt(self, look: Look) -> Clear:
        """The fields asked for, by name; `None` for what the card did not have.

        Raises ForbiddenError outside the worker's grant, RateLimitedError over its rate,
        NotFoundError `TOKEN_NOT_FOUND`, GoneError `TOKEN_EXPIRED` or `TOKEN_REVOKED`,
        InternalError where what is stored is not what was sealed, and UnavailableError where the
        token or its audit row is out of reach.
        """
        try:
            clear = await self._open(look)
        except Exception as error:
            await self._record(look, "decrypt", _outcome(error))
            raise
        await self._record(look, "decrypt", "ok")
        return clear

    async def authorized(self, look: Look) -> PaymentToken:
        """Erase the token's sensitive authentication data now, since its payment is authorized.

        PAN and expiry stay. Repeatable; `fields` and `purpose` of the look are not judged, any
        grant for the token's merchant will do. Errors as `decrypt`; where the audit row is out of
        reach the data is gone all the same, and the worker reports again.
        """
        try:
            token = await self._erase(look)
        except Exception as error:
            await self._record(look, "authorized", _outcome(error))
            raise
        await self._record(look, "authorized", "ok")
        return token

    async def refused(self, look: Look, code: str, *, action: Action = "decrypt") -> None:
        """Audit an attempt that was refused with `code` before it could be judged here.

        Raises UnavailableError where the audit row is out of reach.
        """
        await self._record(look, action, code)

    async def _open(self, look: Look) -> Clear:
        grant = self._granted(look)
        self._take(grant)
        found = await self._living(grant, look.token)
        try:
            key = await self._keyring.version(found.key_version)
        except CryptoError:
            # Re-encrypted since it was read, and the version it had then destroyed.
            version = found.key_version
            found = await self._living(grant, look.token)
            if found.key_version == version:
                raise
            key = await self._keyring.version(found.key_version)
        return _fields(key, found, look)

    async def _erase(self, look: Look) -> PaymentToken:
        grant = self._grants.get(look.worker)
        if grant is None:
            raise ForbiddenError("The worker has no grant.")
        self._take(grant)
        await self._living(grant, look.token)
        erased = await store.authorize(self._database, look.token, self._clock.now())
        if erased is None:
            # It ended in between; what it ended as is the answer.
            await self._living(grant, look.token)
            raise GoneError("The payment token has expired.", code="TOKEN_EXPIRED")
        return erased

    async def _living(self, grant: Grant, token: str) -> SealedToken:
        """The token's row, if the grant reaches it and it has not ended."""
        found = await self._find(token)
        if found is None:
            raise NotFoundError("There is no such payment token.", code="TOKEN_NOT_FOUND")
        if grant.merchants and found.merchant_id not in grant.merchants:
            raise ForbiddenError("The worker has no grant for this merchant.")
        if found.status == "revoked":
            raise GoneError("The payment token was revoked.", code="TOKEN_REVOKED")
        if found.expires_at <= self._clock.now() or not found.ciphertext:
            raise GoneError("The payment token has expired.", code="TOKEN_EXPIRED")
        return found

    def _granted(self, look: Look) -> Grant:
        grant = self._grants.get(look.worker)
        if grant is None:
            raise ForbiddenError("The worker has no grant.")
        if look.purpose not in grant.purposes:
            raise ForbiddenError("The worker has no grant for this purpose.")
        if not grant.fields.issuperset(look.fields):
            raise ForbiddenError("The worker has no grant for all of these fields.")
        return grant

    def _take(self, grant: Grant) -> None:
        now_s = self._clock.monotonic_s()
        limit = max(1.0, grant.rate_per_s * BURST_S)
        allowance = self._allowances.setdefault(grant.worker, _Allowance(limit, now_s))
        earned = (now_s - allowance.at_s) * grant.rate_per_s
        allowance.tokens = min(limit, allowance.tokens + earned)
        allowance.at_s = now_s
        if allowance.tokens < 1.0:
            raise RateLimitedError(
                "The worker looks more often than its grant allows.",
                retry_after_s=math.ceil((1.0 - allowance.tokens) / grant.rate_per_s),
            )
        allowance.tokens -= 1.0

    async def _record(self, look: Look, action: Action, outcome: str) -> None:
        await self._audit.append(
            AuditEntry(
                action=action,
                actor=look.worker,
                certificate_sha256=look.certificate_sha256,
                ip=look.ip,
                subject=look.token,
                fields=look.fields,
                purpose=look.purpose,
                outcome=outcome,
                correlation_id=look.correlation_id,
            )
        )
        if outcome == DAMAGED:
            _DAMAGED.inc()
            log.error("token_damaged", token=look.token)
        (_LOOKS if action == "decrypt" else _AUTHORIZED).labels(outcome).inc()


def _outcome(error: Exception) -> str:
    if isinstance(error, _DamagedError):
        return DAMAGED
    # What nobody foresaw was an attempt all the same.
    return error.code if isinstance(error, GlamError) else InternalError.default_code


def _fields(key: DataKey, found: SealedToken, look: Look) -> Clear:
    """The fields asked for; no ciphertext is opened of which none is."""
    wanted = frozenset(look.fields)
    clear: Clear = {}
    if wanted - SENSITIVE_FIELDS:
        place = associated_data(look.token, key.version)
        clear |= _unsealed(key, found.ciphertext, place)
    if wanted & SENSITIVE_FIELDS and found.sensitive_ciphertext is not None:
        place = sensitive_associated_data(look.token, key.version)
        clear |= _unsealed(key, found.sensitive_ciphertext, place)
    return {field: clear.get(field) for field in look.fields}


def _unsealed(key: DataKey, ciphertext: bytes, place: bytes) -> Clear:
    """What was sealed at this place, by field; _DamagedError where it is not what was sealed."""
    try:
        packed = key.sealer.open_sealed(ciphertext, associated_data=place)
    except CryptoError as error:
        raise _DamagedError("The token's ciphertext does not open.") from error
    card: Clear | None = None
    # The error would hold the whole card, so it is left behind and ours raised outside of it.
    with suppress(orjson.JSONDecodeError):
        card = orjson.loads(packed)
    packed[:] = bytes(len(packed))
    if not isinstance(card, dict):
        raise _DamagedError("The token's ciphertext holds no card.")
    return card
