"""How long a request's handler may take as a whole, kept for all of them by one timer.

A timer for each request would cost more than most requests do. All have the same time, so the one
that began first ends first, and one timer that looks at the front of the queue is enough.
"""

import asyncio


class Deadlines:
    """Cancels tasks that take longer than `limit_s`."""

    def __init__(self, limit_s: float) -> None:
        assert limit_s > 0
        self._limit_s = limit_s
        # Task to the loop's time at which it ends, in the order in which they began.
        self._running: dict[asyncio.Task[object], float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, loop: asyncio.AbstractEventLoop) -> asyncio.Task[object]:
        """The current task's time begins; the task, for `end`."""
        task = asyncio.current_task(loop)
        assert task is not None
        self._running[task] = loop.time() + self._limit_s
        if self._timer is None:
            self._timer = loop.call_later(self._limit_s, self._look, loop)
        return task

    def end(self, task: asyncio.Task[object]) -> bool:
        """The task's time does not matter any more; whether it was over and the task cancelled."""
        return self._running.pop(task, None) is None

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        late = []
        for task, ends in self._running.items():
            if ends > now:
                self._timer = loop.call_at(ends, self._look, loop)
                break
            late.append(task)
        for task in late:
            del self._running[task]
            task.cancel()
