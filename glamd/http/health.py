"""`/healthz`, `/readyz`, `/metrics`: whether the process lives, may be sent work, and its figures.

What makes the daemon ready is given as `Part`s by the composition root; nothing is checked here
but what they check. These routes are public and answer while the daemon drains.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from typing_extensions import TypedDict

from glamd.clock import Clock
from glamd.errors import FieldError, UnavailableError
from glamd.http.call import Answer, Call, Raw
from glamd.http.operation import Operation, Refusal
from glamd.http.routes import Route

log = structlog.get_logger()

CHECK_TIMEOUT_S = 2.0
# Probes come from anybody and are not held to a rate, so the parts are asked once a second.
KEPT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One thing readiness hangs on.

    `check` returns None where all is well, else one sentence without secrets. A part that is not
    `required` degrades the daemon where it is away, and does not stop it.
    """

    name: str
    required: bool
    check: Callable[[], Awaitable[str | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """What is wrong, by part; empty is ready."""

    unavailable: dict[str, str]
    degraded: dict[str, str]

    @property
    def status(self) -> str:
        """`ready`, `degraded` or `unavailable`."""
        if self.unavailable:
            return "unavailable"
        return "degraded" if self.degraded else "ready"


class Health:
    """Asks the parts, all at once, each with its own deadline."""

    def __init__(
        self, *, parts: Sequence[Part], draining: Callable[[], bool], clock: Clock
    ) -> None:
        self._parts = tuple(parts)
        self._draining = draining
        self._clock = clock
        self._lock = asyncio.Lock()
        self._asked_s = float("-inf")
        self._reasons: tuple[str | None, ...] = ()

    async def readiness(self) -> Readiness:
        """What is wrong now, or was at most a second ago; draining is always as of now."""
        async with self._lock:
            if self._clock.monotonic_s() - self._asked_s >= KEPT_S:
                self._reasons = tuple(await asyncio.gather(*(_ask(p) for p in self._parts)))
                self._asked_s = self._clock.monotonic_s()
        wrong = [(p, r) for p, r in zip(self._parts, self._reasons, strict=True) if r is not None]
        unavailable = {p.name: r for p, r in wrong if p.required}
        if self._draining():
            unavailable["daemon"] = "it is draining"
        return Readiness(
            unavailable=unavailable, degraded={p.name: r for p, r in wrong if not p.required}
        )


class Alive(TypedDict):
    """The process lives."""

    status: Literal["ok"]


class Ready(TypedDict):
    """Work may be sent; `degraded` says by name what is away and not required."""

    status: Literal["ready", "degraded"]
    degraded: dict[str, str]


_ALIVE: Final = Operation(
    id="isAlive",
    tag="Health",
    summary="Whether the process lives",
    answer=Alive,
    example={"status": "ok"},
)
_ALIVE_TOO: Final = replace(_ALIVE, id="isAliveToo", summary="The same as /healthz")
_READY: Final = Operation(
    id="isReady",
    tag="Health",
    summary="Whether work may be sent here",
    answer=Ready,
    example={"status": "degraded", "degraded": {"key-provider": "it did not answer in time"}},
    refusals=(
        Refusal(
            code="UNAVAILABLE",
            status=503,
            when="A part that is required is away or the daemon drains; `errors` names it.",
        ),
    ),
)
_METRICS: Final = Operation(
    id="showMetrics",
    tag="Health",
    summary="Figures for Prometheus",
    answer=str,
    example="# HELP glamd_http_requests_total Requests answered.\n",
    media_type="text/plain",
)


def health_routes(health: Health) -> tuple[Route, ...]:
    """The public routes that every HTTP listener has."""

    async def alive(_call: Call) -> Answer:
        data: Alive = {"status": "ok"}
        return Answer(data=data)

    async def ready(_call: Call) -> Answer:
        found = await health.readiness()
        if found.unavailable:
            raise UnavailableError(
                "The daemon is not ready.",
                fields=[FieldError(name, why) for name, why in found.unavailable.items()],
            )
        data: Ready = {
            "status": "degraded" if found.degraded else "ready",
            "degraded": found.degraded,
        }
        return Answer(data=data)

    async def metrics(_call: Call) -> Raw:
        return Raw(body=generate_latest(), content_type=CONTENT_TYPE_LATEST)

    return (
        Route(method="GET", path="/healthz", handler=alive, access=(), operation=_ALIVE),
        Route(method="GET", path="/health", handler=alive, access=(), operation=_ALIVE_TOO),
        Route(method="GET", path="/readyz", handler=ready, access=(), operation=_READY),
        Route(method="GET", path="/metrics", handler=metrics, access=(), operation=_METRICS),
    )


async def _ask(part: Part) -> str | None:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await part.check()
    except TimeoutError:
        return "it did not answer in time"
    except Exception:
        # A check that breaks is a part that is away; the cause is for the log alone.
        log.exception("health_check_failed", part=part.name)
        return "it could not be asked"
