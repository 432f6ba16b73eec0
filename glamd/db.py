"""PostgreSQL: the pool, its connections, and transactions, with every wait bounded.

No SQL of a capability stands here, and no rule. What the driver raises leaves this file under the
names of `glamd.db_errors`, of which the two that callers look for are here again.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn, TypeAlias, TypeVar
from uuid import UUID

import asyncpg
import orjson
import structlog

from glamd.db_errors import (
    DRIVER_ERRORS,
    ENDING_STATES,
    OutcomeUnknownError,
    UniqueViolationError,
    connect_error,
    translate,
)
from glamd.errors import ConfigError, InternalError, UnavailableError

__all__ = ["Connection", "Database", "OutcomeUnknownError", "Row", "UniqueViolationError"]

T = TypeVar("T")
Row: TypeAlias = asyncpg.Record

VERSION_TABLE: Final = "glamd_schema_version"
"""Alembic's version table, in schema `public` of every server that holds one of our schemas."""

CLIENT_MARGIN_S: Final = 1.0
"""How much longer we wait than the server's own statement timeout."""

ACQUIRE_TIMEOUT_S: Final = 1.0
"""How long a caller waits for a connection; beyond it the excess is told to come again."""

ROLLBACK_TIMEOUT_S: Final = 1.0
"""How long a connection may take to end what was cancelled on it before it is cut."""

CLOSE_TIMEOUT_S: Final = 5.0
IDLE_IN_TRANSACTION_TIMEOUT_S: Final = 30
"""After this the server ends a transaction whose client fell silent, and frees its locks."""

NEVER_RECYCLE: Final = 2**62
"""asyncpg would replace a connection after so many statements; a healthy one may live on."""

log = structlog.get_logger()


