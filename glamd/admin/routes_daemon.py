"""Admin routes about the daemon itself: status, health, version, drain, log level, actors."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from glamd.actor.reports import ActorStats, KindStats
from glamd.admin.query import limit_of
from glamd.admin.services import Actors
from glamd.clock import Clock
from glamd.errors import NotFoundError
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.health import Health
from glamd.http.routes import OPERATOR, Route

Level = Literal["debug", "info", "warning", "error", "critical"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the daemon is, as far as it does not change while it runs.

    `listeners` maps a name to `host:port`; `mqtt` is where terminals connect, and `server_ca_pem`
    what they have to trust there, both for `device.json`.
    """

    version: str
    environment: str
    node_id: str
    started_at: datetime
    listeners: Mapping[str, str] = field(default_factory=dict)
    mqtt: tuple[str, int] | None = None
    server_ca_pem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """What an operator may turn: the drain and the log level."""

    drain: Callable[[], None]
    draining: Callable[[], bool]
    get_level: Callable[[], str]
    set_level: Callable[[str], None]


class LevelBody(Body):
    """The new log level."""

    level: Level


class DaemonRoutes:
    """Handlers of the routes about the daemon."""

    def __init__(
        self, *, facts: Facts, controls: Controls, health: Health, actors: Actors, clock: Clock
    ) -> None:
        self._facts = facts
        self._controls = controls
        self._health = health
        self._actors = actors
        self._clock = clock

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        one_actor = "/v1/actors/{kind}/{key}"
        found = (
            ("GET", "/v1/status", self._status),
            ("GET", "/v1/health", self._show_health),
            ("GET", "/v1/version", self._version),
            ("POST", "/v1/drain", self._drain),
            ("GET", "/v1/log-level", self._level),
            ("PUT", "/v1/log-level", self._set_level),
            ("GET", "/v1/actors", self._list_actors),
            ("GET", one_actor, self._show_actor),
            ("POST", f"{one_actor}/stop", self._stop_actor),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _status(self, _call: Call) -> Answer:
        facts = self._facts
        stats = self._actors.stats(limit=0)
        return Answer(
            data={
                "version": facts.version,
                "environment": facts.environment,
                "node_id": facts.node_id,
                "pid": os.getpid(),
                "started_at": facts.started_at,
                "uptime_s": round((self._clock.now() - facts.started_at).total_seconds(), 1),
                "draining": self._controls.draining(),
                "log_level": self._controls.get_level(),
                "listeners": dict(facts.listeners),
                "health": await self._readiness(),
                "actors": [_kind(kind) for kind in stats.kinds],
            }
        )

    async def _show_health(self, _call: Call) -> Answer:
        return Answer(data=await self._readiness())

    async def _readiness(self) -> dict[str, object]:
        found = await self._health.readiness()
        return {
            "status": found.status,
            "unavailable": found.unavailable,
            "degraded": found.degraded,
        }

    async def _version(self, _call: Call) -> Answer:
        return Answer(data={"version": self._facts.version})

    async def _drain(self, _call: Call) -> Answer:
        self._controls.drain()
        return Answer(data={"draining": True}, status=202)

    async def _level(self, _call: Call) -> Answer:
        return Answer(data={"level": self._controls.get_level()})

    async def _set_level(self, call: Call) -> Answer:
        self._controls.set_level((await call.json(LevelBody)).level)
        return await self._level(call)

    async def _list_actors(self, call: Call) -> Answer:
        kind = call.request.query.get("kind")
        stats = self._actors.stats(kind=kind, limit=limit_of(call))
        return Answer(
            data={
                "kinds": [_kind(kind) for kind in stats.kinds],
                "actors": [_actor(actor) for actor in stats.actors],
            }
        )

    async def _show_actor(self, call: Call) -> Answer:
        return Answer(data=_actor(self._actor_of(call)))

    async def _stop_actor(self, call: Call) -> Answer:
        actor = self._actor_of(call)
        self._actors.stop(actor.kind, actor.key)
        return Answer(data={"kind": actor.kind, "key": actor.key, "stopping": True}, status=202)

    def _actor_of(self, call: Call) -> ActorStats:
        kind, key = call.params["kind"], call.params["key"]
        found = self._actors.stats(kind=kind, key=key, limit=1).actors
        if not found:
            raise NotFoundError("There is no such actor in memory.", code="ACTOR_NOT_FOUND")
        return found[0]


def _kind(stats: KindStats) -> dict[str, object]:
    return {
        "kind": stats.kind,
        "actors": stats.actors,
        "mailbox": stats.mailbox,
        "handled": stats.handled,
        "restarts": stats.restarts,
        "timeouts": stats.timeouts,
        "refused": dict(stats.refused),
    }


def _actor(stats: ActorStats) -> dict[str, object]:
    return {
        "kind": stats.kind,
        "key": stats.key,
        "state": str(stats.state),
        "mailbox": stats.mailbox,
        "handled": stats.handled,
        "restarts": stats.restarts,
        "idle_s": round(stats.idle_s, 3),
    }
