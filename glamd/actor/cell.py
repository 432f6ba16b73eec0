"""The table of the actors: kinds, their keys, and the pump that brings messages to an instance.

A cell is what is kept of one key. At rest it holds the instance and nothing else: no task, no
queue. The first message makes a mailbox and a task, the pump, which handles what waits and ends.
"Has a mailbox" and "has a pump" are one fact, and nothing but the pump ever calls the instance.

A mailbox holds envelopes, and None where the instance is to be passivated. Idle passivation is
such a None in an empty mailbox: whatever comes later stands behind it and meets a fresh instance.
No decision here has an await between the look and the deed.

Addresses, the sweeper and the drain are not here but in `glamd.actor.system`.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence, Sized
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from typing import Final

import structlog

from glamd.actor.actor import Actor, ActorSpec
from glamd.actor.crashes import Crashes, WrongResultCountError, where
from glamd.actor.mailbox import Deadlines, Envelope, Mailbox, answer, refuse
from glamd.actor.reports import ActorState, ActorStats, KindStats
from glamd.clock import Clock
from glamd.errors import GlamError, InternalError, UnavailableError

log = structlog.get_logger()

PUMP_TURNS_LIMIT: Final = 64
"""Turns of a pump until it lets the loop run, lest an actor that never waits keeps it."""

REFUSALS: Final = {
    "MAILBOX_FULL": "too many messages wait for this {kind}",
    "ACTOR_FAILING": "this {kind} failed too often just now",
    "DRAINING": "the service is shutting down",
    "ASK_TIMEOUT": "no answer from the {kind} in time; it may still come to pass",
}

INSIDE: Final[ContextVar["Common | None"]] = ContextVar("actor_system", default=None)
"""The system whose actor is running, seen by whatever that actor starts."""


@dataclass(slots=True, eq=False)
class Common:
    """What all cells of one system share."""

    clock: Clock
    loop: asyncio.AbstractEventLoop
    deadlines: Deadlines
    context: Context
    busy: set["Cell"] = field(default_factory=set)
    rested: asyncio.Event = field(default_factory=asyncio.Event)
    draining: bool = False


class Kind:
    """All cells of one spec, and their counts."""

    __slots__ = (
        "activations",
        "cells",
        "common",
        "handled",
        "passivations",
        "refused",
        "restarts",
        "spec",
        "timeouts",
        "unheard",
    )

    def __init__(self, spec: ActorSpec[object, object], common: Common) -> None:
        self.spec = spec
        self.common = common
        self.cells: dict[str, Cell] = {}
        self.handled = self.activations = self.passivations = 0
        self.restarts = self.timeouts = self.unheard = 0
        self.refused: Counter[str] = Counter()

    def post(self, key: str, envelope: Envelope) -> UnavailableError | None:
        """Put a message into the key's mailbox, or say why not."""
        common = self.common
        # While draining, an actor that finishes what was accepted may still ask others.
        if common.draining and INSIDE.get() is not common:
            return self.refusal("DRAINING")
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = Cell(self, key)
        return cell.post(envelope)

    def refusal(self, code: str) -> UnavailableError:
        """Count a message that is not handled, and make its error."""
        self.refused[code] += 1
        return UnavailableError(REFUSALS[code].format(kind=self.spec.kind), code=code)

    def timed_out(self) -> UnavailableError:
        """Count an ask that waited long enough, and make its error."""
        self.timeouts += 1
        return UnavailableError(
            REFUSALS["ASK_TIMEOUT"].format(kind=self.spec.kind), code="ASK_TIMEOUT"
        )

    def stats(self) -> KindStats:
        """The kind's counts."""
        return KindStats(
            kind=self.spec.kind,
            actors=len(self.cells),
            mailbox=sum(cell.waiting() for cell in self.common.busy if cell.kind is self),
            handled=self.handled,
            activations=self.activations,
            passivations=self.passivations,
            restarts=self.restarts,
            timeouts=self.timeouts,
            unheard=self.unheard,
            refused=dict(self.refused),
        )


