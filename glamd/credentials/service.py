"""Storing, reading and deleting platform tokens, each with its access-log row in one transaction.

Who may do it is decided above. How a token is renewed is not known here, only that somebody may be
asked to before an expired one is read. No secret leaves in anything but a `Reading`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, TypeAlias
from uuid import UUID

import structlog
from prometheus_client import Counter

from glamd.batches import in_rounds
from glamd.clock import Clock
from glamd.credentials import sealing, store
from glamd.credentials.model import (
    Access,
    Accessor,
    Action,
    Health,
    NewToken,
    OpenToken,
    Platform,
    Reading,
    Secret,
    ShopConnection,
)
from glamd.credentials.refusals import Refusal, Refusals
from glamd.credentials.store import SealedToken, TokenLook, Touched
from glamd.db import Database
from glamd.errors import (
    CryptoError,
    FieldError,
    GlamError,
    InputError,
    NotFoundError,
    UnavailableError,
)
from glamd.idempotency import Keep
from glamd.ids import uuid7
from glamd.keys.keyrings import DataKey, Keyring

RENEW_AHEAD: Final = timedelta(minutes=1)
"""A token with no longer to live than this is renewed before it is handed out."""

RENEW_TIMEOUT_S: Final = 3.0
"""How long a read waits for a renewal before it answers with what there is."""

READ_ATTEMPTS: Final = 3
"""How often a read looks again for a key that another node has just begun to use."""

PAGE_LIMIT: Final = 200
MAX_ACCESS_ID: Final = 2**63 - 1

ACCESS_LOG_KEPT: Final = timedelta(days=400)
"""PCI DSS wants a year of who had access to what (10.5.1); the rest is for whoever looks late."""

PURGE_ROWS: Final = 1000
PURGE_BATCHES: Final = 100

UNDECRYPTABLE: Final = "UNDECRYPTABLE"
"""The error of an access row of a token that could not be opened."""

log = structlog.get_logger()

_ACCESSES = Counter(
    "glamd_credentials_accesses_total",
    "Accesses to platform tokens; of those refused, not each has a row in the log.",
    ["action", "outcome"],
)
_UNDECRYPTABLE = Counter(
    "glamd_credentials_undecryptable_total", "Platform tokens that did not open.", ["platform"]
)

Renew: TypeAlias = Callable[[UUID], Awaitable[bool]]
"""Renews the token with this id; whether the stored one has changed. May raise, and may be
cancelled when it takes too long: what must not be torn is its own to shield."""

_Keys: TypeAlias = Mapping[str, DataKey | CryptoError]
_Found: TypeAlias = tuple[ShopConnection, Secret | CryptoError]


class _KeyNotAtHandError(Exception):
    """A row names a key version that was not looked up before its transaction."""


class PlatformTokens:
    """The vault of platform tokens: one for each merchant and platform."""

    def __init__(
        self,
        database: Database,
        *,
        keyring: Keyring[DataKey],
        clock: Clock,
        renew: Renew | None = None,
    ) -> None:
        self._database = database
        self._keyring = keyring
        self._clock = clock
        self._renew = renew
        self._refusals = Refusals(clock)

    async def store(
        self, new: NewToken, *, accessor: Accessor, keep: Keep[UUID] | None = None
    ) -> UUID:
        """Store the token in place of the merchant's former one of this platform; its id.

        The id and the access counters stay through a replacement; what is known of refreshes goes.
        UnavailableError; what `keep` raises, after which nothing is stored.
        """
        token_id, key_version = await sealing.with_usable_key(
            self._keyring, lambda: self._store(new, accessor, keep)
        )
        _count("store")
        log.info(
            "platform_token_stored",
            token_id=str(token_id),
            merchant_id=str(new.merchant_id),
            platform=new.platform,
            key_version=key_version,
        )
        return token_id

    async def _store(
        self, new: NewToken, accessor: Accessor, keep: Keep[UUID] | None
    ) -> tuple[UUID, str]:
        now = self._clock.now()
        ciphertext, key_version = sealing.seal(self._keyring, new.secret, new)
        async with self._database.transaction() as connection:
            token_id = await store.put(
                connection,
                new,
                token_id=uuid7(now),
                ciphertext=ciphertext,
                key_version=key_version,
                by=accessor.name,
                at=now,
            )
            await store.log_access(
                connection,
                at=now,
                merchant_id=new.merchant_id,
                platform=new.platform,
                token_id=token_id,
                action="store",
                accessor=accessor,
                error=None,
            )
            if keep is not None:
                await keep(connection, token_id)
        return token_id, key_version

    async def read(
        self, merchant_id: UUID, *, platform: Platform | None, accessor: Accessor
    ) -> Reading:
        """Open the merchant's tokens, of one platform or of all.

        What expires is renewed first, where that succeeds in time. Nothing is returned before the
        access rows are committed. UnavailableError, also where a key must be fetched and its
        provider is away; a token whose key is gone or that does not verify is `undecryptable`.
        """
        renewed = False
        for _ in range(READ_ATTEMPTS):
            looks = await store.look(self._database, merchant_id, platform)
            if not renewed:
                await self._renew_due(looks)
                renewed = True
            # Keys are fetched before the transaction: whoever holds a connection of the pool must
            # not wait for another one.
            keys = await self._keys(one.key_version for one in looks)
            try:
                return await self._read(merchant_id, platform, keys, accessor)
            except _KeyNotAtHandError:
                continue
        raise UnavailableError("The tokens are being sealed anew; ask again.")

    async def delete(self, merchant_id: UUID, platform: Platform, *, accessor: Accessor) -> bool:
        """Delete the token for good; whether there was one. UnavailableError."""
        async with self._database.transaction() as connection:
            token_id = await store.remove(connection, merchant_id, platform)
            await store.log_access(
                connection,
                at=self._clock.now(),
                merchant_id=merchant_id,
                platform=platform,
                token_id=token_id,
                action="delete",
                accessor=accessor,
                error=None,
            )
        _count("delete")
        log.info(
            "platform_token_deleted",
            token_id=None if token_id is None else str(token_id),
            merchant_id=str(merchant_id),
            platform=platform,
        )
        return token_id is not None

    async def forget(self, merchant_id: UUID, *, accessor: Accessor) -> int:
        """Delete all tokens of a merchant for good; how many there were. UnavailableError."""
        async with self._database.transaction() as connection:
            gone = await store.forget(connection, merchant_id)
            await store.log_accesses(
                connection,
                gone,
                at=self._clock.now(),
                merchant_id=merchant_id,
                action="delete",
                accessor=accessor,
            )
        for _ in gone:
            _count("delete")
        log.info("platform_tokens_forgotten", merchant_id=str(merchant_id), count=len(gone))
        return len(gone)

    async def refused(
        self,
        merchant_id: UUID,
        *,
        action: Action,
        code: str,
        accessor: Accessor,
        platform: Platform | None = None,
    ) -> None:
        """Log an attempt on a merchant's tokens that was refused with `code`; UnavailableError.

        Each is counted, and the first of its kind in a minute has a row; see `refusals`.
        """
        refusal = Refusal(accessor.kind, accessor.name, merchant_id, action, code)
        if self._refusals.is_news(refusal):
            try:
                async with self._database.connection() as connection:
                    await store.log_access(
                        connection,
                        at=self._clock.now(),
                        merchant_id=merchant_id,
                        platform=platform,
                        token_id=None,
                        action=action,
                        accessor=accessor,
                        error=code,
                    )
            except BaseException:
                self._refusals.forget(refusal)
                raise
        _count(action, "refused")

    async def purge(self) -> int:
        """Delete rows of the access log older than ACCESS_LOG_KEPT; how many. UnavailableError.

        At most PURGE_ROWS * PURGE_BATCHES; what is left goes with the next purge.
        """
        before = self._clock.now() - ACCESS_LOG_KEPT

        async def some() -> int:
            return await store.purge_accesses(self._database, before=before, limit=PURGE_ROWS)

        deleted = await in_rounds(some, full=PURGE_ROWS, most=PURGE_BATCHES)
        if deleted:
            log.info("platform_token_accesses_purged", rows=deleted)
        return deleted

    async def connections(
        self,
        *,
        merchant_id: UUID | None = None,
        platform: Platform | None = None,
        health: Health | None = None,
        limit: int = 50,
        after: tuple[UUID, Platform] | None = None,
    ) -> tuple[ShopConnection, ...]:
        """The next connections by merchant and platform that fit what is given.

        `limit` is 1 to 200, otherwise InputError; `after` is the last one of the page before.
        """
        _check_limit(limit)
        return await store.connections(
            self._database,
            merchant_id=merchant_id,
            platform=platform,
            health=health,
            now=self._clock.now(),
            after=after,
            limit=limit,
        )

    async def connection(self, merchant_id: UUID, platform: Platform) -> ShopConnection:
        """A merchant's connection with a platform; NotFoundError PLATFORM_TOKEN_NOT_FOUND."""
        found = await store.connection_by_platform(self._database, merchant_id, platform)
        if found is None:
            raise NotFoundError("There is no such platform token.", code="PLATFORM_TOKEN_NOT_FOUND")
        return found

    async def access_log(
        self, merchant_id: UUID, *, limit: int = 50, before: int | None = None
    ) -> tuple[Access, ...]:
        """A merchant's access log, newest first; `before` is the last `access_id` seen.

        `limit` is 1 to 200, otherwise InputError.
        """
        _check_limit(limit)
        if before is not None:
            before = max(0, min(before, MAX_ACCESS_ID))
        return await store.accesses(self._database, merchant_id, before=before, limit=limit)

    async def _renew_due(self, looks: Iterable[TokenLook]) -> None:
        """Have what expires renewed; whatever comes of it, the read goes on."""
        soon = self._clock.now() + RENEW_AHEAD
        due = [one.token_id for one in looks if _expires_by(one, soon)]
        if self._renew is None or not due:
            return
        try:
            async with asyncio.timeout(RENEW_TIMEOUT_S):
                done = await asyncio.gather(*map(self._renew, due), return_exceptions=True)
        except TimeoutError:
            log.warning("platform_token_renewal_slow", token_ids=[str(one) for one in due])
            return
        for token_id, result in zip(due, done, strict=True):
            if isinstance(result, BaseException):
                log.warning(
                    "platform_token_renewal_failed",
                    token_id=str(token_id),
                    error=type(result).__name__,
                    code=result.code if isinstance(result, GlamError) else None,
                )

    async def _keys(self, versions: Iterable[str]) -> _Keys:
        """The key of each version, or why there is none; UnavailableError."""
        # A renewal seals under the active key, whatever the row named before.
        keys: dict[str, DataKey | CryptoError] = {
            self._keyring.active.version: self._keyring.active
        }
        for version in versions:
            if version not in keys:
                try:
                    keys[version] = await self._keyring.version(version)
                except CryptoError as error:
                    keys[version] = error
        return keys

    async def _read(
        self, merchant_id: UUID, platform: Platform | None, keys: _Keys, accessor: Accessor
    ) -> Reading:
        now = self._clock.now()
        async with self._database.transaction() as connection:
            sealed = await store.touch(connection, merchant_id, platform, by=accessor.name, at=now)
            found = [(one.connection, _opened(one, keys)) for one in sealed]
            await store.log_accesses(
                connection,
                _touched(found) or (Touched(platform=platform, token_id=None),),
                at=now,
                merchant_id=merchant_id,
                action="read",
                accessor=accessor,
            )
        _report(merchant_id, found, accessor)
        return Reading(
            tokens=tuple(
                OpenToken(connection, secret)
                for connection, secret in found
                if isinstance(secret, Secret)
            ),
            undecryptable=tuple(
                connection.platform
                for connection, secret in found
                if not isinstance(secret, Secret)
            ),
        )


