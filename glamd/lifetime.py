"""How what was started is stopped again: the drain's clock, tasks that must not end, the collector.

`glamd.app` says what there is and in which order; this says how a part's end is reached. Nothing of
any part is known here.
"""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Final

import structlog

from glamd.clock import Clock
from glamd.errors import TransientError

log = structlog.get_logger()

GC_YOUNG_OBJECTS: Final = 50_000
GC_MIDDLE_RUNS: Final = 20
GC_OLD_RUNS: Final = 50
LAST_STOP_S: Final = 1.0
"""What every part has to stop in, however little of the drain's time is left."""
CANCEL_AGAIN_S: Final = 3.0
"""How long a task that is cancelled may tidy up before it is cancelled again."""


class Lifetime:
    """The ends of the parts on one stack, which is left backwards under one clock."""

    def __init__(
        self,
        stack: AsyncExitStack,
        *,
        clock: Clock,
        drain_timeout_s: float,
        stop_requested: asyncio.Event,
    ) -> None:
        self._stack = stack
        self._clock = clock
        self._drain_timeout_s = drain_timeout_s
        self._stop_requested = stop_requested
        self._draining = False
        self._drain_until_s: float | None = None

    def begin_drain(self) -> None:
        """Turn readiness off before anything is stopped, and start the one clock of the drain."""
        self._draining = True
        self._drain_until_s = self._clock.monotonic_s() + self._drain_timeout_s
        log.info("daemon_draining", timeout_s=self._drain_timeout_s)

    def is_draining(self) -> bool:
        """Whether the drain has begun."""
        return self._draining

    def at_drain(self, stop: Callable[[float], Awaitable[object]]) -> None:
        """Stop a part when its turn comes, with what is left of the drain's time, at least 1 s."""

        async def within() -> None:
            until_s = self._drain_until_s or self._clock.monotonic_s()
            await stop(max(LAST_STOP_S, until_s - self._clock.monotonic_s()))

        self._stack.push_async_callback(within)

    def task(self, work: Coroutine[None, None, None], name: str) -> None:
        """Run something beside the rest until the drain gets here."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._stack.push_async_callback(_cancelled, task)

    def job(self, work: Callable[[], Awaitable[object]], *, every_s: float, name: str) -> None:
        """Do something now and then beside the rest; what fails is tried again at its next turn."""
        self.task(_repeated(work, every_s=every_s, name=name), name)

    def _ended(self, task: asyncio.Task[None]) -> None:
        # A task of ours ends only by being cancelled; without it the daemon is not whole.
        if not task.cancelled():
            log.error("task_ended", task=task.get_name(), exc_info=task.exception())
            self._stop_requested.set()


def spare_the_collector() -> None:
    """Keep the cyclic collector from walking what lives as long as the process.

    With the defaults it looked at everything every few thousand tokens: 12 % of the time under
    load, and most of what stood between p50 and p99.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_YOUNG_OBJECTS, GC_MIDDLE_RUNS, GC_OLD_RUNS)


async def _repeated(work: Callable[[], Awaitable[object]], *, every_s: float, name: str) -> None:
    while True:
        try:
            await work()
        except TransientError as error:
            log.warning("job_postponed", job=name, code=error.code)
        except Exception:
            # A bug in a job that tidies up must not end the daemon.
            log.exception("job_failed", job=name)
        await asyncio.sleep(every_s)


async def _cancelled(task: asyncio.Task[None]) -> None:
    # A library that swallows a cancellation must not hold the drain up for ever.
    while not task.done():
        task.cancel()
        await asyncio.wait((task,), timeout=CANCEL_AGAIN_S)
    await asyncio.gather(task, return_exceptions=True)
