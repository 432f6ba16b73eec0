"""The ledger beside a model that fits on a page, through whatever hypothesis can think of.

Two nodes, one of them behind a proxy that loses questions and answers; a third writer that applies
within transactions of its own; crashes between decision and commit; repetitions of everything. The
model knows an account as a number and its used references. After each step the books in the
database have gone on as the model says, every answer is true, and the events are there once each.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar
from uuid import UUID

import hypothesis
import uvloop
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from glamd.clock import SystemClock
from glamd.errors import GlamError, TransientError
from glamd.ledger.model import (
    Applied,
    Command,
    DuplicateTransactionError,
    InsufficientCreditsError,
    Reference,
    Transaction,
)
from glamd.ledger.verify import verify
from tests.support.database_proxy import DatabaseProxy
from tests.support.ledgers import Node, command, events, merchant, node
from tests.support.postgres import eventually

T = TypeVar("T")
Answer: TypeAlias = Applied | GlamError

THRESHOLD = 100
MERCHANTS = 2
EXAMPLES = 15
STEPS = 10


@dataclass(slots=True)
class Model:
    """What an account is: a balance, what its references have had, and what was told."""

    balance: int = 0
    used: dict[Reference, Transaction] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    refused: int = 0

    def move(self, moved: Transaction) -> None:
        """Take over a transaction, if it is one that may come next."""
        assert moved.seq == len(self.used) + 1
        assert moved.reference not in self.used
        assert moved.balance_before == self.balance
        sign = 1 if moved.operation == "credit" else -1
        self.balance += sign * moved.amount
        assert moved.balance_after == self.balance >= 0
        self.used[moved.reference] = moved
        self.told.append("granted" if moved.operation == "credit" else "consumed")
        if moved.balance_after < THRESHOLD <= moved.balance_before:
            self.told.append("low_balance")
        if moved.balance_after == 0:
            self.told.append("exhausted")


class World:
    """Everything that outlives one example: the database, the nodes, the proxy, the loop."""

    def __init__(self, url: str, runner: asyncio.Runner) -> None:
        self.url = url
        self.runner = runner
        self._nodes = AsyncExitStack()
        self.proxy = DatabaseProxy(url)
        self.here: Node
        self.there: Node
        self._life = AsyncExitStack()

    def run(self, work: Coroutine[object, object, T]) -> T:
        """Run something on the world's loop."""
        return self.runner.run(work)

    async def begin(self) -> None:
        """Start both nodes."""
        await self._nodes.enter_async_context(self.proxy)
        self.here = await self._nodes.enter_async_context(node(self.url))
        self.there = await self._life.enter_async_context(node(self.proxy.url, connections=1))

    async def crash(self) -> None:
        """End the other node as a killed process ends, and start it again."""
        await self.there.ledger.stop(0.0)
        await self.there.system.drain(0.01)
        await self._life.aclose()
        self.there = await self._life.enter_async_context(node(self.proxy.url, connections=1))

    async def end(self) -> None:
        """Stop everything."""
        await self._life.aclose()
        await self._nodes.aclose()


@st.composite
def wishes(draw: st.DrawFn) -> tuple[str, int, str]:
    """An operation, an amount, and one of a few references, so that many come again."""
    return (
        draw(st.sampled_from(("credit", "debit", "debit"))),
        draw(st.one_of(st.integers(1, 5), st.integers(90, 130))),
        draw(st.sampled_from("abcdefghijkl")),
    )


whose = st.integers(0, MERCHANTS - 1)


