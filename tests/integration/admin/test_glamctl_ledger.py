"""glamctl about credits, on a real ledger: what it refuses, asks, moves once, and proves."""

import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass
from uuid import UUID, uuid4

import pytest
from structlog.typing import EventDict

from glamd.admin.cli_ledger import AMOUNT_LIMIT
from glamd.admin.routes_ledger import LedgerRoutes
from glamd.ledger import model
from tests.support import ledgers
from tests.support.admin_world import AdminWorld
from tests.support.ledgers import Node
from tests.support.money_world import Admin

REFERENCE = ("--reference-type", "gift", "--reference-id", "g-1")


@dataclass(slots=True)
class Desk:
    """glamctl, and the ledger behind it."""

    admin: Admin
    node: Node

    async def balance(self, merchant_id: UUID) -> int:
        """What the merchant has."""
        return (await self.node.ledger.account(merchant_id)).balance


@pytest.fixture
async def desk(admin: AdminWorld, module_database_url: str) -> AsyncIterator[Desk]:
    """The socket with these routes."""
    glamctl = Admin(admin.path)
    async with ledgers.node(module_database_url) as node:
        routes = LedgerRoutes(node.ledger, database=node.database).routes()
        async with glamctl.serving(admin.world, routes):
            yield Desk(glamctl, node)


def test_what_glamctl_knows_by_itself_is_what_the_ledger_knows() -> None:
    assert AMOUNT_LIMIT == model.AMOUNT_LIMIT


async def test_what_is_used_wrongly_moves_nothing_and_is_2(desk: Desk) -> None:
    merchant_id = await ledgers.merchant(desk.node, 5)
    for words in (
        ("grant", merchant_id, 0, *REFERENCE, "--yes"),
        ("grant", merchant_id, AMOUNT_LIMIT + 1, *REFERENCE, "--yes"),
        ("consume", merchant_id, "1.5", *REFERENCE, "--yes"),
        ("consume", merchant_id, 1, "--yes"),
        ("grant", merchant_id, 1, "--reference-type", "gift", "--yes"),
        ("grant", merchant_id, *REFERENCE, "--yes"),
        ("verify", "nobody"),
        ("history", merchant_id, "--limit", 0),
    ):
        await desk.admin.failed(2, "ledger", *words)
    # Without a terminal nobody can be asked.
    for what in ("grant", "consume"):
        asked = await desk.admin.failed(2, "ledger", what, merchant_id, 1, *REFERENCE)
        assert str(merchant_id) in asked
        assert "--yes" in asked
    assert await desk.balance(merchant_id) == 5


async def test_what_the_ledger_refuses_is_1_and_names_the_code_and_the_field(desk: Desk) -> None:
    merchant_id, nobody = await ledgers.merchant(desk.node, 5), uuid4()
    for code, words in (
        ("CREDIT_ACCOUNT_NOT_FOUND", ("show", nobody)),
        ("MERCHANT_NOT_FOUND", ("show", "nobody")),
        ("CREDIT_ACCOUNT_NOT_FOUND", ("history", nobody)),
        ("CREDIT_ACCOUNT_NOT_FOUND", ("grant", nobody, 1, *REFERENCE, "--yes")),
        ("INSUFFICIENT_CREDITS", ("consume", merchant_id, 6, *REFERENCE, "--yes")),
        ("CREDIT_ACCOUNT_NOT_FOUND", ("verify", merchant_id, nobody)),
    ):
        assert (await desk.admin.failed(1, "ledger", *words)).startswith(f"{code}: ")
    long = ("--reference-type", "gift", "--reference-id", "x" * 256)
    told = await desk.admin.failed(1, "ledger", "grant", merchant_id, 1, *long, "--yes")
    assert told.startswith("VALIDATION_ERROR: ")
    assert "reference_id: " in told
    assert await desk.balance(merchant_id) == 5


