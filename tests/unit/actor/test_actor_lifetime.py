"""When an instance comes and goes: activation, idleness, stop, and the races between them."""

import asyncio
import gc
import tracemalloc
from dataclasses import dataclass

import pytest

from glamd.actor import Actor, ActorSpec, ActorState, Ref, System
from glamd.actor.system import BUSY_LIMIT, SWEEP_EVERY_S, SWEEP_SLICE
from glamd.actor.testing import VirtualClock
from glamd.errors import InternalError, UnavailableError
from tests.support.toy_actor import Fail, Hold, Message, Say, Stage

ToyRef = Ref[Message, str]


def pumps() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("actor")]


async def test_the_first_message_activates_and_an_idle_actor_has_no_task(
    system: System, ref: ToyRef, stage: Stage
) -> None:
    assert stage.journal == []
    await ref.ask(Say("1"), timeout_s=1)
    await ref.ask(Say("2"), timeout_s=1)
    assert stage.journal == ["k1 activate", "k1 1", "k1 2"]
    assert pumps() == []
    assert system.stats(key="k").actors[0].state is ActorState.IDLE


async def test_an_idle_instance_is_passivated_and_leaves_the_table(
    system: System, ref: ToyRef, stage: Stage, clock: VirtualClock
) -> None:
    await ref.ask(Say("1"), timeout_s=1)
    await clock.pass_s(59)
    assert len(system.stats().actors) == 1
    await clock.pass_s(1 + SWEEP_EVERY_S)
    assert system.stats().actors == ()
    await ref.ask(Say("2"), timeout_s=1)
    assert stage.journal == ["k1 activate", "k1 1", "k1 passivate", "k2 activate", "k2 2"]


async def test_each_message_puts_passivation_off(
    ref: ToyRef, stage: Stage, clock: VirtualClock
) -> None:
    for _ in range(10):
        await ref.ask(Say("x"), timeout_s=1)
        await clock.pass_s(50)
    assert stage.made["k"] == 1


async def test_a_busy_instance_is_never_idle(
    ref: ToyRef, stage: Stage, clock: VirtualClock
) -> None:
    held = ref.ask(Hold("a"), timeout_s=1000)
    await clock.pass_s(300)
    stage.gates["a"].opened.set()
    assert await held == "a"
    assert stage.journal == ["k1 activate", "k1 holds a", "k1 held a"]


async def test_a_message_right_after_the_removal_meets_a_fresh_instance(
    system: System, ref: ToyRef, stage: Stage, clock: VirtualClock
) -> None:
    await ref.ask(Say("1"), timeout_s=1)
    await clock.pass_s(59.5)
    clock_s = clock.monotonic_s() + 1
    system._all_cells()[0].sweep(clock_s)  # the sweeper's own decision, with no await after it
    late = ref.ask(Say("2"), timeout_s=1)
    assert await late == "2"
    assert stage.journal == ["k1 activate", "k1 1", "k1 passivate", "k2 activate", "k2 2"]


async def test_a_message_right_before_the_removal_keeps_the_instance(
    system: System, ref: ToyRef, stage: Stage, clock: VirtualClock
) -> None:
    await ref.ask(Say("1"), timeout_s=1)
    await clock.pass_s(59.5)
    early = ref.ask(Say("2"), timeout_s=1)
    system._all_cells()[0].sweep(clock.monotonic_s() + 1)
    assert await early == "2"
    assert stage.made["k"] == 1


async def test_messages_during_passivation_wait_for_a_fresh_instance(
    system: System, ref: ToyRef, stage: Stage, clock: VirtualClock
) -> None:
    stage.held.add("passivate")
    await ref.ask(Say("1"), timeout_s=1)
    await asyncio.wait_for(stage.gates["passivate"].entered.wait(), 62)
    assert system.stats(key="k").actors[0].state is ActorState.PASSIVATING
    asks = [ref.ask(Say(text), timeout_s=10) for text in ("2", "3")]
    await clock.pass_s(5)
    assert stage.made["k"] == 1
    stage.gates["passivate"].opened.set()
    assert await asyncio.gather(*asks) == ["2", "3"]
    assert stage.journal[2:] == ["k1 passivate", "k2 activate", "k2 2", "k2 3"]


async def test_an_old_sweep_does_not_remove_a_new_cell(
    system: System, ref: ToyRef, stage: Stage, clock: VirtualClock
) -> None:
    await ref.ask(Say("1"), timeout_s=1)
    old = system._all_cells()[0]
    system.stop("toy", "k")
    await clock.pass_s(0.1)
    await ref.ask(Say("2"), timeout_s=1)
    old.sweep(clock.monotonic_s() + 1000)
    await ref.ask(Say("3"), timeout_s=1)
    assert stage.journal[-2:] == ["k2 2", "k2 3"]


