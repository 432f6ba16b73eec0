"""The process's own figures for Prometheus, and how all figures are put on the wire.

Rooms make their metrics themselves and never import this. Here is what belongs to no room: which
build runs, how far the event loop is behind, and the text of an exposition. No HTTP server.
"""

import asyncio
import platform
from collections import deque
from contextlib import AsyncExitStack
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Gauge,
    generate_latest,
)
from prometheus_client.registry import Collector

from glamd import __version__
from glamd.clock import Clock

LAG_INTERVAL_S: Final = 0.25
LAG_SAMPLES: Final = 60
"""The worst of 15 s is shown, so that a scrape each 15 s misses no stall and forgets old ones."""

_BUILD = Gauge("glamd_build_info", "1; which build this is", ["version", "python_version"])
_BUILD.labels(version=__version__, python_version=platform.python_version()).set(1)
_LAG = Gauge(
    "glamd_process_loop_lag_seconds",
    "How long the event loop kept a timer waiting, the worst of the last 15 s",
)


def render() -> tuple[bytes, str]:
    """Every registered figure of this moment, and the content type of that text."""
    return generate_latest(REGISTRY), CONTENT_TYPE_LATEST


def register(
    collector: Collector, stack: AsyncExitStack, registry: CollectorRegistry = REGISTRY
) -> None:
    """Show a part's collector for as long as the part lives; the stack takes it back out."""
    registry.register(collector)
    stack.callback(registry.unregister, collector)


class LoopLag:
    """Measures by how much a short timer is late, which is what every request waits besides."""

    def __init__(self, clock: Clock, *, interval_s: float = LAG_INTERVAL_S) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._late_s: deque[float] = deque(maxlen=LAG_SAMPLES)

    @property
    def worst_s(self) -> float:
        """The longest delay among the last `LAG_SAMPLES`; 0 before the first."""
        return max(self._late_s, default=0.0)

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            due_s = self._clock.monotonic_s() + self._interval_s
            await asyncio.sleep(self._interval_s)
            self._late_s.append(max(0.0, self._clock.monotonic_s() - due_s))
            _LAG.set(self.worst_s)