class LedgerMachine(RuleBasedStateMachine):
    """Steps on a few fresh accounts."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.models: dict[UUID, Model] = {}
        for _ in range(MERCHANTS):
            self.models[world.run(merchant(world.here))] = Model()
        self.merchants = list(self.models)

    @rule(n=whose, wish=wishes(), elsewhere=st.booleans())
    def one(self, n: int, wish: tuple[str, int, str], elsewhere: bool) -> None:
        """One command, at one of the nodes."""
        at = self.world.there if elsewhere else self.world.here
        self.world.run(self.step([(at, self.command(n, wish))]))

    @rule(asked=st.lists(st.tuples(st.booleans(), whose, wishes()), min_size=2, max_size=12))
    def burst(self, asked: list[tuple[bool, int, tuple[str, int, str]]]) -> None:
        """Many commands at once, at both nodes."""
        there, here = self.world.there, self.world.here
        self.world.run(
            self.step([(there if e else here, self.command(n, wish)) for e, n, wish in asked])
        )

    @rule(n=whose, wish=wishes(), commits=st.booleans(), others=st.lists(wishes(), max_size=4))
    def within(
        self, n: int, wish: tuple[str, int, str], commits: bool, others: list[tuple[str, int, str]]
    ) -> None:
        """Another writer's transaction, committed or not, while a node is asked as well."""
        asked = [(self.world.there, self.command(n, other)) for other in others]
        self.world.run(self.step(asked, self.command(n, wish), commits=commits))

    @rule(
        asked=st.lists(st.tuples(whose, wishes()), min_size=1, max_size=6),
        question=st.integers(0, 3),
        answer=st.integers(0, 3),
    )
    def lossy(
        self, asked: list[tuple[int, tuple[str, int, str]]], question: int, answer: int
    ) -> None:
        """Commands at the far node, of whose questions and answers one gets lost."""
        proxy = self.world.proxy
        proxy.lose_question, proxy.lose_answer = question, answer
        self.world.run(
            self.step([(self.world.there, self.command(n, wish)) for n, wish in asked], lossy=True)
        )
        proxy.lose_question = proxy.lose_answer = 0

    @rule(
        asked=st.lists(st.tuples(whose, wishes()), min_size=1, max_size=6), turns=st.integers(0, 8)
    )
    def crash(self, asked: list[tuple[int, tuple[str, int, str]]], turns: int) -> None:
        """The far node dies with commands under way; they are sent again, elsewhere."""
        self.world.run(self.crashing([self.command(n, wish) for n, wish in asked], turns))

    def teardown(self) -> None:
        """The books are right, by the ledger's own word too."""
        report = self.world.run(verify(self.world.here.database, self.merchants))
        assert report.broken == ()
        assert report.transactions == sum(len(model.used) for model in self.models.values())

    def command(self, n: int, wish: tuple[str, int, str]) -> Command:
        """A wish of one of the merchants."""
        operation, amount, reference = wish
        return command(
            self.merchants[n], "credit" if operation == "credit" else "debit", amount, reference
        )

    async def step(
        self,
        asked: Sequence[tuple[Node, Command]],
        within: Command | None = None,
        *,
        commits: bool = True,
        lossy: bool = False,
    ) -> None:
        """Ask, insist on answers, and see what has become of it."""
        answers = [asyncio.create_task(insist(at, wanted)) for at, wanted in asked]
        commands = [wanted for _, wanted in asked]
        if within is not None:
            answer = await apply_within(self.world.here, within, commits=commits)
            if commits:
                answers.append(asyncio.create_task(told(answer)))
                commands.append(within)
        await self.check(commands, await asyncio.gather(*answers), lossy=lossy)

    async def crashing(self, commands: Sequence[Command], turns: int) -> None:
        """Let the node die after a few turns of the loop."""
        under_way = [self.world.there.ledger.apply(wanted) for wanted in commands]
        for _ in range(turns):
            await asyncio.sleep(0)
        await self.world.crash()
        early = [each.result() for each in under_way if is_applied(each)]
        answers = [await insist(self.world.here, wanted) for wanted in commands]
        await self.check(commands, answers, lossy=True)
        for applied in early:
            model = self.models[applied.transaction.merchant_id]
            assert model.used[applied.transaction.reference] == applied.transaction

    async def check(
        self, commands: Sequence[Command], answers: Sequence[Answer], *, lossy: bool
    ) -> None:
        """The books went on as they may, and every answer is true of them."""
        seen: dict[UUID, set[int]] = {}
        for merchant_id, model in self.models.items():
            seen[merchant_id] = {model.balance}
            page = await self.world.here.ledger.transactions(merchant_id, limit=200)
            for moved in reversed(page.items[: page.total - len(model.used)]):
                assert any(is_it(wanted, moved) for wanted in commands)
                model.move(moved)
                seen[merchant_id].add(model.balance)
        for wanted, answer in zip(commands, answers, strict=True):
            model = self.models[wanted.merchant_id]
            moved_by = model.used.get(wanted.reference)
            if moved_by is None:
                assert isinstance(answer, InsufficientCreditsError)
                assert answer.required == wanted.amount > answer.balance
                assert answer.balance in seen[wanted.merchant_id]
                model.refused += 1
            elif is_it(wanted, moved_by) and isinstance(answer, Applied):
                assert answer.transaction == moved_by
                assert answer.balance == moved_by.balance_after
            elif is_it(wanted, moved_by):
                # It came too early: what paid for the other one with its reference came later.
                assert isinstance(answer, InsufficientCreditsError)
                assert min(seen[wanted.merchant_id]) < wanted.amount
                assert commands.count(wanted) > 1 or len(commands) > 1
                model.refused += 1
            else:
                assert isinstance(answer, DuplicateTransactionError | InsufficientCreditsError)
                model.refused += isinstance(answer, InsufficientCreditsError)
        for merchant_id, model in self.models.items():
            names = [name for name, _ in await events(self.world.here, merchant_id)]
            assert [name for name in names if name != "insufficient"] == model.told
            told_refused = names.count("insufficient")
            assert told_refused == model.refused or (lossy and told_refused > model.refused)
            model.refused = told_refused