class Cell:
    """The instance of one key, if there is one, and what waits for it."""

    __slots__ = (
        "_crashes",
        "_idle_since_s",
        "_mailbox",
        "_phase",
        "actor",
        "handled",
        "key",
        "kind",
        "pump",
    )

    def __init__(self, kind: Kind, key: str) -> None:
        self.kind = kind
        self.key = key
        self.actor: Actor[object, object] | None = None
        self.pump: asyncio.Task[None] | None = None
        self.handled = 0
        self._mailbox: Mailbox | None = None
        self._phase = ActorState.RECEIVING
        self._idle_since_s = 0.0
        self._crashes: Crashes | None = None

    # What others do to a cell, always at once.

    def post(self, envelope: Envelope) -> UnavailableError | None:
        """Take the message, or say why not."""
        mailbox = self._mailbox
        if mailbox is None:
            if self._crashes is not None and self._crashes.is_failing(self._now_s()):
                return self.kind.refusal("ACTOR_FAILING")
            self._start(Mailbox((envelope,)))
        elif len(mailbox) >= self.kind.spec.mailbox_limit:
            return self.kind.refusal("MAILBOX_FULL")
        else:
            mailbox.append(envelope)
        return None

    def stop(self) -> None:
        """Passivate the instance after what is in the mailbox now."""
        mailbox = self._mailbox
        if mailbox is None:
            if self.actor is not None:
                self._start(Mailbox((None,)))
        else:
            mailbox.add_stop()

    def sweep(self, now_s: float) -> None:
        """Passivate an instance whose time is over; forget a key of which nothing is left."""
        if self._mailbox is not None:
            return
        if self._crashes is not None and self._crashes.is_history(now_s):
            self._crashes = None
        if self.actor is None:
            self.forget_if_empty()
        elif now_s - self._idle_since_s >= self.kind.spec.idle_s:
            self.stop()

    def forget_if_empty(self) -> None:
        """Leave the table unless there is an instance or a crash to be kept."""
        # A sweep may still hold a cell that has left; its key may have a new one by now.
        is_empty = self.actor is None and self._crashes is None
        if is_empty and self.kind.cells.get(self.key) is self:
            del self.kind.cells[self.key]

    def waiting(self) -> int:
        """How many messages wait, the ones being handled not counted."""
        return 0 if self._mailbox is None else self._mailbox.messages()

    def abandon(self) -> int:
        """Refuse all that waits and cancel what runs; how many messages were refused."""
        refused = self._refuse_waiting("DRAINING")
        if self.pump is not None:
            self.pump.cancel()
        return refused

    def stats(self, now_s: float) -> ActorStats:
        """This key's state and counts."""
        crashes = self._crashes
        if self._mailbox is not None:
            state = self._phase
        elif crashes is not None and crashes.is_failing(now_s):
            state = ActorState.FAILING
        else:
            state = ActorState.CRASHED if self.actor is None else ActorState.IDLE
        return ActorStats(
            kind=self.kind.spec.kind,
            key=self.key,
            state=state,
            mailbox=self.waiting(),
            handled=self.handled,
            restarts=0 if crashes is None else crashes.count,
            idle_s=0.0 if self._mailbox is not None else now_s - self._idle_since_s,
        )

    # The pump.

    def _now_s(self) -> float:
        return self.kind.common.clock.monotonic_s()

    def _start(self, mailbox: Mailbox) -> None:
        common = self.kind.common
        self._mailbox = mailbox
        common.busy.add(self)
        self.pump = common.loop.create_task(
            self._pump(mailbox),
            name=f"actor {self.kind.spec.kind} {self.key}",
            context=common.context.copy(),
        )

    async def _pump(self, mailbox: Mailbox) -> None:
        batch_limit = self.kind.spec.batch_limit
        turns = 0
        try:
            while mailbox:
                head, actor = mailbox[0], self.actor
                if head is None:
                    mailbox.popleft()
                    await self._passivate()
                elif actor is None:
                    await self._activate(mailbox)
                elif batch_limit > 1:
                    await self._receive_batch(actor, mailbox.take(batch_limit))
                else:
                    mailbox.popleft()
                    await self._receive_one(actor, head)
                turns += 1
                if mailbox and turns % PUMP_TURNS_LIMIT == 0:
                    await asyncio.sleep(0)
        finally:
            self._rest()

    def _rest(self) -> None:
        common = self.kind.common
        if self._mailbox:
            # Only a cancelled pump leaves something.
            self._refuse_waiting("DRAINING")
        self._mailbox = self.pump = None
        self._idle_since_s = self._now_s()
        common.busy.discard(self)
        if self.actor is None:
            self.forget_if_empty()
        if common.draining:
            common.rested.set()

    async def _activate(self, mailbox: Mailbox) -> None:
        self._phase = ActorState.ACTIVATING
        try:
            actor = self.kind.spec.factory(self.key)
            await actor.on_activate()
        except GlamError as error:
            # Whoever waits would only get the same answer later, one slow attempt after the other.
            self._answer_error(mailbox.take_all(), error)
        except BaseException as error:
            if not self._crashed(error, mailbox.take(1)):
                raise
        else:
            self.actor = actor
            self.kind.activations += 1
        self._phase = ActorState.RECEIVING

    async def _receive_one(self, actor: Actor[object, object], envelope: Envelope) -> None:
        try:
            result = await actor.receive(envelope[0])
        except GlamError as error:
            self._answer_error((envelope,), error)
        except BaseException as error:
            if not self._crashed(error, (envelope,)):
                raise
        else:
            answer(envelope, result)
        self._count_handled(1)

    async def _receive_batch(self, actor: Actor[object, object], batch: Sequence[Envelope]) -> None:
        try:
            results = await actor.receive_batch([envelope[0] for envelope in batch])
            _expect_one_each(results, batch)
        except GlamError as error:
            self._answer_error(batch, error)
        except BaseException as error:
            if not self._crashed(error, batch):
                raise
        else:
            for envelope, result in zip(batch, results, strict=True):
                if isinstance(result, GlamError):
                    self._answer_error((envelope,), result)
                else:
                    answer(envelope, result)
        self._count_handled(len(batch))

    async def _passivate(self) -> None:
        actor, self.actor = self.actor, None
        if actor is None:
            return
        self._phase = ActorState.PASSIVATING
        try:
            await actor.on_passivate()
        except GlamError as error:
            self._log_unheard(error)
        except BaseException as error:
            if not self._crashed(error, ()):
                raise
        self.kind.passivations += 1
        self._phase = ActorState.RECEIVING

    def _count_handled(self, messages: int) -> None:
        self.handled += messages
        self.kind.handled += messages

    # What goes wrong.

    def _answer_error(self, envelopes: Sequence[Envelope], error: GlamError) -> None:
        for envelope in envelopes:
            if not refuse(envelope, error):
                self._log_unheard(error)

    def _log_unheard(self, error: GlamError) -> None:
        self.kind.unheard += 1
        log.warning("actor_error_unheard", kind=self.kind.spec.kind, key=self.key, code=error.code)

    def _refuse_waiting(self, code: str) -> int:
        waiting = [] if self._mailbox is None else self._mailbox.take_all()
        self._refuse_all(waiting, code)
        return len(waiting)

    def _refuse_all(self, envelopes: Sequence[Envelope], code: str) -> None:
        for envelope in envelopes:
            refuse(envelope, self.kind.refusal(code))

    def _crashed(self, error: BaseException, envelopes: Sequence[Envelope]) -> bool:
        """Drop the instance, answer what it was handling; False where the pump must end too."""
        self.actor = None
        if isinstance(error, asyncio.CancelledError):
            # A pump that nobody cancelled has no cancellation to obey: the actor waited for
            # something that another cancelled, which is a failure like any other.
            ends = self.pump is not None and self.pump.cancelling() > 0
        else:
            ends = not isinstance(error, Exception)
        if ends:
            self._refuse_all(envelopes, "DRAINING")
            return False
        kind = self.kind.spec.kind
        for envelope in envelopes:
            refuse(envelope, InternalError(f"the {kind} failed while it handled this"))
        self._remember_crash(error)
        return True

    def _remember_crash(self, error: BaseException) -> None:
        kind, now_s = self.kind, self._now_s()
        kind.restarts += 1
        log.error("actor_crashed", kind=kind.spec.kind, key=self.key, **where(error))
        self._crashes = self._crashes or Crashes(kind.spec)
        if self._crashes.add(now_s):
            refused = self._refuse_waiting("ACTOR_FAILING")
            log.error(
                "actor_failing",
                kind=kind.spec.kind,
                key=self.key,
                fail_fast_s=kind.spec.fail_fast_s,
                refused_messages=refused,
            )


def _expect_one_each(results: Sized, batch: Sized) -> None:
    if len(results) != len(batch):
        raise WrongResultCountError
