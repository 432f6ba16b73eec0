"""When platform tokens are renewed: before they expire, by a job, and when somebody reads one.

Each platform has a loop and slots of its own, so that one that is slow or away holds up no other.
Nobody asks twice at a time for one token: on this node its flight is joined, on others a claim in
the database is waited for. How one token is renewed, and how long it waits after a failure, stands
in `renewer`.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from typing import Final
from uuid import UUID

import structlog
from aiohttp.abc import AbstractResolver
from prometheus_client import Gauge

from glamd.clock import Clock
from glamd.credentials.model import PLATFORMS, Health, Platform
from glamd.credentials.refresh import store
from glamd.credentials.refresh.oauth import OAuthClient, open_session
from glamd.credentials.refresh.renewer import Renewer
from glamd.credentials.refresh.settings import OAuthSettings
from glamd.credentials.refresh.store import Due
from glamd.db import Database
from glamd.errors import ConfigError, TransientError
from glamd.keys.keyrings import DataKey, Keyring

ON_DEMAND_BEFORE: Final = timedelta(minutes=2)
"""How soon a token must expire to be renewed because somebody reads it."""

FLIGHTS_LIMIT: Final = 256
"""With so many under way on this node nobody starts a further one on demand."""

OTHER_NODE_WAIT_S: Final = 10.0
OTHER_NODE_POLL_S: Final = 0.1

TAKE_OVER_AFTER_S: Final = 5.0
"""A claim that has run out is taken over only by a node that has reached the database for so long:
after an outage its holder, who may have a new pair in hand, comes first."""

BLIND_PAUSE_LIMIT_S: Final = 30.0
CENSUS_EVERY_S: Final = 60.0

_HEALTHS: Final[tuple[Health, ...]] = ("valid", "expired", "refresh-failing")

log = structlog.get_logger()

_DUE = Gauge("glamd_credentials_refresh_due", "Platform tokens that should be renewed by now.")
_CONNECTIONS = Gauge(
    "glamd_credentials_connections",
    "Platform tokens by the health of their connection.",
    ["platform", "health"],
)


class _Lane:
    """One platform: its client, and how many more flights the job may begin there."""

    def __init__(self, client: OAuthClient, *, slots: int) -> None:
        self.client = client
        self.platform: Platform = client.settings.platform
        self.free = slots
        self.changed = asyncio.Event()

    def give_back(self, _flight: asyncio.Task[bool]) -> None:
        self.free += 1
        self.changed.set()


class Refresher:
    """Renews platform tokens before they expire.

    `run` is the job, and everything else works only while it runs; `renew` is for whoever reads a
    token that has expired. `interval_s` is how often it looks for what is due, `concurrency` how
    many tokens of one platform it renews at once. ConfigError where a platform is named twice.
    """

    def __init__(
        self,
        database: Database,
        *,
        keyring: Keyring[DataKey],
        platforms: Sequence[OAuthSettings],
        clock: Clock,
        node_id: str,
        interval_s: float = 5.0,
        concurrency: int = 8,
        tls: ssl.SSLContext | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        if len({one.platform for one in platforms}) < len(platforms):
            raise ConfigError("Renewing tokens: a platform is named twice.")
        self._database = database
        self._renewer = Renewer(database, keyring=keyring, clock=clock, node_id=node_id)
        self._platforms = tuple(platforms)
        self._clock = clock
        self._interval_s = interval_s
        self._concurrency = concurrency
        self._tls = tls
        self._resolver = resolver
        self._lanes: dict[Platform, _Lane] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._group: asyncio.TaskGroup | None = None
        self._flights: dict[UUID, asyncio.Task[bool]] = {}
        self._stopping = asyncio.Event()
        self._landed = asyncio.Event()
        self._reached_since_s: float | None = None

    async def run(self) -> None:
        """Renew what is due until cancelled; after `stop` there is only that left to wait for.

        Cancelled without `stop`, it drops answers that are not committed yet.
        """
        session = open_session(
            connections=FLIGHTS_LIMIT + self._concurrency * len(self._platforms),
            tls=self._tls,
            resolver=self._resolver,
        )
        try:
            async with session, asyncio.TaskGroup() as group:
                self._group = group
                for settings in self._platforms:
                    client = OAuthClient(settings, session=session, clock=self._clock)
                    lane = _Lane(client, slots=self._concurrency)
                    self._lanes[lane.platform] = lane
                    loop = group.create_task(self._serve(lane), name=f"refresh:{lane.platform}")
                    self._loops.append(loop)
                self._loops.append(group.create_task(self._count(), name="refresh:census"))
        finally:
            self._group = None
            self._landed.set()
        await asyncio.get_running_loop().create_future()

    async def renew(self, token_id: UUID) -> bool:
        """Renew this token if it has expired or is about to; whether there is another secret now.

        Joins what is under way for it, here or on another node. False at once where it may not be
        tried: not due, not refreshable, waiting after a failure. Cancelling this ends the waiting
        and nothing else; it raises nothing of its own.
        """
        flight = self._flights.get(token_id)
        if flight is None:
            group = self._group
            if group is None or self._stopping.is_set() or len(self._flights) >= FLIGHTS_LIMIT:
                return False
            flight = self._start(group, token_id, self._on_demand(token_id))
        await asyncio.wait({flight})
        return not flight.cancelled() and flight.result()

    def pause(self) -> None:
        """Claim nothing more and refuse new readers, for good; what is claimed goes on.

        For the beginning of the drain, whose end may come before that of what begins in it.
        """
        self._stopping.set()
        for lane in self._lanes.values():
            lane.changed.set()

    async def stop(self, timeout_s: float) -> None:
        """`pause`, wait for the flights, and cut off what lasts longer."""
        self.pause()
        if self._group is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._landed.wait()
        for task in (*self._loops, *self._flights.values()):
            task.cancel()
        await self._landed.wait()

    # ---- the job

    async def _serve(self, lane: _Lane) -> None:
        """Keep the platform's slots busy as long as anything is due, then look every interval."""
        blind_s = self._interval_s
        while not self._stopping.is_set():
            wanted = lane.free
            try:
                begun = await self._begin_due(lane, wanted) if wanted else 0
            except TransientError as error:
                log.warning("platform_token_refresh_blind", platform=lane.platform, code=error.code)
                await self._pause(blind_s)
                blind_s = min(2 * blind_s, BLIND_PAUSE_LIMIT_S)
                continue
            except Exception:
                # A bug here must not let every token of the platform expire in silence.
                log.exception("platform_token_refresh_crashed", platform=lane.platform)
                await self._pause(BLIND_PAUSE_LIMIT_S)
                continue
            blind_s = self._interval_s
            if begun < wanted:
                await self._pause(self._interval_s)
            else:
                await self._a_slot(lane)

    async def _begin_due(self, lane: _Lane, limit: int) -> int:
        """Claim up to `limit` tokens that are due and let their flights begin; how many."""
        settings = lane.client.settings
        now_s = self._clock.monotonic_s()
        try:
            claimed = await store.claim_due(
                self._database,
                Due(
                    platform=lane.platform,
                    now=self._clock.now(),
                    before=timedelta(seconds=settings.refresh_before_s),
                    assumed_lifetime=timedelta(seconds=settings.assumed_lifetime_s),
                ),
                limit=limit,
                takes_over=self._takes_over(now_s),
                monotonic_s=now_s,
            )
        except TransientError:
            self._reached_since_s = None
            raise
        if self._reached_since_s is None:
            self._reached_since_s = now_s
        assert self._group is not None
        for one in claimed:
            lane.free -= 1
            work = self._renewer.renew(lane.client, one)
            flight = self._start(self._group, one.connection.token_id, work)
            flight.add_done_callback(lane.give_back)
        return len(claimed)

    async def _a_slot(self, lane: _Lane) -> None:
        while not lane.free and not self._stopping.is_set():
            lane.changed.clear()
            await lane.changed.wait()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def _takes_over(self, now_s: float) -> bool:
        since_s = self._reached_since_s
        return since_s is not None and now_s - since_s >= TAKE_OVER_AFTER_S

    def _start(
        self, group: asyncio.TaskGroup, token_id: UUID, work: Coroutine[None, None, bool]
    ) -> asyncio.Task[bool]:
        flight = group.create_task(work, name=f"refresh:{token_id}")
        self._flights[token_id] = flight

        def land(_: asyncio.Task[bool]) -> None:
            if self._flights.get(token_id) is flight:
                del self._flights[token_id]

        flight.add_done_callback(land)
        return flight

    async def _count(self) -> None:
        """Keep the gauges fresh."""
        before = [
            (one.platform, timedelta(seconds=one.refresh_before_s)) for one in self._platforms
        ]
        while not self._stopping.is_set():
            try:
                counts = await store.census(self._database, now=self._clock.now(), before=before)
            except TransientError as error:
                log.warning("platform_tokens_uncounted", code=error.code)
            except Exception:
                # Gauges are not worth the job.
                log.exception("platform_tokens_uncounted")
            else:
                _show(counts)
            await self._pause(CENSUS_EVERY_S)

    # ---- on demand

    async def _on_demand(self, token_id: UUID) -> bool:
        """`_claim_or_wait` without its errors: what a reader asks for must not end the job."""
        try:
            return await self._claim_or_wait(token_id)
        except TransientError as error:
            log.warning("platform_token_refresh_blind", token_id=str(token_id), code=error.code)
        except Exception:
            log.exception("platform_token_refresh_crashed", token_id=str(token_id))
        return False

    async def _claim_or_wait(self, token_id: UUID) -> bool:
        before = await store.look(self._database, token_id)
        if before is None:
            return False
        now_s = self._clock.monotonic_s()
        claimed = await store.claim_one(
            self._database,
            token_id,
            platforms=list(self._lanes),
            now=self._clock.now(),
            before=ON_DEMAND_BEFORE,
            takes_over=self._takes_over(now_s),
            monotonic_s=now_s,
        )
        if claimed is not None:
            lane = self._lanes[claimed.connection.platform]
            return await self._renewer.renew(lane.client, claimed)
        return await self._changed_elsewhere(token_id, before)

    async def _changed_elsewhere(self, token_id: UUID, before: store.Look) -> bool:
        """Wait as long as another node has a claim; whether the secret is another one then."""
        now: store.Look | None = before
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OTHER_NODE_WAIT_S):
                while now is not None:
                    now = await store.look(self._database, token_id)
                    if now is None or not now.is_claimed:
                        break
                    await asyncio.sleep(OTHER_NODE_POLL_S)
        return now is not None and now.generation != before.generation


def _show(counts: Sequence[store.Count]) -> None:
    for platform in PLATFORMS:
        for health in _HEALTHS:
            _CONNECTIONS.labels(platform, health).set(0)
    for one in counts:
        _CONNECTIONS.labels(one.platform, one.health).set(one.connections)
    _DUE.set(sum(one.due for one in counts))
