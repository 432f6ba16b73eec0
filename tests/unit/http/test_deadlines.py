"""Many tasks, one timer: each ends when its own time is over, and none before."""

import asyncio

import pytest

from glamd.http.deadlines import Deadlines
from tests.support.http_fakes import SHORT_S


async def runs(deadlines: Deadlines, gate: asyncio.Event) -> str:
    """Work until the gate opens, and say how it ended."""
    task = deadlines.begin(asyncio.get_running_loop())
    try:
        await gate.wait()
    except asyncio.CancelledError:
        if not deadlines.end(task):
            raise
        task.uncancel()
        return "late"
    return "late" if deadlines.end(task) else "in time"


async def test_a_task_that_takes_too_long_is_cancelled_and_the_others_are_not() -> None:
    deadlines = Deadlines(0.2)
    never, soon = asyncio.Event(), asyncio.Event()
    async with asyncio.timeout(SHORT_S), asyncio.TaskGroup() as group:
        slow = group.create_task(runs(deadlines, never))
        quick = group.create_task(runs(deadlines, soon))
        await asyncio.sleep(0)
        soon.set()
        assert await quick == "in time"
        # Begins when half of the first one's time is over, and has all of its own.
        later = group.create_task(after(0.1, deadlines, never))
        began_s = asyncio.get_running_loop().time()
        assert await slow == "late"
        assert not later.done()
        assert await later == "late"
        assert asyncio.get_running_loop().time() - began_s >= 0.25


async def after(seconds: float, deadlines: Deadlines, gate: asyncio.Event) -> str:
    """As `runs`, a while later."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(gate.wait(), seconds)
    return await runs(deadlines, gate)


async def test_a_cancellation_by_others_is_told_from_ours() -> None:
    deadlines = Deadlines(SHORT_S)
    task = asyncio.create_task(runs(deadlines, asyncio.Event()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_whoever_ended_is_forgotten() -> None:
    deadlines = Deadlines(SHORT_S)
    gate = asyncio.Event()
    gate.set()
    assert set(await asyncio.gather(*(runs(deadlines, gate) for _ in range(100)))) == {"in time"}
    assert not deadlines._running
