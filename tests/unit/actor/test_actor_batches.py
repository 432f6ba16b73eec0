"""Actors that take several messages at once: who shares a batch, and who hears what."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from glamd.actor import Actor, ActorSpec, Ref, System
from glamd.errors import ConflictError, GlamError, InternalError, NotFoundError
from tests.support.toy_actor import Fail, Hold, Message, Say, Stage


@pytest.fixture
def batching(system: System, spec: ActorSpec[Message, str]) -> Ref[Message, str]:
    """Toys of three messages at once, in a mailbox that is longer."""
    return system.ref(replace(spec, kind="batching", batch_limit=3, mailbox_limit=16), "k")


async def test_one_batch_has_at_most_the_limit_and_all_keep_their_order(
    batching: Ref[Message, str], stage: Stage
) -> None:
    asks = [batching.ask(Say(str(n)), timeout_s=1) for n in range(7)]
    assert await asyncio.gather(*asks) == [str(n) for n in range(7)]
    assert stage.journal == [
        "k1 activate",
        "k1 batch of 3", "k1 0", "k1 1", "k1 2",
        "k1 batch of 3", "k1 3", "k1 4", "k1 5",
        "k1 batch of 1", "k1 6",
    ]  # fmt: skip


async def test_a_single_message_does_not_wait_for_company(
    batching: Ref[Message, str], stage: Stage
) -> None:
    assert await batching.ask(Say("alone"), timeout_s=1) == "alone"
    assert stage.journal[1] == "k1 batch of 1"


async def test_what_comes_during_a_batch_is_the_next_batch(
    batching: Ref[Message, str], stage: Stage
) -> None:
    held = batching.ask(Hold("a"), timeout_s=1)
    await stage.gates["a"].entered.wait()
    asks = [batching.ask(Say(text), timeout_s=1) for text in ("x", "y")]
    stage.gates["a"].opened.set()
    await asyncio.gather(held, *asks)
    assert [entry for entry in stage.journal if "batch" in entry] == [
        "k1 batch of 1", "k1 batch of 2",
    ]  # fmt: skip


async def test_an_error_among_the_results_is_one_asks_error(
    batching: Ref[Message, str], stage: Stage
) -> None:
    asks = [
        batching.ask(m, timeout_s=1) for m in (Say("1"), Fail(ConflictError("taken")), Say("3"))
    ]
    first, second, third = await asyncio.gather(*asks, return_exceptions=True)
    assert (first, third) == ("1", "3")
    assert isinstance(second, ConflictError)
    assert stage.made["k"] == 1


async def test_a_domain_error_of_the_whole_batch_answers_all_of_it(system: System) -> None:
    class Refuses(Actor[int, int]):
        async def receive_batch(self, messages: Sequence[int]) -> Sequence[int | GlamError]:
            raise NotFoundError(f"{len(messages)} refused")

    ref = system.ref(ActorSpec(kind="refuses", factory=lambda _: Refuses(), batch_limit=8), "k")
    answers = await asyncio.gather(
        *(ref.ask(n, timeout_s=1) for n in range(3)), return_exceptions=True
    )
    assert [str(answer) for answer in answers] == ["3 refused"] * 3


async def test_a_crash_costs_its_whole_batch_and_nothing_behind_it(
    batching: Ref[Message, str], stage: Stage
) -> None:
    asks = [
        batching.ask(m, timeout_s=1)
        for m in (Say("0"), Fail(ValueError("oops")), Say("2"), Say("3"))
    ]
    answers = await asyncio.gather(*asks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [
        InternalError, InternalError, InternalError, str,
    ]  # fmt: skip
    assert stage.journal[-3:] == ["k2 activate", "k2 batch of 1", "k2 3"]


async def test_a_stop_ends_a_batch(
    system: System, batching: Ref[Message, str], stage: Stage
) -> None:
    first = batching.ask(Say("1"), timeout_s=1)
    system.stop("batching", "k")
    second = batching.ask(Say("2"), timeout_s=1)
    await asyncio.gather(first, second)
    assert stage.journal == [
        "k1 activate", "k1 batch of 1", "k1 1", "k1 passivate",
        "k2 activate", "k2 batch of 1", "k2 2",
    ]  # fmt: skip


async def test_an_asker_that_left_does_not_shift_the_others_answers(
    batching: Ref[Message, str],
) -> None:
    asks = [batching.ask(Say(str(n)), timeout_s=1) for n in range(3)]
    asks[1].cancel()
    assert list(await asyncio.gather(asks[0], asks[2])) == ["0", "2"]


async def test_told_and_asked_messages_share_a_batch(
    system: System, batching: Ref[Message, str], stage: Stage
) -> None:
    batching.tell(Say("told"))
    batching.tell(Fail(ConflictError("taken")))
    assert await batching.ask(Say("asked"), timeout_s=1) == "asked"
    assert stage.journal[1] == "k1 batch of 3"
    assert system.stats(kind="batching").kinds[0].unheard == 1
