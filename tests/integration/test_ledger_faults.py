"""Credits where something dies: connections, backends, the server, the node itself."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from glamd.actor import System
from glamd.admin import migrate
from glamd.clock import SystemClock
from glamd.db import Database
from glamd.embedded.postgres import EmbeddedPostgres
from glamd.errors import TransientError, UnavailableError
from glamd.ledger import actor
from glamd.ledger.model import Applied, Command, InsufficientCreditsError
from glamd.ledger.service import Ledger
from glamd.ledger.verify import verify
from tests.support.database_proxy import DatabaseProxy
from tests.support.ledgers import Node, command, counted, events, grant, merchant, node
from tests.support.postgres import eventually

PATIENCE_S = 20.0
THERE = "glamd-there"


@pytest.fixture
async def here(module_database_url: str) -> AsyncIterator[Node]:
    """A node that nothing happens to; the books are right at the end."""
    async with node(module_database_url) as made:
        yield made
        report = await verify(made.database)
        assert report.broken == ()


@pytest.fixture
async def proxy(module_database_url: str) -> AsyncIterator[DatabaseProxy]:
    """What stands between the other node and its database."""
    async with DatabaseProxy(module_database_url) as made:
        yield made


@pytest.fixture
async def there(proxy: DatabaseProxy) -> AsyncIterator[Node]:
    """The node to which it happens; it commits on one connection, so that a test knows on which."""
    async with node(proxy.url, connections=1, name=THERE) as made:
        yield made


async def balance(at: Node, merchant_id: UUID) -> int:
    """The balance as it is committed."""
    value: int = await at.database.fetchval(
        "SELECT balance FROM glam.credit_accounts WHERE merchant_id = $1", merchant_id
    )
    return value


async def insist(at: Node, wanted: Command) -> Applied:
    """Send a command again until it is answered, as the contract asks callers to do."""
    return await eventually(
        lambda: at.ledger.apply(wanted), errors=(TransientError,), timeout_s=PATIENCE_S
    )


async def test_an_answer_that_got_lost_after_the_commit_is_looked_up(
    here: Node, there: Node, proxy: DatabaseProxy
) -> None:
    merchant_id = await merchant(here, 500)
    await there.ledger.apply(command(merchant_id))
    proxy.lose_answer = 1
    wanted = [command(merchant_id, amount=n) for n in (2, 3)]
    answers = await asyncio.gather(*(there.ledger.apply(each) for each in wanted))
    assert proxy.lose_answer < 0
    # It was done for this very caller, and is no repetition.
    assert [(answer.balance, answer.replayed) for answer in answers] == [(497, False), (494, False)]
    assert await counted(here, merchant_id) == 4
    assert [name for name, _ in await events(here, merchant_id)].count("consumed") == 3
    assert (await there.ledger.apply(wanted[0])).replayed


async def test_a_commit_that_never_arrived_is_made_again(
    here: Node, there: Node, proxy: DatabaseProxy
) -> None:
    merchant_id = await merchant(here, 500)
    await there.ledger.apply(command(merchant_id))
    proxy.lose_question = 1
    applied = await there.ledger.apply(command(merchant_id, amount=2))
    assert proxy.lose_question < 0
    assert (applied.balance, applied.replayed) == (497, False)
    assert await counted(here, merchant_id) == 3


@pytest.mark.parametrize("which", range(1, 7))
@pytest.mark.parametrize("is_cold", [True, False])
async def test_whichever_answer_gets_lost_the_caller_learns_the_truth(
    here: Node, there: Node, proxy: DatabaseProxy, which: int, is_cold: bool
) -> None:
    merchant_id = await merchant(here, 500)
    if not is_cold:
        await there.ledger.apply(command(merchant_id, amount=1))
        await here.ledger.apply(command(merchant_id, "credit", 1))
    wanted = command(merchant_id, amount=2)
    proxy.lose_answer = which
    (answer,) = await asyncio.gather(there.ledger.apply(wanted), return_exceptions=True)
    assert isinstance(answer, Applied | UnavailableError)
    proxy.lose_answer = 0
    applied = await insist(there, wanted)
    assert applied.balance == 498
    if isinstance(answer, Applied):
        assert (answer.replayed, applied.replayed) == (False, True)
    assert await balance(here, merchant_id) == 498


async def until(holds: Callable[[], bool]) -> None:
    """Return when it holds."""

    async def attempt() -> bool:
        return holds()

    await eventually(attempt, timeout_s=PATIENCE_S)


async def test_nobody_waits_long_for_a_database_that_is_away(
    here: Node, there: Node, proxy: DatabaseProxy
) -> None:
    merchants = [await merchant(here, 10) for _ in range(10)]
    await there.ledger.apply(command(merchants[0]))
    proxy.go_down()
    wanted = [command(each) for each in merchants]
    async with asyncio.timeout(5.0):
        answers = await asyncio.gather(
            *(there.ledger.apply(each) for each in wanted), return_exceptions=True
        )
    assert all(isinstance(answer, UnavailableError) for answer in answers)
    proxy.is_down = False
    again = await asyncio.gather(*(insist(there, each) for each in wanted))
    assert not any(answer.replayed for answer in again)
    assert [answer.balance for answer in again] == [8, *[9] * 9]


async def test_what_is_too_much_is_refused_at_once_while_an_account_is_locked(
    here: Node, there: Node
) -> None:
    merchant_id = await merchant(here, 100_000)
    await there.ledger.apply(command(merchant_id))
    crowd = actor.MAILBOX_LIMIT + actor.BATCH_LIMIT + 500
    async with here.database.transaction() as connection:
        await here.ledger.apply_within(connection, command(merchant_id), SystemClock().now())
        first = there.ledger.apply(command(merchant_id))
        locked = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"
        await eventually(lambda: here.database.fetchval(locked))
        rest = [there.ledger.apply(command(merchant_id)) for _ in range(crowd)]
        refused = [each.exception() for each in rest if each.done()]
    assert len(refused) == crowd - actor.MAILBOX_LIMIT
    assert {getattr(error, "code", None) for error in refused} == {"MAILBOX_FULL"}
    answers = await asyncio.gather(first, *rest, return_exceptions=True)
    applied = [answer for answer in answers if isinstance(answer, Applied)]
    assert len(applied) == 1 + actor.MAILBOX_LIMIT


async def spend(at: Node, wanted: Sequence[Command]) -> list[Applied]:
    """All of them, a few at a time, each insisted on."""
    waiting = iter(wanted)

    async def caller() -> list[Applied]:
        return [await insist(at, each) for each in waiting]

    return [
        answer for some in await asyncio.gather(*(caller() for _ in range(8))) for answer in some
    ]


async def test_backends_that_are_terminated_all_the_time_lose_and_double_nothing(
    here: Node, there: Node, proxy: DatabaseProxy
) -> None:
    merchants = [await merchant(here, 1000) for _ in range(3)]
    wanted = [command(merchants[n % 3]) for n in range(300)]
    spending = asyncio.create_task(spend(there, wanted))
    terminated = 0

    def has_gone_on(enough: int) -> Callable[[], bool]:
        return lambda: spending.done() or proxy.questions >= enough

    while not spending.done() and terminated < 20:
        terminated += await here.database.fetchval(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = $1",
            THERE,
        )
        await until(has_gone_on(proxy.questions + 20))
    answers = await spending
    assert terminated > 0
    assert {answer.transaction.reference_id for answer in answers} == {
        each.reference_id for each in wanted
    }
    for merchant_id in merchants:
        assert await counted(here, merchant_id) == 101
        assert (await grant(here, merchant_id, 1)).balance == 901


async def test_a_node_that_dies_between_decision_and_commit_leaves_each_command_once_or_not_at_all(
    here: Node, module_database_url: str
) -> None:
    merchant_id = await merchant(here, 1000)
    wanted = [command(merchant_id) for _ in range(60)]
    for round_ in range(6):
        database = await Database.connect(module_database_url)
        system = System()
        dying = Ledger(database, system=system, clock=SystemClock())
        await dying.start()
        under_way = [dying.apply(each) for each in wanted[: 10 * (round_ + 1)]]
        if round_ % 2:
            await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
        # No drain: the writers end where they are, and take what they hold with them.
        await dying.stop(0.0)
        acknowledged = [each.result() for each in under_way if _applied(each)]
        await system.drain(0.1)
        await database.close()
        for each in acknowledged:
            again = await here.ledger.apply(
                command(merchant_id, reference=each.transaction.reference_id)
            )
            assert again.transaction == each.transaction
            assert again.replayed
    await asyncio.gather(*(here.ledger.apply(each) for each in wanted))
    assert await counted(here, merchant_id) == 61
    assert (await here.ledger.account(merchant_id)).balance == 940


def _applied(answer: "asyncio.Future[Applied]") -> bool:
    return answer.done() and not answer.cancelled() and answer.exception() is None


async def test_a_server_that_is_stopped_hard_under_load_has_lost_nothing_acknowledged(
    tmp_path: Path,
) -> None:
    server = EmbeddedPostgres(tmp_path)
    urls = await server.start()
    await migrate.upgrade(urls.app)
    try:
        async with node(urls.app) as at:
            merchants = [await merchant(at, 10_000) for _ in range(4)]
            wanted = [command(merchants[n % 4]) for n in range(800)]
            spending = asyncio.create_task(spend(at, wanted))
            for enough in (100, 400):
                await eventually(partial(_has, at, enough), timeout_s=PATIENCE_S)
                await server.stop_immediate()
                await server.restart()
            answers = await spending
            assert len(answers) == len(wanted)
            raw = await asyncpg.connect(urls.app)
            rows = await raw.fetch("SELECT id FROM glam.credit_transactions")
            await raw.close()
            assert {answer.transaction.id for answer in answers} <= {row[0] for row in rows}
            assert len(rows) == len(wanted) + len(merchants)
            report = await verify(at.database)
            assert (report.broken, report.transactions) == ((), len(rows))
    finally:
        await server.stop()


async def _has(at: Node, transactions: int) -> bool:
    try:
        found: int = await at.database.fetchval("SELECT count(*) FROM glam.credit_transactions")
    except UnavailableError:
        return False
    return found >= transactions


async def test_a_refused_debit_is_refused_again_and_not_done_after_a_lost_answer(
    here: Node, there: Node, proxy: DatabaseProxy
) -> None:
    merchant_id = await merchant(here, 1)
    await there.ledger.account(merchant_id)
    with pytest.raises(InsufficientCreditsError):
        await there.ledger.apply(command(merchant_id, amount=5))
    proxy.lose_answer = 2  # the look at the reference, then the commit
    with pytest.raises(InsufficientCreditsError):
        await there.ledger.apply(command(merchant_id, amount=5))
    assert proxy.lose_answer < 0
    assert await counted(here, merchant_id) == 1
