"""Virtual time for tests of actors: a loop that never waits and a clock that agrees with it.

While anything can run, time stands still; when nothing can, it jumps to the next timer. So a test
may let an hour pass in no time, and the same test takes the same course every time. Where not even
a timer is left, the test can never end, and fails at once instead of hanging.

Only for what lives inside one loop: no sockets, no threads, no children. Nothing here is for
production.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

T = TypeVar("T")

START: Final = datetime(2030, 1, 1, tzinfo=UTC)
VIRTUAL_LIMIT_S: Final = 86_400.0
"""Virtual seconds after which a test is taken to wait for something that will not come."""


class NothingLeftToHappenError(Exception):
    """The test waits, and nothing is scheduled that could end the wait."""


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timer, moves the time to it."""

    elapsed_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None or self.elapsed_s > VIRTUAL_LIMIT_S:
            raise NothingLeftToHappenError
        self.elapsed_s += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is virtual; begins at zero."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jumping.elapsed_s


class VirtualClock:
    """The clock of the virtual loop that runs; what `glamd.clock.Clock` asks for."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def now(self) -> datetime:
        """`START` and what has passed since, aware, in UTC."""
        return START + timedelta(seconds=self._loop.time())

    def monotonic_s(self) -> float:
        """The loop's own time."""
        return self._loop.time()

    async def pass_s(self, seconds: float) -> None:
        """Let so much virtual time pass, and everything happen that falls into it."""
        await asyncio.sleep(seconds)


def run_virtual(main: Callable[[VirtualClock], Coroutine[None, None, T]]) -> T:
    """Run a scenario on a fresh virtual loop, with its clock."""

    async def with_clock() -> T:
        return await main(VirtualClock())

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(with_clock())
