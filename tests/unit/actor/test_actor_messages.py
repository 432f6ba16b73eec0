"""What a sender may rely on: order, one at a time, bounds, time-outs, and that nothing vanishes."""

import asyncio
import gc
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace

import pytest

from glamd.actor import Actor, ActorSpec, Ref, System
from glamd.actor.testing import VirtualClock
from glamd.errors import ConflictError, GlamError, NotFoundError, UnavailableError
from tests.support.toy_actor import Fail, Hold, Message, Say, Stage

ToyRef = Ref[Message, str]
LOCAL: ContextVar[str] = ContextVar("local", default="of the system")


def code(future: asyncio.Future[str]) -> str | None:
    """The code of the error that the future has; None while it has none."""
    error = future.exception() if future.done() else None
    return error.code if isinstance(error, GlamError) else None


async def test_a_full_mailbox_refuses_at_once(ref: ToyRef, stage: Stage) -> None:
    held = ref.ask(Hold("a"), timeout_s=5)
    await stage.gates["a"].entered.wait()
    waiting = [ref.ask(Say(str(n)), timeout_s=5) for n in range(4)]
    too_many = ref.ask(Say("too many"), timeout_s=5)
    assert code(too_many) == "MAILBOX_FULL"
    with pytest.raises(UnavailableError, match="too many messages wait for this toy") as refused:
        ref.tell(Say("told too many"))
    assert refused.value.code == "MAILBOX_FULL"
    stage.gates["a"].opened.set()
    assert await asyncio.gather(held, *waiting) == ["a", "0", "1", "2", "3"]
    assert not any("too many" in entry for entry in stage.journal)


async def test_a_full_mailbox_of_one_key_is_not_the_others_trouble(
    system: System, spec: ActorSpec[Message, str], stage: Stage
) -> None:
    full, free = system.ref(spec, "full"), system.ref(spec, "free")
    full.tell(Hold("a"))
    await stage.gates["a"].entered.wait()
    for _ in range(4):
        full.tell(Say("waits"))
    assert await free.ask(Say("through"), timeout_s=1) == "through"
    stage.gates["a"].opened.set()


async def test_a_timeout_leaves_the_receive_running_and_its_effect(
    ref: ToyRef, stage: Stage, clock: VirtualClock
) -> None:
    began_s = clock.monotonic_s()
    with pytest.raises(UnavailableError) as late:
        await ref.ask(Hold("a"), timeout_s=2)
    assert late.value.code == "ASK_TIMEOUT"
    assert 2 <= clock.monotonic_s() - began_s <= 2.05
    stage.gates["a"].opened.set()
    assert await ref.ask(Say("next"), timeout_s=1) == "next"
    assert stage.journal == ["k1 activate", "k1 holds a", "k1 held a", "k1 next"]


async def test_a_message_that_timed_out_while_it_waited_is_still_handled_in_its_turn(
    ref: ToyRef, stage: Stage
) -> None:
    ref.tell(Hold("a"))
    with pytest.raises(UnavailableError):
        await ref.ask(Say("late"), timeout_s=0.2)
    stage.gates["a"].opened.set()
    await ref.ask(Say("after"), timeout_s=1)
    assert stage.journal[-2:] == ["k1 late", "k1 after"]


async def test_timeouts_of_many_lengths_all_end_in_time(
    ref: ToyRef, stage: Stage, clock: VirtualClock
) -> None:
    ref.tell(Hold("a"))
    ended: list[tuple[float, float]] = []

    async def ask(timeout_s: float) -> None:
        with pytest.raises(UnavailableError):
            await ref.ask(Say("x"), timeout_s=timeout_s)
        ended.append((timeout_s, clock.monotonic_s()))

    await asyncio.gather(*(ask(timeout_s) for timeout_s in (3.0, 0.001, 0.5, 0.0)))
    assert len(ended) == 4
    assert all(timeout_s <= at_s <= timeout_s + 0.05 for timeout_s, at_s in ended)
    stage.gates["a"].opened.set()


async def test_an_asker_that_is_cancelled_does_not_cancel_the_receive(
    ref: ToyRef, stage: Stage
) -> None:
    async def ask() -> str:
        return await ref.ask(Hold("a"), timeout_s=60)

    asker = asyncio.create_task(ask())
    await stage.gates["a"].entered.wait()
    asker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asker
    stage.gates["a"].opened.set()
    await ref.ask(Say("next"), timeout_s=1)
    assert stage.journal == ["k1 activate", "k1 holds a", "k1 held a", "k1 next"]


async def test_two_asks_never_overlap_and_keep_their_order(ref: ToyRef, stage: Stage) -> None:
    # The stage itself fails the test where two methods of one key overlap.
    for name in ("a", "b"):
        stage.gates[name].opened.set()
    answers = [ref.ask(m, timeout_s=1) for m in (Hold("a"), Say("1"), Hold("b"), Say("2"))]
    assert await asyncio.gather(*answers) == ["a", "1", "b", "2"]
    assert stage.journal[1:] == [
        "k1 holds a", "k1 held a", "k1 1", "k1 holds b", "k1 held b", "k1 2",
    ]  # fmt: skip


async def test_asks_and_tells_of_one_sender_stay_in_order_across_refs(
    system: System, spec: ActorSpec[Message, str], stage: Stage
) -> None:
    system.ref(spec, "k").tell(Say("1"))
    second = system.ref(spec, "k").ask(Say("2"), timeout_s=1)
    system.ref(replace(spec), "k").tell(Say("3"))
    await system.ref(spec, "k").ask(Say("4"), timeout_s=1)
    assert stage.journal == ["k1 activate", "k1 1", "k1 2", "k1 3", "k1 4"]
    assert second.result() == "2"


