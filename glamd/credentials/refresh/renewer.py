"""Renewing one claimed token: open the secret, ask the platform, seal, commit; or note why not.

Nobody sees a new pair before its commit, and until that has succeeded nothing more is asked of the
platform with the old one. A failure makes a token wait, longer each time. Which tokens are renewed,
and when, is for `service`.
"""

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Final

import structlog
from prometheus_client import Counter, Histogram

from glamd.clock import Clock
from glamd.credentials import sealing
from glamd.credentials.model import Accessor, ShopConnection
from glamd.credentials.refresh import store
from glamd.credentials.refresh.answers import RefreshError, Remedy, Renewed
from glamd.credentials.refresh.oauth import OAuthClient
from glamd.credentials.refresh.store import Claimed, Sealed
from glamd.db import Database
from glamd.db_errors import UnusableKeyError
from glamd.errors import CryptoError, GlamError, TransientError
from glamd.keys.keyrings import DataKey, Keyring

BACK_OFF_FIRST_S: Final = 30.0
BACK_OFF_LIMIT_S: Final = 3600.0
"""The first pause after a failure that may pass by itself, doubled each time, and the longest."""

DOUBLINGS_LIMIT: Final = 16

LONG_PAUSE_S: Final[dict[Remedy, tuple[float, float]]] = {
    "operator": (900.0, 6 * 3600.0),
    "merchant": (6 * 3600.0, store.BACK_OFF_MAX.total_seconds()),
}
"""The shortest and the longest pause after a failure that somebody has to mend; between them it is
as long as the token has been expired for, so that what stays dead is asked for ever more rarely."""

MIN_PAUSE_S: Final = 30.0
"""A token that lives less than twice its `refresh_before_s` is renewed at half its life, and none
sooner than this after the last time, however short its life."""

COMMIT_PATIENCE_S: Final = 3600.0
"""How long a new pair is kept in memory while it cannot be committed: an access token's life."""

COMMIT_PAUSE_FIRST_S: Final = 0.1
COMMIT_PAUSE_LIMIT_S: Final = 2.0

OK: Final = "ok"
LOST: Final = "LOST"
INTERNAL_ERROR: Final = "INTERNAL_ERROR"

log = structlog.get_logger()

