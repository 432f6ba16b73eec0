"""What a crash costs: one instance and one answer; and a key that crashes too often."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest

from glamd.actor import Actor, ActorSpec, ActorState, Ref, System
from glamd.actor.crashes import Crashes, where
from glamd.actor.testing import VirtualClock
from glamd.errors import GlamError, InternalError, NotFoundError, UnavailableError
from tests.support.toy_actor import Fail, Hold, Message, Say, Stage

ToyRef = Ref[Message, str]
Logs = list[dict[str, object]]


def state(system: System) -> ActorState:
    return system.stats(key="k").actors[0].state


async def crash(ref: ToyRef, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(InternalError, match="the toy failed while it handled this"):
            await ref.ask(Fail(ValueError("oops")), timeout_s=1)


async def refusal(ref: ToyRef) -> str:
    with pytest.raises(UnavailableError) as refused:
        await ref.ask(Say("refused"), timeout_s=1)
    return refused.value.code


async def test_a_crash_answers_its_ask_and_keeps_the_mailbox_for_a_fresh_instance(
    ref: ToyRef, stage: Stage
) -> None:
    asks = [ref.ask(m, timeout_s=1) for m in (Say("1"), Fail(KeyError("oops")), Say("2"), Say("3"))]
    answers = await asyncio.gather(*asks, return_exceptions=True)
    assert answers[0] == "1"
    assert isinstance(answers[1], InternalError)
    assert answers[2:] == ["2", "3"]
    # No on_passivate: what a crash leaves behind is not to be trusted with a last word.
    assert stage.journal == ["k1 activate", "k1 1", "k2 activate", "k2 2", "k2 3"]


async def test_a_crash_is_logged_once_with_its_actor_and_without_what_the_actor_was_given(
    ref: ToyRef, logged: Logs
) -> None:
    ref.tell(Fail(ValueError("track ;4111111111111111=2512 is odd")))
    await ref.ask(Say("next"), timeout_s=1)
    assert len(logged) == 1
    entry = logged[0]
    assert (entry["event"], entry["log_level"]) == ("actor_crashed", "error")
    assert (entry["kind"], entry["key"], entry["error"]) == ("toy", "k", "ValueError")
    assert any("toy_actor.py" in place for place in cast("list[str]", entry["places"]))
    assert "4111" not in repr(logged)


async def test_an_exception_that_another_cancelled_is_a_crash_and_not_the_pumps_end(
    ref: ToyRef, stage: Stage
) -> None:
    with pytest.raises(InternalError):
        await ref.ask(Fail(asyncio.CancelledError()), timeout_s=1)
    assert await ref.ask(Say("next"), timeout_s=1) == "next"
    assert stage.made["k"] == 2


async def test_past_the_limit_the_key_fails_fast_and_then_recovers(
    system: System, ref: ToyRef, stage: Stage, clock: VirtualClock, logged: Logs
) -> None:
    await crash(ref, 2)
    assert state(system) is ActorState.CRASHED
    await crash(ref)
    assert state(system) is ActorState.FAILING
    assert [entry["event"] for entry in logged] == ["actor_crashed"] * 3 + ["actor_failing"]
    made = stage.made["k"]
    assert await refusal(ref) == "ACTOR_FAILING"
    with pytest.raises(UnavailableError, match="failed too often"):
        ref.tell(Say("refused"))
    await clock.pass_s(4.9)
    assert await refusal(ref) == "ACTOR_FAILING"
    assert stage.made["k"] == made
    await clock.pass_s(0.2)
    assert await ref.ask(Say("well again"), timeout_s=1) == "well again"


async def test_a_key_that_recovered_fails_again_at_its_next_crash_within_the_window(
    ref: ToyRef, clock: VirtualClock
) -> None:
    await crash(ref, 3)
    await clock.pass_s(5.1)
    await crash(ref)
    assert await refusal(ref) == "ACTOR_FAILING"


async def test_crashes_outside_the_window_are_forgotten(ref: ToyRef, clock: VirtualClock) -> None:
    await crash(ref, 2)
    await clock.pass_s(31)
    await crash(ref, 2)
    assert await ref.ask(Say("still here"), timeout_s=1) == "still here"


async def test_what_waits_when_the_key_begins_to_fail_is_refused_at_once(
    ref: ToyRef, stage: Stage
) -> None:
    await crash(ref, 2)
    last = ref.ask(Fail(ValueError("oops")), timeout_s=1)
    behind = [ref.ask(Say("behind"), timeout_s=1) for _ in range(3)]
    answers = await asyncio.gather(last, *behind, return_exceptions=True)
    assert isinstance(answers[0], InternalError)
    codes = [answer.code for answer in answers[1:] if isinstance(answer, UnavailableError)]
    assert codes == ["ACTOR_FAILING"] * 3
    assert stage.journal.count("k3 activate") == 1
    assert not any("behind" in entry for entry in stage.journal)


async def test_one_failing_key_is_not_the_others_trouble(
    system: System, spec: ActorSpec[Message, str], ref: ToyRef
) -> None:
    await crash(ref, 3)
    assert await system.ref(spec, "other").ask(Say("fine"), timeout_s=1) == "fine"


async def test_a_failing_key_leaves_the_table_when_its_crashes_are_history(
    system: System, ref: ToyRef, clock: VirtualClock
) -> None:
    await crash(ref, 3)
    await clock.pass_s(25)
    assert len(system.stats().actors) == 1
    await clock.pass_s(10)
    assert system.stats().actors == ()


async def test_a_domain_error_at_activation_answers_all_who_wait_and_is_no_crash(
    system: System, ref: ToyRef, stage: Stage
) -> None:
    stage.held.add("activate")
    stage.activation_errors.append(UnavailableError("the database is away", code="DB_AWAY"))
    asks = [ref.ask(Say(str(n)), timeout_s=5) for n in range(2)]
    await stage.gates["activate"].entered.wait()
    system.stop("toy", "k")
    asks.append(ref.ask(Say("came meanwhile"), timeout_s=5))
    stage.gates["activate"].opened.set()
    answers = await asyncio.gather(*asks, return_exceptions=True)
    assert [getattr(answer, "code", None) for answer in answers] == ["DB_AWAY"] * 3
    assert system.stats().actors == ()
    assert await ref.ask(Say("tried again"), timeout_s=1) == "tried again"
    assert system.stats().kinds[0].restarts == 0


async def test_refused_activations_never_make_a_key_fail_fast(ref: ToyRef, stage: Stage) -> None:
    stage.activation_errors.extend(NotFoundError("nobody", code="NOBODY") for _ in range(20))
    for _ in range(20):
        with pytest.raises(NotFoundError):
            await ref.ask(Say("anybody there?"), timeout_s=1)
    assert await ref.ask(Say("now"), timeout_s=1) == "now"


async def test_a_crash_at_activation_costs_one_message_and_counts(
    system: System, ref: ToyRef, stage: Stage
) -> None:
    stage.activation_errors.append(ValueError("oops"))
    first, second = ref.ask(Say("1"), timeout_s=1), ref.ask(Say("2"), timeout_s=1)
    with pytest.raises(InternalError):
        await first
    assert await second == "2"
    assert system.stats(key="k").actors[0].restarts == 1


async def test_a_factory_that_fails_counts_like_a_crash_at_activation(system: System) -> None:
    def factory(key: str) -> Actor[str, str]:
        raise RuntimeError(key)

    spec: ActorSpec[str, str] = ActorSpec(kind="none", factory=factory, restart_limit=1)
    ref = system.ref(spec, "k")
    answers = await asyncio.gather(
        *(ref.ask("x", timeout_s=1) for _ in range(4)), return_exceptions=True
    )
    assert [getattr(answer, "code", None) for answer in answers] == [
        "INTERNAL_ERROR", "INTERNAL_ERROR", "ACTOR_FAILING", "ACTOR_FAILING",
    ]  # fmt: skip


async def test_a_crash_in_passivation_is_logged_and_the_next_message_meets_a_fresh_instance(
    system: System, ref: ToyRef, stage: Stage, logged: Logs
) -> None:
    stage.passivation_errors.append(OSError("flush"))
    await ref.ask(Say("1"), timeout_s=1)
    system.stop("toy", "k")
    assert await ref.ask(Say("2"), timeout_s=1) == "2"
    assert [entry["event"] for entry in logged] == ["actor_crashed"]
    assert stage.made["k"] == 2


async def test_a_domain_error_in_passivation_is_logged_by_its_code(
    system: System, ref: ToyRef, stage: Stage, logged: Logs
) -> None:
    stage.passivation_errors.append(UnavailableError("no flush", code="DB_AWAY"))
    await ref.ask(Say("1"), timeout_s=1)
    system.stop("toy", "k")
    await ref.ask(Say("2"), timeout_s=1)
    assert [(entry["event"], entry["code"]) for entry in logged] == [
        ("actor_error_unheard", "DB_AWAY")
    ]


async def test_an_actor_without_a_receive_crashes_instead_of_answering_none(
    system: System, spec: ActorSpec[Message, str]
) -> None:
    class Half(Actor[Message, str]):
        """Has neither receive nor receive_batch."""

    for kind, batch_limit in (("single", 1), ("batch", 2)):
        half = replace(spec, kind=kind, batch_limit=batch_limit, factory=lambda _: Half())
        with pytest.raises(InternalError):
            await system.ref(half, "k").ask(Say("x"), timeout_s=1)


async def test_a_result_count_that_is_wrong_is_a_crash_of_the_whole_batch(system: System) -> None:
    class Miscounts(Actor[int, int]):
        async def receive_batch(self, messages: Sequence[int]) -> Sequence[int | GlamError]:
            return messages[:1] if sum(messages) == 3 else messages

    spec: ActorSpec[int, int] = ActorSpec(
        kind="miscounts", factory=lambda _: Miscounts(), batch_limit=8
    )
    ref = system.ref(spec, "k")
    answers = await asyncio.gather(
        *(ref.ask(n, timeout_s=1) for n in range(3)), return_exceptions=True
    )
    assert all(isinstance(answer, InternalError) for answer in answers)
    assert await ref.ask(7, timeout_s=1) == 7


async def test_a_pump_that_is_cancelled_from_outside_ends_and_wedges_nothing(
    ref: ToyRef, stage: Stage
) -> None:
    held, behind = ref.ask(Hold("a"), timeout_s=5), ref.ask(Say("behind"), timeout_s=5)
    await stage.gates["a"].entered.wait()
    pump = next(task for task in asyncio.all_tasks() if task.get_name() == "actor toy k")
    pump.cancel()
    answers = await asyncio.gather(held, behind, return_exceptions=True)
    assert [getattr(answer, "code", None) for answer in answers] == ["DRAINING"] * 2
    assert pump.cancelled()
    assert await ref.ask(Say("next"), timeout_s=1) == "next"


def test_crashes_exactly_one_window_old_do_not_count(spec: ActorSpec[Message, str]) -> None:
    crashes = Crashes(cast("ActorSpec[object, object]", spec))
    assert [crashes.add(at_s) for at_s in (0.0, 1.0, 30.0, 30.5, 31.5)] == [
        False, False, False, True, True,
    ]  # fmt: skip
    assert len(crashes._times_s) == spec.restart_limit + 1
    assert crashes.is_failing(36.4)
    assert not crashes.is_failing(36.5)
    assert not crashes.is_history(61.4)
    assert crashes.is_history(61.5)


def test_the_places_of_a_crash_tell_its_causes_by_type_only() -> None:
    error, cause = ValueError("secret"), KeyError("4111111111111111")
    error.__cause__ = cause
    told = where(error)
    assert told["error"] == "ValueError"
    assert told["causes"] == ["KeyError"]
    assert "secret" not in repr(told)
    assert "4111" not in repr(told)