async def insist(at: Node, wanted: Command) -> Answer:
    """Send it again until it is answered."""

    async def attempt() -> Answer | None:
        try:
            return await at.ledger.apply(wanted)
        except TransientError:
            return None
        except GlamError as error:
            return error

    answer = await eventually(attempt)
    assert answer is not None
    return answer


async def apply_within(at: Node, wanted: Command, *, commits: bool) -> Answer:
    """Apply it in a transaction of one's own, which then commits or does not."""
    answer: Answer
    with suppress(RolledBackError):
        async with at.database.transaction() as connection:
            try:
                answer = await at.ledger.apply_within(connection, wanted, SystemClock().now())
            except GlamError as error:
                answer = error
            roll_back_unless(commits)
    return answer


class RolledBackError(Exception):
    """The other writer has changed its mind."""


def roll_back_unless(commits: bool) -> None:
    """End the transaction that this stands in."""
    if not commits:
        raise RolledBackError


async def told(answer: Answer) -> Answer:
    """What is known already, as what is waited for."""
    return answer


def is_it(wanted: Command, moved: Transaction) -> bool:
    """Whether this transaction is what was wanted."""
    return (wanted.merchant_id, wanted.reference, wanted.operation, wanted.amount) == (
        moved.merchant_id,
        moved.reference,
        moved.operation,
        moved.amount,
    )


def is_applied(answer: "asyncio.Future[Applied]") -> bool:
    """Whether it was answered in time, and well."""
    return answer.done() and not answer.cancelled() and answer.exception() is None


def test_nothing_that_hypothesis_thinks_of_makes_the_ledger_differ_from_its_model(
    module_database_url: str,
) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        world = World(module_database_url, runner)
        world.run(world.begin())

        class BoundMachine(LedgerMachine):
            """The machine in this world."""

            def __init__(self) -> None:
                super().__init__(world)

        try:
            run_state_machine_as_test(
                BoundMachine,
                settings=hypothesis.settings(
                    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None
                ),
            )
        finally:
            world.run(world.end())