async def test_a_grant_and_a_debit_move_once_and_the_log_says_who(
    desk: Desk, logs: list[EventDict]
) -> None:
    merchant_id = await ledgers.merchant(desk.node)
    words = ("ledger", "grant", merchant_id, 7, *REFERENCE, "--description", "a gift", "--yes")
    first = await desk.admin.told(*words)
    assert (first["balance"], first["replayed"]) == (7, False)
    assert first["transaction"]["description"] == "a gift"
    again = await desk.admin.run(*words)
    assert (again.exit_code, again.stdout.count("replayed")) == (0, 1)
    assert "nothing was moved" in again.stderr
    other = ("ledger", "consume", merchant_id, 7, *REFERENCE, "--yes")
    assert (await desk.admin.failed(1, *other)).startswith("DUPLICATE_TRANSACTION: ")
    taken = await desk.admin.told(
        *("ledger", "consume", merchant_id, 2, "--reference-type", "fee"),
        *("--reference-id", "f-1", "--yes"),
    )
    assert taken["balance"] == await desk.balance(merchant_id) == 5
    moved = [each for each in logs if each["event"] == "credits_moved_by_operator"]
    assert [(each["operation"], each["replayed"]) for each in moved] == [
        ("credit", False),
        ("credit", True),
        ("debit", False),
    ]
    assert all(each["by"].startswith("uid:") for each in moved)


async def test_an_account_and_its_history_are_shown_to_people_and_to_programs(desk: Desk) -> None:
    merchant_id = await ledgers.merchant(desk.node, 5)
    for _ in range(210):
        desk.node.ledger.apply(ledgers.command(merchant_id, "credit"))
    await ledgers.grant(desk.node, merchant_id, 100)
    shown = await desk.admin.told("ledger", "show", merchant_id)
    assert (shown["balance"], shown["transactions"]) == (315, 212)
    assert "total granted" in await desk.admin.done("ledger", "show", merchant_id)
    listed = await desk.admin.told("ledger", "history", merchant_id, "--limit", 1000)
    assert len(listed) == 212
    assert (listed[0]["amount"], listed[-1]["amount"]) == (100, 5)
    table = await desk.admin.done("ledger", "history", merchant_id, "--limit", 1)
    assert "balance after" in table
    assert listed[0]["id"] in table


async def test_what_others_wrote_does_not_steer_the_terminal(desk: Desk) -> None:
    merchant_id = await ledgers.merchant(desk.node)
    steering = "\x1b]0;title\x07\x1b[2J \u202eback\r\n\x9bm"
    grant = dataclasses.replace(
        ledgers.command(merchant_id, "credit", 5), description=steering, metadata={steering: 1}
    )
    await desk.node.ledger.apply(grant)
    again = (grant.reference_type, "--reference-id", grant.reference_id, "--yes")
    table = await desk.admin.done("ledger", "history", merchant_id)
    lines = await desk.admin.done("ledger", "grant", merchant_id, 5, "--reference-type", *again)
    for told in (table, lines):
        assert "title" in told
        assert all(line.isprintable() for line in told.split("\n"))
    (listed,) = await desk.admin.told("ledger", "history", merchant_id)
    assert listed["description"] == steering, "a program is told what it is"


async def test_sound_books_are_0_and_broken_ones_1_with_the_first_row_that_is_wrong(
    desk: Desk,
) -> None:
    sound, broken = [await ledgers.merchant(desk.node, 5) for _ in range(2)]
    await ledgers.grant(desk.node, broken, 1)
    assert (await desk.admin.done("ledger", "verify", sound, broken)) == (
        "All books are right: 2 accounts, 3 transactions.\n"
    )
    await desk.node.database.execute(
        "DELETE FROM glam.credit_transactions WHERE merchant_id = $1 AND seq = 1", broken
    )
    try:
        every = await desk.admin.run("ledger", "verify", "--json")
        assert (every.exit_code, f'"merchant_id": "{broken}"' in every.stdout) == (1, True)
        told = await desk.admin.run("ledger", "verify", broken)
        assert told.exit_code == 1
        assert told.stdout.startswith("BROKEN: 1 of 1 accounts")
        assert "missing transaction" in told.stdout
        assert (await desk.admin.told("ledger", "verify", sound))["ok"] is True
    finally:
        await desk.node.database.execute(
            "DELETE FROM glam.credit_transactions WHERE merchant_id = $1", broken
        )
        await desk.node.database.execute(
            "DELETE FROM glam.credit_accounts WHERE merchant_id = $1", broken
        )
