"""The one place where the errors of the PostgreSQL driver get our names.

    what leaves `glamd.db`
    ├── UniqueViolationError  (ConflictError)      `constraint` says which; its message does not
    ├── UnusableKeyError      (UnavailableError)   sealed with a key that was retired meanwhile
    ├── OutcomeUnknownError   (UnavailableError)   maybe committed, maybe not: read before you redo
    ├── UnavailableError                           away, starting, full, too slow, deadlocked
    ├── InternalError                              our SQL or our data is wrong; SQLSTATE is logged
    └── ConfigError                                only when connecting first: no such login

Messages and details of the server may quote values of rows, so they are neither logged nor passed
on, not even as an exception's cause. Nothing here talks to the server.
"""

import asyncio
from typing import Final

import asyncpg
import structlog
from prometheus_client import Counter

from glamd.errors import ConfigError, ConflictError, GlamError, InternalError, UnavailableError

log = structlog.get_logger()

LOG_EVERY_S: Final = 1.0
"""An outage is logged once in this time, not once for each statement that it fails."""

DRIVER_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,  # TimeoutError, ConnectionError and TLS errors are among its children
)
_UNAVAILABLE_CLASSES: Final = frozenset({"08", "40", "53", "57", "58"})
_UNAVAILABLE_STATES: Final = frozenset(
    {
        "25006",  # read_only_sql_transaction: a standby, in the middle of a failover
        "25P03",  # idle_in_transaction_session_timeout
        "55P03",  # lock_not_available
    }
)
_CONFIG_STATES: Final = frozenset({"28000", "28P01", "3D000", "42501"})
ENDING_STATES: Final = frozenset({"57P01", "57P02", "57P05"})
"""The server closes the connection after these, whatever it was doing when it said so."""
_UNIQUE_VIOLATION: Final = "23505"
_UNUSABLE_KEY: Final = "GL001"
"""Raised by our own trigger on tables of what is sealed."""

_ERRORS = Counter("glamd_db_errors_total", "Failed database calls.", ["sqlstate"])


class OutcomeUnknownError(UnavailableError):
    """The connection went away under a COMMIT, or under a statement that commits by itself."""


class UnusableKeyError(UnavailableError):
    """A row was sealed with a key version that is retired; nothing was stored."""


class UniqueViolationError(ConflictError):
    """A row with this key is there already; `constraint` names the unique constraint."""

    def __init__(self, constraint: str) -> None:
        super().__init__("It contradicts what is already stored.")
        self.constraint = constraint


def translate(error: Exception, *, lost: bool, commits: bool = False) -> GlamError:
    """Name a driver's error ours, count it and log what an operator needs, without any value.

    `lost` says that there is no connection (any more), `commits` that something was being committed
    when the error came.
    """
    state = getattr(error, "sqlstate", None) or ""
    kind = type(error).__name__
    _ERRORS.labels(state or kind).inc()
    if state == _UNIQUE_VIOLATION:
        return UniqueViolationError(str(getattr(error, "constraint_name", "") or ""))
    if state == _UNUSABLE_KEY:
        return UnusableKeyError("The key was replaced meanwhile; ask again.")
    if lost and commits:
        _log_unavailable("database_outcome_unknown", state, kind)
        return OutcomeUnknownError("Whether the database stored it is not known.")
    if lost or state[:2] in _UNAVAILABLE_CLASSES or state in _UNAVAILABLE_STATES:
        _log_unavailable("database_unavailable", state, kind)
        return UnavailableError("The database is not available.")
    log.error(
        "database_error",
        sqlstate=state,
        error=kind,
        table=getattr(error, "table_name", None),
        column=getattr(error, "column_name", None),
        constraint=getattr(error, "constraint_name", None),
    )
    return InternalError("The database refused what was asked of it.")


def connect_error(error: Exception) -> GlamError:
    """Translate an error of the very first connection, where a wrong login is a wrong setting."""
    if getattr(error, "sqlstate", None) in _CONFIG_STATES:
        return ConfigError("The database refuses this login, or there is no such database.")
    if isinstance(error, asyncpg.exceptions.ClientConfigurationError):
        return ConfigError("The database URL cannot be read.")
    return translate(error, lost=True)


_logged_at_s = float("-inf")


def _log_unavailable(event: str, state: str, kind: str) -> None:
    global _logged_at_s  # noqa: PLW0603 - one outage is one outage for the whole process
    now_s = asyncio.get_running_loop().time()
    if abs(now_s - _logged_at_s) >= LOG_EVERY_S:
        _logged_at_s = now_s
        log.warning(event, sqlstate=state, error=kind)