async def test_keys_do_not_wait_for_each_other(
    system: System, spec: ActorSpec[Message, str], stage: Stage
) -> None:
    held = system.ref(spec, "slow").ask(Hold("a"), timeout_s=5)
    assert await system.ref(spec, "quick").ask(Say("done"), timeout_s=1) == "done"
    assert not held.done()
    stage.gates["a"].opened.set()
    assert await held == "a"


async def test_a_domain_error_is_an_answer_and_the_instance_stays(
    ref: ToyRef, stage: Stage
) -> None:
    with pytest.raises(NotFoundError, match="no such thing"):
        await ref.ask(Fail(NotFoundError("no such thing")), timeout_s=1)
    await ref.ask(Say("next"), timeout_s=1)
    assert stage.made["k"] == 1


async def test_an_answer_does_not_keep_the_message_alive(ref: ToyRef) -> None:
    error = NotFoundError("no such thing")
    future = ref.ask(Fail(error), timeout_s=1)
    await asyncio.wait([future])
    assert error.__traceback__ is None


async def test_errors_of_abandoned_asks_are_not_complained_about_later(
    ref: ToyRef, stage: Stage
) -> None:
    # The fixture fails the test if asyncio finds an exception that nobody retrieved.
    ref.ask(Fail(ConflictError("nobody reads this")), timeout_s=1)
    ref.ask(Fail(ValueError("nor this")), timeout_s=1)
    ref.ask(Hold("a"), timeout_s=0.1)
    await stage.gates["a"].entered.wait()
    for _ in range(6):
        ref.ask(Say("too many"), timeout_s=0.1)
    with pytest.raises(UnavailableError):
        await ref.ask(Say("one that is awaited"), timeout_s=0.2)
    gc.collect()
    stage.gates["a"].opened.set()


async def test_an_error_that_nobody_is_left_to_hear_is_logged_by_its_code(
    system: System, ref: ToyRef, stage: Stage, logged: list[dict[str, object]]
) -> None:
    ref.tell(Fail(ConflictError("4111111111111111 is taken", code="TAKEN")))
    ref.ask(Fail(ConflictError("gone by then", code="LATE")), timeout_s=1).cancel()
    await ref.ask(Say("after both"), timeout_s=1)
    assert [(each["event"], each["kind"], each["key"], each["code"]) for each in logged] == [
        ("actor_error_unheard", "toy", "k", "TAKEN"),
        ("actor_error_unheard", "toy", "k", "LATE"),
    ]
    assert "4111" not in repr(logged)
    assert system.stats().kinds[0].unheard == 2


async def test_a_receive_does_not_run_in_its_senders_context(system: System) -> None:
    class Looker(Actor[str, str]):
        async def receive(self, message: str) -> str:
            seen = LOCAL.get()
            LOCAL.set(message)
            return seen

    looker = system.ref(ActorSpec(kind="looker", factory=lambda _: Looker()), "k")
    token = LOCAL.set("of the sender")
    assert await looker.ask("first", timeout_s=1) == "of the system"
    LOCAL.reset(token)
    assert await looker.ask("second", timeout_s=1) == "of the system"


async def test_a_receive_is_a_task_with_a_name_and_may_have_timeouts(system: System) -> None:
    class Sleeper(Actor[float, str]):
        async def receive(self, message: float) -> str:
            try:
                async with asyncio.timeout(message):
                    await asyncio.Event().wait()
            except TimeoutError:
                pass
            task = asyncio.current_task()
            return "" if task is None else task.get_name()

    sleeper = system.ref(ActorSpec(kind="sleeper", factory=lambda _: Sleeper()), "k")
    assert await sleeper.ask(1.0, timeout_s=2) == "actor sleeper k"


async def test_an_actor_that_never_waits_lets_the_others_run(
    system: System, stage: Stage, spec: ActorSpec[Message, str]
) -> None:
    class Chatter(Actor[int, None]):
        async def receive(self, message: int) -> None:
            if not stage.gates["enough"].opened.is_set():
                system.ref(chatter, "k").tell(message + 1)

    chatter: ActorSpec[int, None] = ActorSpec(kind="chatter", factory=lambda _: Chatter())
    system.ref(chatter, "k").tell(0)
    assert await system.ref(spec, "other").ask(Say("through"), timeout_s=1) == "through"
    stage.gates["enough"].opened.set()


async def test_a_ref_is_cheap_and_needs_nobody_there(
    system: System, spec: ActorSpec[Message, str]
) -> None:
    assert repr(system.ref(spec, "nobody")) == "Ref('toy', 'nobody')"
    assert system.stats().kinds[0].actors == 0


async def test_two_specs_cannot_share_a_kind(system: System, spec: ActorSpec[Message, str]) -> None:
    system.ref(spec, "k")
    with pytest.raises(ValueError, match="two specs for actor kind 'toy'"):
        system.ref(replace(spec, mailbox_limit=5), "k")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda spec: replace(spec, kind=""),
        lambda spec: replace(spec, mailbox_limit=0),
        lambda spec: replace(spec, batch_limit=0),
        lambda spec: replace(spec, restart_limit=-1),
        lambda spec: replace(spec, idle_s=0),
        lambda spec: replace(spec, restart_window_s=0),
        lambda spec: replace(spec, fail_fast_s=-1),
    ],
)
def test_a_spec_without_bounds_is_not_made(
    wrong: Callable[[ActorSpec[Message, str]], object], spec: ActorSpec[Message, str]
) -> None:
    with pytest.raises(ValueError, match=r"actor"):
        wrong(spec)
