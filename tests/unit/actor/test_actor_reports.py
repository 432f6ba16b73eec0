"""The numbers: for `glamctl` by key, for Prometheus by kind, and never what a message holds."""

import asyncio
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from glamd.actor import ActorCollector, ActorSpec, ActorState, Ref, System
from glamd.actor.testing import VirtualClock
from glamd.errors import InternalError, UnavailableError
from tests.support.toy_actor import Fail, Hold, Message, Say, Stage

ToyRef = Ref[Message, str]


async def test_a_busy_actor_shows_what_waits(system: System, ref: ToyRef, stage: Stage) -> None:
    ref.tell(Say("done"))
    ref.tell(Hold("a"))
    await stage.gates["a"].entered.wait()
    for _ in range(3):
        ref.tell(Say("secret 4111111111111111"))
    system.stop("toy", "k")
    stats = system.stats()
    (actor,) = stats.actors
    assert (actor.kind, actor.key, actor.state) == ("toy", "k", ActorState.RECEIVING)
    assert (actor.mailbox, actor.handled, actor.restarts, actor.idle_s) == (3, 1, 0, 0.0)
    assert (stats.kinds[0].actors, stats.kinds[0].mailbox) == (1, 3)
    assert "4111" not in repr(stats)
    stage.gates["a"].opened.set()


async def test_an_idle_actor_shows_for_how_long(
    system: System, ref: ToyRef, clock: VirtualClock
) -> None:
    await ref.ask(Say("x"), timeout_s=1)
    await clock.pass_s(12.5)
    (actor,) = system.stats().actors
    assert (actor.state, actor.idle_s, actor.mailbox) == (ActorState.IDLE, 12.5, 0)


async def test_states_of_coming_and_going(system: System, ref: ToyRef, stage: Stage) -> None:
    stage.held.update({"activate", "passivate"})
    ref.tell(Say("x"))
    await stage.gates["activate"].entered.wait()
    assert system.stats().actors[0].state is ActorState.ACTIVATING
    stage.gates["activate"].opened.set()
    system.stop("toy", "k")
    await stage.gates["passivate"].entered.wait()
    assert system.stats().actors[0].state is ActorState.PASSIVATING
    stage.gates["passivate"].opened.set()


async def test_stats_can_be_of_one_kind_of_one_key_or_of_few(
    system: System, spec: ActorSpec[Message, str], stage: Stage
) -> None:
    other = replace(spec, kind="other")
    await system.ref(spec, "1").ask(Say("x"), timeout_s=1)
    await system.ref(spec, "2").ask(Say("x"), timeout_s=1)
    await system.ref(other, "1").ask(Say("x"), timeout_s=1)
    system.ref(other, "2").tell(Hold("a"))
    await stage.gates["a"].entered.wait()

    def names(
        kind: str | None = None, key: str | None = None, limit: int = 9
    ) -> list[tuple[str, str]]:
        actors = system.stats(kind=kind, key=key, limit=limit).actors
        return [(actor.kind, actor.key) for actor in actors]

    assert names() == [("other", "2"), ("toy", "1"), ("toy", "2"), ("other", "1")]
    assert names(kind="toy") == [("toy", "1"), ("toy", "2")]
    assert names(key="1") == [("toy", "1"), ("other", "1")]
    assert names(kind="other", key="1") == [("other", "1")]
    assert names(kind="none") == names(key="none") == names(limit=0) == []
    assert names(limit=1) == [("other", "2")]
    stage.gates["a"].opened.set()


async def test_the_counts_of_a_kind_reach_prometheus(
    system: System, ref: ToyRef, stage: Stage, clock: VirtualClock
) -> None:
    registry = CollectorRegistry()
    registry.register(ActorCollector(system))
    await ref.ask(Say("x"), timeout_s=1)
    with pytest.raises(InternalError):
        await ref.ask(Fail(ValueError("oops")), timeout_s=1)
    with pytest.raises(UnavailableError):
        await ref.ask(Hold("a"), timeout_s=0.1)
    full = [ref.ask(Say("x"), timeout_s=1) for _ in range(6)]
    shown = generate_latest(registry).decode()
    for line in (
        'glamd_actor_instances{kind="toy"} 1.0',
        'glamd_actor_mailbox_messages{kind="toy"} 4.0',
        'glamd_actor_handled_messages_total{kind="toy"} 2.0',
        'glamd_actor_refused_messages_total{code="MAILBOX_FULL",kind="toy"} 2.0',
        'glamd_actor_activations_total{kind="toy"} 2.0',
        'glamd_actor_crashes_total{kind="toy"} 1.0',
        'glamd_actor_timed_out_asks_total{kind="toy"} 1.0',
        'glamd_actor_unheard_errors_total{kind="toy"} 0.0',
    ):
        assert line in shown.splitlines()
    stage.gates["a"].opened.set()
    await asyncio.wait(full)
    await clock.pass_s(62)
    assert 'glamd_actor_passivations_total{kind="toy"} 1.0' in generate_latest(registry).decode()