def _expires_by(one: TokenLook, soon: datetime) -> bool:
    return one.refreshable and one.expires_at is not None and one.expires_at <= soon


def _opened(sealed: SealedToken, keys: _Keys) -> Secret | CryptoError:
    """The secret, or why there is none."""
    connection = sealed.connection
    key = keys.get(connection.key_version)
    if key is None:
        raise _KeyNotAtHandError
    if isinstance(key, CryptoError):
        return key
    try:
        return sealing.open_under(key, sealed.ciphertext, connection)
    except CryptoError as error:
        return error


def _touched(found: Sequence[_Found]) -> tuple[Touched, ...]:
    return tuple(
        Touched(
            platform=connection.platform,
            token_id=connection.token_id,
            error=None if isinstance(secret, Secret) else UNDECRYPTABLE,
        )
        for connection, secret in found
    )


def _report(merchant_id: UUID, found: Sequence[_Found], accessor: Accessor) -> None:
    """Count and log what was read, once it is committed."""
    for connection, secret in found:
        if isinstance(secret, Secret):
            _count("read")
            continue
        _count("read", "undecryptable")
        _UNDECRYPTABLE.labels(connection.platform).inc()
        log.error(
            "platform_token_undecryptable",
            token_id=str(connection.token_id),
            merchant_id=str(merchant_id),
            platform=connection.platform,
            key_version=connection.key_version,
            reason=secret.message,
        )
    if not found:
        _count("read")
    log.info(
        "platform_token_read",
        merchant_id=str(merchant_id),
        token_ids=[str(connection.token_id) for connection, _ in found],
        by=accessor.name,
    )


def _count(action: Action, outcome: str = "success") -> None:
    _ACCESSES.labels(action, outcome).inc()


def _check_limit(limit: int) -> None:
    if not 1 <= limit <= PAGE_LIMIT:
        raise InputError(
            "The limit is out of range.", fields=(FieldError("limit", f"it is 1 to {PAGE_LIMIT}"),)
        )
