"""The end of a system: what was accepted is finished, what comes is refused, nobody holds it up."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from glamd.actor import Actor, ActorSpec, Ref, System
from glamd.actor.testing import VirtualClock
from glamd.errors import UnavailableError
from tests.support.toy_actor import Fail, Hold, Message, Say, Stage

ToyRef = Ref[Message, str]


class Stubborn(Actor[asyncio.Event, None]):
    """Goes on when it is cancelled, which an actor must not do."""

    async def receive(self, message: asyncio.Event) -> None:
        while not message.is_set():
            try:
                await message.wait()
            except asyncio.CancelledError:
                continue


@pytest.fixture
async def release() -> AsyncIterator[asyncio.Event]:
    """Ends the stubborn at the latest with the test."""
    event = asyncio.Event()
    yield event
    event.set()
    await asyncio.sleep(0)


async def test_a_drain_refuses_what_is_new(system: System, ref: ToyRef) -> None:
    await system.drain(1)
    with pytest.raises(UnavailableError) as asked:
        await ref.ask(Say("x"), timeout_s=1)
    with pytest.raises(UnavailableError, match="shutting down") as told:
        ref.tell(Say("x"))
    assert asked.value.code == told.value.code == "DRAINING"
    assert system.stats().draining


async def test_a_drain_handles_what_it_took_and_passivates_everybody(
    system: System, spec: ActorSpec[Message, str], ref: ToyRef, stage: Stage
) -> None:
    await system.ref(spec, "idle").ask(Say("x"), timeout_s=1)
    asks = [ref.ask(m, timeout_s=9) for m in (Hold("a"), Say("1"), Say("2"))]
    await stage.gates["a"].entered.wait()
    drain = asyncio.create_task(system.drain(10))
    await asyncio.sleep(0)
    refused = ref.ask(Say("new"), timeout_s=9)
    stage.gates["a"].opened.set()
    report = await drain
    assert await asyncio.gather(*asks) == ["a", "1", "2"]
    assert isinstance(refused.exception(), UnavailableError)
    assert report.clean
    assert report.passivated == 2
    assert stage.journal[-2:] == ["idle1 passivate", "k1 passivate"]
    assert system.stats().actors == ()


async def test_a_drain_of_nothing_ends_at_once(system: System, clock: VirtualClock) -> None:
    report = await system.drain(10)
    assert (report.clean, report.elapsed_s, clock.monotonic_s()) == (True, 0, 0)


async def test_a_drain_with_a_stuck_actor_reports_it_in_time_and_passivates_the_others(
    system: System,
    spec: ActorSpec[Message, str],
    ref: ToyRef,
    stage: Stage,
    logged: list[dict[str, object]],
) -> None:
    await system.ref(spec, "fine").ask(Say("x"), timeout_s=1)
    asks = [ref.ask(m, timeout_s=60) for m in (Hold("never"), Say("1"), Say("2"))]
    await stage.gates["never"].entered.wait()
    ref.tell(Say("told"))
    report = await system.drain(10)
    assert not report.clean
    assert report.leftovers == (("toy", "k"),)
    assert report.refused_messages == 3
    assert report.stuck == ()
    assert report.elapsed_s <= 10
    assert stage.journal[-1] == "fine1 passivate"
    answers = await asyncio.gather(*asks, return_exceptions=True)
    assert [getattr(answer, "code", None) for answer in answers] == ["DRAINING"] * 3
    assert [entry["event"] for entry in logged] == ["actors_not_drained"]


async def test_an_actor_that_ignores_its_cancellation_is_reported_as_stuck(
    system: System, clock: VirtualClock, release: asyncio.Event
) -> None:
    stubborn = system.ref(ActorSpec(kind="stubborn", factory=lambda _: Stubborn()), "k")
    stubborn.tell(release)
    await clock.pass_s(1)
    report = await system.drain(10)
    assert report.stuck == (("stubborn", "k"),)
    assert report.elapsed_s <= 10


async def test_a_drain_stuck_in_activation_answers_who_waits(
    system: System, ref: ToyRef, stage: Stage
) -> None:
    stage.held.add("activate")
    asks = [ref.ask(Say(text), timeout_s=60) for text in ("1", "2")]
    await stage.gates["activate"].entered.wait()
    report = await system.drain(4)
    answers = await asyncio.gather(*asks, return_exceptions=True)
    assert [getattr(answer, "code", None) for answer in answers] == ["DRAINING"] * 2
    assert (report.leftovers, report.refused_messages) == ((("toy", "k"),), 2)


async def test_a_drain_stuck_in_passivation_ends_in_time(
    system: System, ref: ToyRef, stage: Stage
) -> None:
    stage.held.add("passivate")
    await ref.ask(Say("1"), timeout_s=1)
    report = await system.drain(4)
    assert report.leftovers == (("toy", "k"),)
    assert report.elapsed_s <= 4


async def test_actors_may_ask_each_other_while_they_drain(
    system: System, spec: ActorSpec[Message, str], stage: Stage
) -> None:
    class Front(Actor[str, str]):
        async def receive(self, message: str) -> str:
            await stage.gates["front"].passage()
            # Children of a receive belong to it too.
            async with asyncio.TaskGroup() as group:
                child = group.create_task(self.ask_behind(message))
            return child.result()

        async def ask_behind(self, message: str) -> str:
            return await system.ref(spec, "behind").ask(Say(message), timeout_s=5)

    asked = system.ref(ActorSpec(kind="front", factory=lambda _: Front()), "k").ask(
        "accepted", timeout_s=9
    )
    await stage.gates["front"].entered.wait()
    drain = asyncio.create_task(system.drain(10))
    await asyncio.sleep(0)
    stage.gates["front"].opened.set()
    assert (await drain).clean
    assert await asked == "accepted"


async def test_another_systems_actors_are_strangers_to_a_draining_one(
    system: System, ref: ToyRef, clock: VirtualClock
) -> None:
    class Stranger(Actor[str, str]):
        async def receive(self, message: str) -> str:
            return await ref.ask(Say(message), timeout_s=1)

    elsewhere = System(clock=clock)
    stranger = elsewhere.ref(ActorSpec(kind="stranger", factory=lambda _: Stranger()), "k")
    await system.drain(1)
    with pytest.raises(UnavailableError) as refused:
        await stranger.ask("x", timeout_s=1)
    assert refused.value.code == "DRAINING"
    await elsewhere.drain(1)


async def test_an_actor_woken_by_anothers_passivation_is_passivated_again(
    system: System, spec: ActorSpec[Message, str], stage: Stage
) -> None:
    class Flushes(Actor[str, str]):
        async def receive(self, message: str) -> str:
            return message

        async def on_passivate(self) -> None:
            await stage.gates["flush"].passage()
            await system.ref(spec, "k").ask(Say("flushed"), timeout_s=5)

    await system.ref(spec, "k").ask(Say("1"), timeout_s=1)
    flushes = system.ref(ActorSpec(kind="flushes", factory=lambda _: Flushes()), "k")
    await flushes.ask("x", timeout_s=1)
    drain = asyncio.create_task(system.drain(10))
    await stage.gates["flush"].entered.wait()
    stage.gates["flush"].opened.set()
    assert (await drain).clean
    assert stage.journal[-3:] == ["k2 activate", "k2 flushed", "k2 passivate"]


async def test_a_drain_ends_though_crashed_keys_are_still_remembered(
    system: System, ref: ToyRef, stage: Stage
) -> None:
    ref.tell(Fail(ValueError("oops")))
    assert (await system.drain(10)).clean
    assert stage.journal == ["k1 activate"]


async def test_two_drains_at_once_agree(system: System, ref: ToyRef, stage: Stage) -> None:
    held = ref.ask(Hold("a"), timeout_s=9)
    await stage.gates["a"].entered.wait()
    drains = asyncio.gather(system.drain(10), system.drain(10))
    await asyncio.sleep(0)
    stage.gates["a"].opened.set()
    assert all(report.clean for report in await drains)
    assert await held == "a"


async def test_a_drain_that_is_cancelled_stops_waiting_and_goes_on_refusing(
    system: System, ref: ToyRef, stage: Stage
) -> None:
    held = ref.ask(Hold("a"), timeout_s=9)
    await stage.gates["a"].entered.wait()
    drain = asyncio.create_task(system.drain(10))
    await asyncio.sleep(0)
    drain.cancel()
    with pytest.raises(asyncio.CancelledError):
        await drain
    assert isinstance(ref.ask(Say("x"), timeout_s=1).exception(), UnavailableError)
    stage.gates["a"].opened.set()
    assert await held == "a"