_REFRESHES = Counter(
    "glamd_credentials_refreshes_total",
    "Attempts to renew a platform token; `ok` or why not.",
    ["platform", "outcome"],
)
_SECONDS = Histogram(
    "glamd_credentials_refresh_seconds",
    "From the claim to the commit or the noted failure.",
    ["platform"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
_random = random.SystemRandom()


class Renewer:
    """Renews claimed tokens on behalf of this node."""

    def __init__(
        self, database: Database, *, keyring: Keyring[DataKey], clock: Clock, node_id: str
    ) -> None:
        self._database = database
        self._keyring = keyring
        self._clock = clock
        self._node_id = node_id

    async def renew(self, client: OAuthClient, claimed: Claimed) -> bool:
        """Renew the token; whether there is another secret in its row now. Raises nothing.

        Cancelling it before the request is sent leaves the claim to run out; from then on to the
        commit it loses what the platform answers, and says so.
        """
        began_s = time.perf_counter()
        asked = asyncio.Event()
        try:
            outcome = await self._outcome(client, claimed, asked)
        except asyncio.CancelledError:
            if asked.is_set():
                _lose(claimed.connection)
                _REFRESHES.labels(claimed.connection.platform, LOST).inc()
            raise
        except Exception:
            # Its claim runs out by itself; then whoever is first tries again.
            log.exception("platform_token_refresh_crashed", **_ids(claimed.connection))
            outcome = INTERNAL_ERROR
        if asked.is_set():
            _lose(claimed.connection)
        platform = claimed.connection.platform
        _REFRESHES.labels(platform, outcome).inc()
        _SECONDS.labels(platform).observe(time.perf_counter() - began_s)
        return outcome in (OK, store.SUPERSEDED)

    async def _outcome(self, client: OAuthClient, claimed: Claimed, asked: asyncio.Event) -> str:
        """What came of it; `asked` is set while there may be a new pair that is in no row."""
        try:
            renewed = await self._ask(client, claimed, asked)
        except RefreshError as error:
            asked.clear()
            await self._note(claimed, error)
            return error.code
        kept, sealed = await self._keep(
            claimed, lambda: self._sealed(client, claimed.connection, renewed)
        )
        if kept is None:
            return LOST
        asked.clear()
        if kept == "superseded":
            log.info("platform_token_refresh_superseded", **_ids(claimed.connection))
            return store.SUPERSEDED
        log.info(
            "platform_token_refreshed",
            expires_at=sealed.expires_at.isoformat(),
            key_version=sealed.key_version,
            **_ids(claimed.connection),
        )
        return OK

    async def _ask(self, client: OAuthClient, claimed: Claimed, asked: asyncio.Event) -> Renewed:
        connection = claimed.connection
        try:
            secret = await sealing.open_sealed(
                self._keyring, claimed.ciphertext, connection, key_version=connection.key_version
            )
        except CryptoError:
            raise RefreshError("UNDECRYPTABLE", remedy="merchant") from None
        except TransientError:
            raise RefreshError("KEY_UNAVAILABLE") from None
        if self._clock.monotonic_s() - claimed.claimed_at_s > store.LEASE_S / 2:
            # This process stood still: before the answer came another node might ask as well.
            raise RefreshError("STALLED")
        return await client.renew(connection, secret, sending=asked.set)

    def _sealed(self, client: OAuthClient, connection: ShopConnection, renewed: Renewed) -> Sealed:
        ciphertext, key_version = sealing.seal(self._keyring, renewed.secret, connection)
        is_short = renewed.lifetime_s < 2 * client.settings.refresh_before_s
        pause = timedelta(seconds=max(MIN_PAUSE_S, renewed.lifetime_s / 2))
        return Sealed(
            ciphertext=ciphertext,
            key_version=key_version,
            expires_at=renewed.expires_at,
            scopes=renewed.scopes,
            not_before=self._clock.now() + pause if is_short else None,
        )

    async def _keep(
        self, claimed: Claimed, seal: Callable[[], Sealed]
    ) -> tuple[store.Kept | None, Sealed]:
        """Commit the new pair, which is nowhere else; None when that failed for too long."""
        sealed = seal()
        until_s = self._clock.monotonic_s() + COMMIT_PATIENCE_S
        pause_s = COMMIT_PAUSE_FIRST_S
        while True:
            try:
                kept = await store.commit(
                    self._database,
                    claimed,
                    sealed,
                    at=self._clock.now(),
                    accessor=self._accessor(claimed),
                )
            except UnusableKeyError:
                with suppress(GlamError):
                    await self._keyring.reload()
                sealed = seal()
            except TransientError as error:
                log.warning(
                    "platform_token_refresh_uncommitted",
                    code=error.code,
                    **_ids(claimed.connection),
                )
            else:
                return kept, sealed
            if self._clock.monotonic_s() > until_s:
                return None, sealed
            await asyncio.sleep(pause_s * _random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, COMMIT_PAUSE_LIMIT_S)

    async def _note(self, claimed: Claimed, error: RefreshError) -> None:
        """Let the token wait; where even that cannot be written its claim makes it wait."""
        connection = claimed.connection
        failures = connection.refresh_failures + 1
        now = self._clock.now()
        pause_s = back_off_s(
            error,
            failures=failures,
            expired_for_s=(now - (connection.expires_at or now)).total_seconds(),
        )
        log.warning(
            "platform_token_refresh_failed",
            code=error.code,
            failures=failures,
            pause_s=round(pause_s),
            **_ids(connection),
        )
        try:
            await store.fail(
                self._database,
                claimed,
                code=error.code,
                not_before=now + timedelta(seconds=pause_s),
                at=now,
                accessor=self._accessor(claimed),
            )
        except TransientError as unwritten:
            log.warning(
                "platform_token_refresh_failure_unwritten",
                code=unwritten.code,
                **_ids(connection),
            )

    def _accessor(self, claimed: Claimed) -> Accessor:
        """This node, for the access log; the rows of one attempt share its claim as their id."""
        claim = str(claimed.claim)
        return Accessor(
            kind="glamd", name=self._node_id, ip="-", request_id=claim, correlation_id=claim
        )


def back_off_s(error: RefreshError, *, failures: int, expired_for_s: float) -> float:
    """How long a token waits after its `failures`-th failure in a row, spread at random.

    What may pass by itself is tried again after BACK_OFF_FIRST_S, doubled each time, or when the
    platform says; the rest after LONG_PAUSE_S.
    """
    if error.remedy == "time":
        doublings = min(failures - 1, DOUBLINGS_LIMIT)
        pause_s = min(BACK_OFF_FIRST_S * 2.0**doublings, BACK_OFF_LIMIT_S)
        pause_s *= _random.uniform(0.5, 1.0)
    else:
        shortest_s, longest_s = LONG_PAUSE_S[error.remedy]
        pause_s = min(max(expired_for_s, shortest_s), longest_s) * _random.uniform(0.9, 1.0)
    return max(pause_s, error.retry_after_s or 0.0)


def _lose(connection: ShopConnection) -> None:
    """The platform may have withdrawn the old pair; the docs say what that means."""
    log.error("platform_token_refresh_lost", **_ids(connection))


def _ids(connection: ShopConnection) -> dict[str, str]:
    return {
        "token_id": str(connection.token_id),
        "merchant_id": str(connection.merchant_id),
        "platform": connection.platform,
    }
