"""Answers that are remembered, so that asking twice has one effect: one row a caller's key.

A request claims its key first, in a statement of its own, and then works. Its answer is written in
the transaction of the effect, through the `Keep` that the capability is handed: what was done and
the answer to it are committed together or not at all. Whoever dies in between holds the claim no
longer than its lease; then the next try takes it over, and the claim's id, which the answer's
statement insists on, keeps the slow one's effect from being committed after all.

Times are the database's own, since several nodes judge one lease and their clocks may differ. The
key itself is not kept, only its hash, and of the body only a MAC under the key, so that a body
cannot be guessed from its row. What an answer looks like, and which requests carry a key, is for
`glamd.http`.
"""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, TypeAlias, TypeVar
from uuid import UUID, uuid4

import structlog
from prometheus_client import Counter

from glamd.batches import in_rounds
from glamd.db import Connection, Database
from glamd.errors import ConflictError, InputError

log = structlog.get_logger()

R = TypeVar("R")

Keep: TypeAlias = Callable[[Connection, R], Awaitable[None]]
"""A capability awaits it once, with its connection and its result, last in its transaction.

What it raises ends that transaction: another request has taken this one's place.
"""

KEPT_FOR: Final = timedelta(hours=24)
LEASE_S: Final = 60.0
"""How long a claim holds without an answer; longer than any handler may run."""

CLAIM_ATTEMPTS: Final = 3
"""A row may go between the claim that met it and the look at it; so often it is tried again."""

RETRY_AFTER_S: Final = 1
PURGE_ROWS: Final = 1_000
PURGE_BATCHES: Final = 50
MAX_SCOPE_CHARS: Final = 512
"""A longer scope is kept as its hash: an index entry has to fit into a page."""

_OUTCOMES = Counter(
    "glamd_idempotency_claims_total", "Requests that came with an idempotency key.", ["outcome"]
)

_CLAIM = """
INSERT INTO glam.idempotency_keys AS kept
       (scope, key_sha256, content_mac, claim, claim_until, expires_at)
VALUES ($1, $2, $3, $4, now() + $5, now() + $6)
ON CONFLICT (scope, key_sha256) DO UPDATE
   SET content_mac = excluded.content_mac, claim = excluded.claim,
       claim_until = excluded.claim_until, status = NULL, answer = NULL,
       expires_at = excluded.expires_at
 WHERE kept.expires_at <= now()
    OR (kept.status IS NULL AND kept.claim_until <= now()
        AND kept.content_mac = excluded.content_mac)
RETURNING true
"""

_LOOK = """
SELECT content_mac, status, answer
  FROM glam.idempotency_keys
 WHERE scope = $1 AND key_sha256 = $2 AND expires_at > now()
"""

_ANSWER = """
UPDATE glam.idempotency_keys
   SET status = $4, answer = $5
 WHERE scope = $1 AND key_sha256 = $2 AND claim = $3 AND status IS NULL
RETURNING true
"""

_RELEASE = """
DELETE FROM glam.idempotency_keys
 WHERE scope = $1 AND key_sha256 = $2 AND claim = $3 AND status IS NULL
"""

_PURGE = """
DELETE FROM glam.idempotency_keys
 WHERE (scope, key_sha256) IN (SELECT scope, key_sha256
                                 FROM glam.idempotency_keys
                                WHERE expires_at <= now()
                                ORDER BY expires_at
                                LIMIT $1
                                  FOR UPDATE SKIP LOCKED)
"""


class KeyReusedError(InputError):
    """The key came before with another body; it stands for one request, and not for this one."""

    default_code = "IDEMPOTENCY_KEY_REUSED"


class InProgressError(ConflictError):
    """A request with this key is at work; its answer will be there in a while."""

    default_code = "IDEMPOTENCY_IN_PROGRESS"
    retry_after_s = RETRY_AFTER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The right to answer one key, for as long as nobody takes it over; its id is the fence."""

    scope: str
    key_sha256: bytes = field(repr=False)
    id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """The answer that was given to this key and this body before."""

    status: int
    answer: object = field(repr=False)


class IdempotencyKeys:
    """The rows of `glam.idempotency_keys`."""

    def __init__(self, database: Database, *, lease_s: float = LEASE_S) -> None:
        self._database = database
        self._lease = timedelta(seconds=lease_s)

    async def claim(self, *, scope: str, key: str, content: bytes) -> Claim | Remembered:
        """Claim this key for the request with this content, or find its answer.

        `scope` is who asks for what. Raises `KeyReusedError`, `InProgressError`,
        `UnavailableError`.
        """
        claim = Claim(scope=_bounded(scope), key_sha256=_sha256(key), id=uuid4())
        where = (claim.scope, claim.key_sha256)
        mac = _mac(key, content)
        async with self._database.connection() as connection:
            for _ in range(CLAIM_ATTEMPTS):
                if await connection.fetchval(_CLAIM, *where, mac, claim.id, self._lease, KEPT_FOR):
                    _OUTCOMES.labels("claimed").inc()
                    return claim
                row = await connection.fetchrow(_LOOK, *where)
                if row is None:
                    continue
                if not hmac.compare_digest(row["content_mac"], mac):
                    _OUTCOMES.labels("reused").inc()
                    raise KeyReusedError("This idempotency key came before with another request.")
                if row["status"] is None:
                    break
                _OUTCOMES.labels("remembered").inc()
                return Remembered(status=row["status"], answer=row["answer"])
        _OUTCOMES.labels("in_progress").inc()
        raise InProgressError("The first request with this idempotency key is still at work.")

    async def answer(
        self, claim: Claim, *, status: int, answer: object, connection: Connection | None = None
    ) -> None:
        """Write the answer, in the transaction of `connection` where there is an effect.

        `answer` is what JSON can hold. Raises `InProgressError` where the claim was taken over.
        """
        where = (claim.scope, claim.key_sha256, claim.id)
        executor = connection or self._database
        if not await executor.fetchval(_ANSWER, *where, status, answer):
            _OUTCOMES.labels("taken_over").inc()
            log.warning("idempotency_claim_taken_over", scope=claim.scope)
            raise InProgressError("Another request with this idempotency key has taken over.")

    async def release(self, claim: Claim) -> None:
        """Give the key back where it has no answer, so that the next try need not wait.

        It waits for a transaction that is just writing the answer, and then leaves that alone.
        Raises `UnavailableError`.
        """
        await self._database.execute(_RELEASE, claim.scope, claim.key_sha256, claim.id)

    async def purge(self) -> int:
        """Delete rows that expired, at most PURGE_ROWS * PURGE_BATCHES; returns how many."""

        async def some() -> int:
            tag = await self._database.execute(_PURGE, PURGE_ROWS)
            return int(tag.rpartition(" ")[2])

        return await in_rounds(some, full=PURGE_ROWS, most=PURGE_BATCHES)


def _bounded(scope: str) -> str:
    if len(scope) <= MAX_SCOPE_CHARS:
        return scope
    return f"sha256:{hashlib.sha256(scope.encode()).hexdigest()}"


def _sha256(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _mac(key: str, content: bytes) -> bytes:
    # HMAC hashes a key longer than its block with SHA-256, and that hash stands in the row. Out of
    # SHA-512 the key has the length of the block, so the row never holds what opens its MAC.
    return hmac.digest(hashlib.sha512(key.encode()).digest(), content, "sha256")