class Connection:
    """A connection with bounded calls and translated errors; one task at a time uses it.

    Session state must not be changed on it (`SET LOCAL` is fine, `SET` and `LISTEN` are not), since
    the next user of the pool would inherit it. `timeout_s` shortens or lengthens our own wait; the
    server's statement timeout stays as it was given at `Database.connect`.
    """

    __slots__ = ("_in_transaction", "_raw")

    def __init__(self, raw: asyncpg.Connection | None) -> None:
        self._raw = raw
        self._in_transaction = False

    async def fetch(self, sql: str, *args: object, timeout_s: float | None = None) -> list[Row]:
        """All rows."""
        driver = await self._driver()
        return await self._call(driver, lambda: driver.fetch(sql, *args, timeout=timeout_s))

    async def fetchrow(self, sql: str, *args: object, timeout_s: float | None = None) -> Row | None:
        """The first row, or None."""
        driver = await self._driver()
        return await self._call(driver, lambda: driver.fetchrow(sql, *args, timeout=timeout_s))

    async def fetchval(self, sql: str, *args: object, timeout_s: float | None = None) -> Any:
        """The first column of the first row, or None."""
        driver = await self._driver()
        return await self._call(driver, lambda: driver.fetchval(sql, *args, timeout=timeout_s))

    async def execute(self, sql: str, *args: object, timeout_s: float | None = None) -> str:
        """Run a statement and return its command tag, such as `UPDATE 1`."""
        driver = await self._driver()
        return await self._call(driver, lambda: driver.execute(sql, *args, timeout=timeout_s))

    async def executemany(
        self, sql: str, rows: Iterable[Sequence[object]], *, timeout_s: float | None = None
    ) -> None:
        """Run one statement for each row of arguments, all of them or none."""
        driver = await self._driver()
        await self._call(driver, lambda: driver.executemany(sql, rows, timeout=timeout_s))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator["Connection"]:
        """BEGIN, then COMMIT, or ROLLBACK when the body raises; transactions do not nest."""
        assert not self._in_transaction, "transactions do not nest"
        driver = await self._driver()
        self._in_transaction = True
        try:
            try:
                await self._call(driver, lambda: driver.execute("BEGIN"))
                yield self
            except BaseException:
                await _roll_back(driver)
                raise
            await self._commit(driver)
        finally:
            self._in_transaction = False

    async def _driver(self) -> asyncpg.Connection:
        assert self._raw is not None
        return self._raw

    async def _call(self, driver: asyncpg.Connection, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await call()
        except DRIVER_ERRORS as error:
            _fail(driver, error, commits=not self._in_transaction)

    async def _commit(self, driver: asyncpg.Connection) -> None:
        try:
            tag = await driver.execute("COMMIT")
        except DRIVER_ERRORS as error:
            _fail(driver, error, commits=True)
        if tag != "COMMIT":
            # PostgreSQL answers COMMIT with ROLLBACK when a statement had failed, without an error.
            log.error("transaction_not_committed")
            raise InternalError("The transaction was rolled back.")


class _DedicatedConnection(Connection):
    """A connection outside the pool that is opened at its first use and again whenever it broke."""

    __slots__ = ("_connector",)

    def __init__(self, connector: "_Connector") -> None:
        super().__init__(None)
        self._connector = connector

    async def _driver(self) -> asyncpg.Connection:
        raw = self._raw
        if raw is not None and (self._in_transaction or not raw.is_closed()):
            return raw
        try:
            self._raw = raw = await self._connector.open()
        except DRIVER_ERRORS as error:
            raise translate(error, lost=True) from None
        return raw

    async def close(self) -> None:
        raw, self._raw = self._raw, None
        if raw is None or raw.is_closed():
            return
        try:
            await raw.close(timeout=CLOSE_TIMEOUT_S)
        except DRIVER_ERRORS:
            raw.terminate()


class _Connector:
    """Opens connections that are all alike."""

    def __init__(
        self,
        url: str,
        *,
        statement_timeout_s: float,
        connect_timeout_s: float,
        name: str,
        role: str | None,
    ) -> None:
        self._url = driver_url(url)
        self.connect_timeout_s = connect_timeout_s
        self.options: dict[str, object] = {
            "timeout": connect_timeout_s,
            "command_timeout": statement_timeout_s + CLIENT_MARGIN_S,
            "max_cached_statement_lifetime": 0,
            "server_settings": {
                "application_name": name,
                "timezone": "UTC",
                # Who waits for a lock must see what the one before has committed, also where the
                # server or the login has another default.
                "default_transaction_isolation": "read committed",
                "statement_timeout": str(round(statement_timeout_s * 1000)),
                "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_TIMEOUT_S}s",
                **({} if role is None else {"role": role}),
            },
        }

    async def open(self) -> asyncpg.Connection:
        """Connect and prepare within the connect timeout, or raise the driver's error."""
        async with asyncio.timeout(self.connect_timeout_s):
            raw = await asyncpg.connect(self._url, **self.options)
            try:
                await prepare(raw)
            except BaseException:
                raw.terminate()
                raise
        return raw

    async def open_pool(self, size: int) -> asyncpg.Pool:
        """Make a pool whose first connection stands, so that a wrong URL shows at once."""
        return await asyncpg.create_pool(
            self._url,
            min_size=0,
            init_size=1,
            max_size=size,
            max_queries=NEVER_RECYCLE,
            max_inactive_connection_lifetime=0,
            init=prepare,
            reset=_keep_session,
            **self.options,
        )


class Database:
    """A pool of connections to one server, which heals by itself when the server comes back."""

    def __init__(self, pool: asyncpg.Pool, connector: _Connector) -> None:
        self._pool = pool
        self._connector = connector

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        pool_size: int = 10,
        statement_timeout_s: float = 5.0,
        connect_timeout_s: float = 5.0,
        name: str = "glamd",
        role: str | None = None,
    ) -> "Database":
        """Open the pool with one connection made; UnavailableError or ConfigError without it.

        `url` is a PostgreSQL URL (`postgresql+asyncpg://` is understood too), `name` is what the
        server shows as the application's. `role` is taken on at once (SET ROLE), for a login that
        may do more than it should.
        """
        connector = _Connector(
            url,
            statement_timeout_s=statement_timeout_s,
            connect_timeout_s=connect_timeout_s,
            name=name,
            role=role,
        )
        try:
            async with asyncio.timeout(connect_timeout_s):
                pool = await connector.open_pool(pool_size)
        except DRIVER_ERRORS as error:
            raise connect_error(error) from None
        except ValueError:
            msg = "The database URL cannot be read."
            raise ConfigError(msg) from None
        return cls(pool, connector)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection; each statement on it commits by itself.

        UnavailableError when none is free within ACQUIRE_TIMEOUT_S or the server is away.
        """
        try:
            async with asyncio.timeout(ACQUIRE_TIMEOUT_S):
                raw = await self._pool.acquire()
        except DRIVER_ERRORS as error:
            raise translate(error, lost=True) from None
        try:
            yield Connection(raw)
        finally:
            await self._release(raw)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Lend a connection inside a transaction, committed at the end of the body."""
        async with self.connection() as connection, connection.transaction():
            yield connection

    @asynccontextmanager
    async def dedicated(self) -> AsyncIterator[Connection]:
        """Give a connection of one's own outside the pool, for as long as the body lasts.

        It connects at its first use and reconnects by itself after it broke: the call that found it
        broken fails, the next one runs on a new connection. Never inside a transaction.
        """
        connection = _DedicatedConnection(self._connector)
        try:
            yield connection
        finally:
            await connection.close()

    async def fetch(self, sql: str, *args: object, timeout_s: float | None = None) -> list[Row]:
        """All rows, on a connection of the pool."""
        async with self.connection() as connection:
            return await connection.fetch(sql, *args, timeout_s=timeout_s)

    async def fetchrow(self, sql: str, *args: object, timeout_s: float | None = None) -> Row | None:
        """The first row or None, on a connection of the pool."""
        async with self.connection() as connection:
            return await connection.fetchrow(sql, *args, timeout_s=timeout_s)

    async def fetchval(self, sql: str, *args: object, timeout_s: float | None = None) -> Any:
        """The first column of the first row or None, on a connection of the pool."""
        async with self.connection() as connection:
            return await connection.fetchval(sql, *args, timeout_s=timeout_s)

    async def execute(self, sql: str, *args: object, timeout_s: float | None = None) -> str:
        """Run a statement that commits by itself and return its command tag."""
        async with self.connection() as connection:
            return await connection.execute(sql, *args, timeout_s=timeout_s)

    async def health(self, *, timeout_s: float = 1.0) -> None:
        """Return when the server answers within `timeout_s`; UnavailableError otherwise."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.fetchval("SELECT 1")
        except TimeoutError:
            raise UnavailableError("The database does not answer in time.") from None

    async def schema_revision(self) -> str | None:
        """The revision that the schema is at, or None when nothing was ever migrated."""
        if await self.fetchval("SELECT to_regclass($1)", f"public.{VERSION_TABLE}") is None:
            return None
        revision = await self.fetchval(
            f"SELECT version_num FROM public.{VERSION_TABLE}"  # noqa: S608 - our own constant
        )
        return None if revision is None else str(revision)

    async def close(self) -> None:
        """Wait for lent connections at most CLOSE_TIMEOUT_S, then cut what is left."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    async def _release(self, raw: asyncpg.Connection) -> None:
        try:
            await self._pool.release(raw, timeout=ROLLBACK_TIMEOUT_S)
        except DRIVER_ERRORS:
            # The pool has cut this connection already and makes another when it needs one.
            log.debug("connection_dropped")


