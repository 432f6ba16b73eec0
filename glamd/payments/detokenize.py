"""Detokenizing: a worker's look at card data, granted, limited, audited before it is answered.

Every attempt becomes an audit row, whatever comes of it; where the row cannot be written,
nothing is revealed. Who the worker is was settled by mutual TLS before anything gets here.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import orjson
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
from glamd.keys.keyrings import DataKey, Keyring
from glamd.payments import store
from glamd.payments.audit import Audit
from glamd.payments.audit_chain import AuditEntry
from glamd.payments.cipher import associated_data
from glamd.payments.model import Grant, Look

_LOOKS = Counter("glamd_payments_looks_total", "Attempts to detokenize, by outcome.", ["outcome"])
BURST_S: Final = 1.0
"""Seconds of its rate that a worker may use at once."""


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
        audit: Audit,
        keyring: Keyring[DataKey],
        grants: Iterable[Grant],
        clock: Clock,
    ) -> None:
        self._database = database
        self._audit = audit
        self._keyring = keyring
        self._clock = clock
        self._grants: Mapping[str, Grant] = {grant.worker: grant for grant in grants}
        self._allowances: dict[str, _Allowance] = {}

    async def decrypt(self, look: Look) -> dict[str, str | None]:
        """The fields asked for, by name; `None` for what the card did not have.

        Raises ForbiddenError outside the worker's grant, RateLimitedError over its rate,
        NotFoundError `TOKEN_NOT_FOUND`, GoneError `TOKEN_EXPIRED` or `TOKEN_REVOKED`, and
        UnavailableError where the token or its audit row is out of reach.
        """
        try:
            clear = await self._open(look)
        except Exception as error:
            # What nobody foresaw was an attempt all the same.
            known = error if isinstance(error, GlamError) else InternalError("unforeseen")
            await self._record(look, known.code)
            raise
        await self._record(look, "ok")
        return clear

    async def refused(self, look: Look, code: str) -> None:
        """Audit an attempt that was refused with `code` before it could be judged here.

        Raises UnavailableError where the audit row is out of reach.
        """
        await self._record(look, code)

    async def _open(self, look: Look) -> dict[str, str | None]:
        grant = self._granted(look)
        self._take(grant)
        found = await store.sealed(self._database, look.token)
        if found is None:
            raise NotFoundError("There is no such payment token.", code="TOKEN_NOT_FOUND")
        merchant_id, status, expires_at, ciphertext, version = found
        if grant.merchants and merchant_id not in grant.merchants:
            raise ForbiddenError("The worker has no grant for this merchant.")
        if status == "revoked":
            raise GoneError("The payment token was revoked.", code="TOKEN_REVOKED")
        if expires_at <= self._clock.now() or ciphertext is None:
            raise GoneError("The payment token has expired.", code="TOKEN_EXPIRED")
        assert version is not None  # it stands beside the ciphertext
        key = await self._keyring.version(version)
        card = _unsealed(key, ciphertext, token=look.token)
        return {field: card.get(field) for field in look.fields}

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

    async def _record(self, look: Look, outcome: str) -> None:
        await self._audit.append(
            AuditEntry(
                action="decrypt",
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
        _LOOKS.labels(outcome).inc()


def _unsealed(key: DataKey, ciphertext: bytes, *, token: str) -> dict[str, str | None]:
    """What was sealed of the card, by field; InternalError where it is not what was sealed."""
    try:
        packed = key.sealer.open_sealed(
            ciphertext, associated_data=associated_data(token, key.version)
        )
    except CryptoError as error:
        raise InternalError("The token's ciphertext does not open.") from error
    card: dict[str, str | None] | None = None
    # The error would hold the whole card, so it is left behind and ours raised outside of it.
    with suppress(orjson.JSONDecodeError):
        card = orjson.loads(packed)
    packed[:] = bytes(len(packed))
    if not isinstance(card, dict):
        raise InternalError("The token's ciphertext holds no card.")
    return card
