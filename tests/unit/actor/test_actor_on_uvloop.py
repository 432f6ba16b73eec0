"""The same kernel on the loop of production, where tasks, timers and time are uvloop's."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
import uvloop

from glamd.actor import ActorSpec, System
from glamd.errors import NotFoundError, UnavailableError
from tests.support.toy_actor import Fail, Hold, Message, Say, Stage

T = TypeVar("T")
TEST_LIMIT_S = 10


def on_uvloop(scenario: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(TEST_LIMIT_S):
            return await scenario

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(limited())


def test_answers_errors_timeouts_and_drain_on_uvloop() -> None:
    async def scenario() -> None:
        stage, system = Stage(), System()
        spec: ActorSpec[Message, str] = ActorSpec(kind="toy", factory=stage.toy)
        ref = system.ref(spec, "k")
        assert await ref.ask(Say("1"), timeout_s=5) == "1"
        with pytest.raises(NotFoundError):
            await ref.ask(Fail(NotFoundError("none")), timeout_s=5)
        with pytest.raises(UnavailableError) as late:
            await ref.ask(Hold("a"), timeout_s=0.01)
        assert late.value.code == "ASK_TIMEOUT"
        stage.gates["a"].opened.set()
        assert await ref.ask(Say("2"), timeout_s=5) == "2"
        assert (await system.drain(5)).clean
        assert stage.journal == [
            "k1 activate", "k1 1", "k1 holds a", "k1 held a", "k1 2", "k1 passivate",
        ]  # fmt: skip
        assert asyncio.all_tasks() == {asyncio.current_task()}

    on_uvloop(scenario())


def test_a_stuck_actor_is_cancelled_and_reported_on_uvloop() -> None:
    async def scenario() -> None:
        stage, system = Stage(), System()
        spec: ActorSpec[Message, str] = ActorSpec(kind="toy", factory=stage.toy)
        held = system.ref(spec, "k").ask(Hold("never"), timeout_s=5)
        await stage.gates["never"].entered.wait()
        report = await system.drain(0.1)
        assert report.leftovers == (("toy", "k"),)
        assert report.stuck == ()
        with pytest.raises(UnavailableError) as refused:
            await held
        assert refused.value.code == "DRAINING"

    on_uvloop(scenario())
