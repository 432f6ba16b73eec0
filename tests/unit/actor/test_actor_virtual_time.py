"""The virtual loop itself: time jumps, and a test that can never end fails at once."""

import asyncio
from datetime import timedelta

import pytest

from glamd.actor import System
from glamd.actor.system import SWEEP_EVERY_S
from glamd.actor.testing import START, NothingLeftToHappenError, VirtualClock, run_virtual


def test_a_wait_for_nothing_fails_instead_of_hanging() -> None:
    async def scenario(_: VirtualClock) -> None:
        await asyncio.Event().wait()

    with pytest.raises(NothingLeftToHappenError):
        run_virtual(scenario)


def test_a_wait_that_only_timers_keep_alive_fails_too() -> None:
    async def scenario(clock: VirtualClock) -> None:
        while True:
            await clock.pass_s(3600)

    with pytest.raises(NothingLeftToHappenError):
        run_virtual(scenario)


def test_a_drained_system_leaves_no_timer_that_runs_for_ever() -> None:
    clocks: list[VirtualClock] = []

    async def scenario(clock: VirtualClock) -> None:
        clocks.append(clock)
        await System(clock=clock).drain(1)
        await asyncio.Event().wait()

    with pytest.raises(NothingLeftToHappenError):
        run_virtual(scenario)
    assert clocks[0].monotonic_s() <= SWEEP_EVERY_S


def test_time_stands_still_but_for_the_jumps() -> None:
    async def scenario(clock: VirtualClock) -> list[float]:
        seen = []

        async def sleeper(seconds: float) -> None:
            await clock.pass_s(seconds)
            seen.append(clock.monotonic_s())

        async with asyncio.TaskGroup() as group:
            for seconds in (3600.0, 0.25, 60.0):
                group.create_task(sleeper(seconds))
        assert clock.now() - START == timedelta(hours=1)
        return seen

    assert run_virtual(scenario) == [0.25, 60.0, 3600.0]
