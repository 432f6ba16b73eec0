"""How parts end: tasks that are cancelled, also those that a library keeps from hearing of it."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from glamd import lifetime
from glamd.clock import SystemClock
from glamd.lifetime import Lifetime


def of(stack: AsyncExitStack) -> Lifetime:
    return Lifetime(stack, clock=SystemClock(), drain_timeout_s=1.0, stop_requested=asyncio.Event())


async def test_a_task_that_swallows_its_cancellation_is_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lifetime, "CANCEL_AGAIN_S", 0.01)
    begun, swallowed = asyncio.Event(), 0

    async def deaf() -> None:
        nonlocal swallowed
        begun.set()
        while swallowed < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
        await asyncio.Event().wait()

    async with asyncio.timeout(10), AsyncExitStack() as stack:
        of(stack).task(deaf(), "deaf")
        await begun.wait()
    assert swallowed == 2


async def test_a_task_that_tidies_up_is_waited_for() -> None:
    begun, tidied = asyncio.Event(), False

    async def tidy() -> None:
        nonlocal tidied
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            tidied = True

    async with AsyncExitStack() as stack:
        of(stack).task(tidy(), "tidy")
        await begun.wait()
    assert tidied
