"""glamctl about credits: an account, its transactions, grants and debits, and the proof."""

import sys
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import click

from glamd.admin.cli_common import (
    EXIT_FAILED,
    Group,
    confirm,
    limit_option,
    mapping,
    mappings,
    pages,
    session,
    show_json,
    show_list,
    show_one,
    yes_option,
)
from glamd.admin.client import segment

COLUMNS = (
    "created_at",
    "operation",
    "amount",
    "balance_after",
    "reference_type",
    "reference_id",
    "description",
    "id",
)
BROKEN_COLUMNS = ("merchant_id", "rule", "seq", "transaction_id")
AMOUNT_LIMIT = 2**53 - 1
"""Named here too, so that a command starts without the daemon's modules."""

VERIFY_TIMEOUT_S = 4 * 3600.0
"""Books of many millions of rows take their time."""


@click.group(cls=Group)
def ledger() -> None:
    """Credits: show, history, grant, consume, verify."""


@ledger.command()
@click.argument("merchant_id", metavar="MERCHANT")
def show(merchant_id: str) -> None:
    """A merchant's account."""
    show_one(mapping(session().client.get(f"/v1/ledger/{segment(merchant_id)}")))


@ledger.command()
@click.argument("merchant_id", metavar="MERCHANT")
@limit_option
def history(merchant_id: str, limit: int) -> None:
    """A merchant's transactions, newest first."""
    path = f"/v1/ledger/{segment(merchant_id)}/transactions"
    show_list(pages(path, "transactions", limit=limit), COLUMNS)


def _moves(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a grant and a debit have to be told."""
    for each in (
        yes_option,
        click.option("--description", help="What it is for, for people."),
        click.option(
            "--reference-id",
            "reference_id",
            required=True,
            help="Which of these; the same reference again moves nothing more.",
        ),
        click.option("--reference-type", "reference_type", required=True, help="What it is for."),
        click.argument("amount", type=click.IntRange(1, AMOUNT_LIMIT)),
        click.argument("merchant_id", metavar="MERCHANT"),
    ):
        function = each(function)
    return function


@ledger.command()
@_moves
def grant(*, merchant_id: str, amount: int, yes: bool, **rest: str | None) -> None:
    """Give a merchant credits; asks first."""
    confirm(f"Grant {amount} credits to {merchant_id}?", yes=yes)
    _move("grant", merchant_id, amount, rest)


@ledger.command()
@_moves
def consume(*, merchant_id: str, amount: int, yes: bool, **rest: str | None) -> None:
    """Take credits from a merchant; asks first."""
    confirm(f"Take {amount} credits from {merchant_id}?", yes=yes)
    _move("consume", merchant_id, amount, rest)


def _move(what: str, merchant_id: str, amount: int, rest: Mapping[str, str | None]) -> None:
    given = {name: text for name, text in rest.items() if text is not None}
    path = f"/v1/ledger/{segment(merchant_id)}/{what}"
    found = dict(mapping(session().client.post(path, {"amount": amount, **given})))
    if session().as_json:
        show_json(found)
        return
    transaction = mapping(found.pop("transaction"))
    show_one({**found, **transaction})
    if found["replayed"]:
        click.echo("This reference was used before: nothing was moved now.", err=True)


@ledger.command()
@click.argument("merchants", metavar="[MERCHANT]...", nargs=-1, type=click.UUID)
def verify(merchants: tuple[UUID, ...]) -> None:
    """Check the books of all merchants, or of some; exit status 1 when something is broken."""
    body = {"merchants": [str(each) for each in merchants]} if merchants else {}
    path = "/v1/ledger/verify"
    found = mapping(session().client.post(path, body, timeout_s=VERIFY_TIMEOUT_S))
    if session().as_json:
        show_json(found)
    else:
        looked = f"{found['accounts']} accounts, {found['transactions']} transactions"
        if found.get("ok"):
            click.echo(f"All books are right: {looked}.")
        else:
            click.echo(f"BROKEN: {found['broken_accounts']} of {looked}.")
            show_list(mappings(found["broken"]), BROKEN_COLUMNS)
    if not found.get("ok"):
        sys.exit(EXIT_FAILED)