async def test_stop_passivates_after_what_waits_and_before_what_comes(
    system: System, ref: ToyRef, stage: Stage
) -> None:
    held = ref.ask(Hold("a"), timeout_s=5)
    before = ref.ask(Say("before"), timeout_s=5)
    await stage.gates["a"].entered.wait()
    for _ in range(100):
        system.stop("toy", "k")  # a hundred stops in a row are one
    after = ref.ask(Say("after"), timeout_s=5)
    assert not held.done()
    stage.gates["a"].opened.set()
    assert list(await asyncio.gather(held, before, after)) == ["a", "before", "after"]
    assert stage.journal == [
        "k1 activate", "k1 holds a", "k1 held a", "k1 before", "k1 passivate",
        "k2 activate", "k2 after",
    ]  # fmt: skip


async def test_stop_of_an_idle_instance_is_at_once(
    system: System, ref: ToyRef, stage: Stage, clock: VirtualClock
) -> None:
    await ref.ask(Say("1"), timeout_s=1)
    system.stop("toy", "k")
    await clock.pass_s(0)
    assert stage.journal[-1] == "k1 passivate"
    assert system.stats().actors == ()


async def test_stop_where_nobody_is_does_nothing(system: System, ref: ToyRef) -> None:
    system.stop("toy", "k")
    system.stop("no such kind", "k")
    assert system.stats().actors == ()
    assert await ref.ask(Say("1"), timeout_s=1) == "1"


async def test_stop_after_a_crash_does_not_wake_anybody(
    system: System, ref: ToyRef, stage: Stage, clock: VirtualClock
) -> None:
    with pytest.raises(InternalError):
        await ref.ask(Fail(ValueError("oops")), timeout_s=1)
    system.stop("toy", "k")
    await clock.pass_s(1)
    assert stage.journal == ["k1 activate"]


async def test_many_idle_instances_are_passivated_a_bounded_number_at_a_time(
    system: System, spec: ActorSpec[Message, str], stage: Stage, clock: VirtualClock
) -> None:
    keys = 3 * BUSY_LIMIT
    await asyncio.gather(
        *(system.ref(spec, str(n)).ask(Say("x"), timeout_s=9) for n in range(keys))
    )
    stage.held.add("passivate")
    await asyncio.wait_for(stage.gates["passivate"].entered.wait(), 62)
    await clock.pass_s(3)
    passivating = sum(entry.endswith("passivate") for entry in stage.journal)
    assert passivating <= BUSY_LIMIT + SWEEP_SLICE
    stage.gates["passivate"].opened.set()
    await clock.pass_s(2 * SWEEP_EVERY_S)
    assert system.stats().actors == ()


@dataclass(slots=True)
class Small(Actor[int, int]):
    """What a small actor keeps: its key and a number."""

    key: str
    total: int = 0

    async def receive(self, message: int) -> int:
        self.total += message
        return self.total


async def test_a_hundred_thousand_idle_actors_are_cheap(clock: VirtualClock) -> None:
    actors, wave = 100_000, 1000
    spec: ActorSpec[int, int] = ActorSpec(kind="small", factory=Small, idle_s=10_000)
    gc.collect()
    tracemalloc.start()
    try:
        system = System(clock=clock)
        for first in range(0, actors, wave):
            for n in range(first, first + wave):
                system.ref(spec, f"device-{n:08}").tell(1)
            await clock.pass_s(0)
        await clock.pass_s(2)
        gc.collect()
        used_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert system.stats(limit=0).kinds[0].actors == actors
    assert pumps() == []
    assert used_bytes / actors <= 2048
    assert used_bytes / actors <= 512, "it was 0.4 KiB once: what has grown?"
    assert await system.ref(spec, "device-00000042").ask(1, timeout_s=1) == 2


async def test_no_answer_of_an_ask_is_kept_until_its_timeout(
    system: System, ref: ToyRef, clock: VirtualClock
) -> None:
    await ref.ask(Say("x"), timeout_s=3600)
    with pytest.raises(UnavailableError):
        await ref.ask(Hold("a"), timeout_s=0.01)
    buckets = system._common.deadlines._buckets
    assert [len(bucket) for bucket in buckets.values()] == [0]
    await clock.pass_s(3601)
    assert buckets == {}
