"""Every async test of the kernel runs in virtual time, and must leave nothing behind."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest
import structlog

from glamd.actor import Ref, System
from glamd.actor.actor import ActorSpec
from glamd.actor.testing import VirtualClock, VirtualLoop
from tests.support.toy_actor import Message, Stage


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Give pytest-asyncio the virtual loop."""
    return {"virtual": VirtualLoop}


@pytest.fixture
async def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
async def system(clock: VirtualClock) -> AsyncIterator[System]:
    """A system; at the end no task is left and asyncio has complained about nothing."""
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    system = System(clock=clock)
    yield system
    await system.drain(10)
    gc.collect(1)
    await asyncio.sleep(0)
    assert complaints == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
async def stage() -> Stage:
    return Stage()


@pytest.fixture
def spec(stage: Stage) -> ActorSpec[Message, str]:
    """Toys that take one message at a time; small limits, so that a test reaches them."""
    return ActorSpec(
        kind="toy",
        factory=stage.toy,
        mailbox_limit=4,
        idle_s=60,
        restart_limit=2,
        restart_window_s=30,
        fail_fast_s=5,
    )


@pytest.fixture
def ref(system: System, spec: ActorSpec[Message, str]) -> Ref[Message, str]:
    return system.ref(spec, "k")


@pytest.fixture
def logged() -> Any:
    """What is logged meanwhile, as dictionaries."""
    with structlog.testing.capture_logs() as logs:
        yield logs