def driver_url(url: str) -> str:
    """The URL as asyncpg reads it: without the driver's name that SQLAlchemy's form carries."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme.partition('+')[0]}{separator}{rest}"


async def prepare(raw: asyncpg.Connection) -> None:
    """Give a fresh connection our codecs: `jsonb` by orjson, `uuid` as the standard library's UUID.

    asyncpg's own UUID is a subclass, which orjson refuses wherever it comes to be written.
    """
    await raw.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        format="binary",
        encoder=lambda value: b"\x01" + orjson.dumps(value),
        decoder=lambda data: orjson.loads(data[1:]),  # after the version byte
    )
    await raw.set_type_codec(
        "uuid",
        schema="pg_catalog",
        format="binary",
        encoder=lambda value: value.bytes,
        decoder=lambda data: UUID(bytes=data),
    )


def _fail(driver: asyncpg.Connection, error: Exception, *, commits: bool) -> NoReturn:
    """Raise our error, and cut a connection that the server is about to close.

    After a timeout the driver has asked the server to cancel what runs. The connection stays, so
    that the request gets through; who releases it waits for the server's word, or cuts it.
    """
    ended = getattr(error, "sqlstate", None) in ENDING_STATES
    lost = ended or isinstance(error, OSError) or _is_closed(driver)
    if ended and not _is_closed(driver):
        driver.terminate()
    raise translate(error, lost=lost, commits=commits) from None


def _is_closed(driver: asyncpg.Connection) -> bool:
    try:
        return bool(driver.is_closed())
    except asyncpg.InterfaceError:
        return True  # the pool took it back when it broke


async def _roll_back(driver: asyncpg.Connection) -> None:
    """End a failed transaction; a connection on which even that fails is cut."""
    if _is_closed(driver):
        return
    try:
        async with asyncio.timeout(ROLLBACK_TIMEOUT_S):
            await driver.execute("ROLLBACK")
    except asyncio.CancelledError:
        _cut(driver)
        raise
    except DRIVER_ERRORS:
        _cut(driver)


def _cut(driver: asyncpg.Connection) -> None:
    try:
        driver.terminate()
    except asyncpg.InterfaceError:
        # The pool took it back when it broke; what is lent then refuses everything.
        log.debug("connection_gone_already")


async def _keep_session(_raw: asyncpg.Connection) -> None:
    """Spare the round trip of asyncpg's reset: nobody changes session state (see Connection)."""
