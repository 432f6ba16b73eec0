"""glamctl about payment tokens and the audit chain."""

import sys

import click

from glamd.admin.cli_common import (
    EXIT_FAILED,
    Group,
    confirm,
    mapping,
    session,
    show_json,
    show_one,
    yes_option,
)
from glamd.admin.client import segment

VERIFY_TIMEOUT_S = 4 * 3600.0
"""A chain of many millions of rows takes its time."""


@click.group(cls=Group)
def tokens() -> None:
    """Payment tokens: show, revoke."""


@tokens.command()
@click.argument("token")
def show(token: str) -> None:
    """A token's metadata; never a card number."""
    show_one(mapping(session().client.get(f"/v1/tokens/{segment(token)}")))


@tokens.command()
@click.argument("token")
@yes_option
def revoke(token: str, yes: bool) -> None:
    """Erase what is sealed under it; its metadata stays."""
    confirm(f"Erase the card data of {token} for good?", yes=yes)
    show_one(mapping(session().client.post(f"/v1/tokens/{segment(token)}/revoke")))


@click.group(cls=Group)
def audit() -> None:
    """The audit chain: verify."""


@audit.command()
@click.option(
    "--head",
    metavar="MONTH:SEQ:MAC",
    help="An end of the chain out of the log (audit_head), which it must still hold.",
)
def verify(head: str | None) -> None:
    """Walk the chain and name the first broken row; exit status 1 where there is one."""
    path = "/v1/audit/verify" + ("" if head is None else f"?head={segment(head)}")
    found = mapping(session().client.post(path, timeout_s=VERIFY_TIMEOUT_S))
    if session().as_json:
        show_json(found)
    elif found.get("ok"):
        click.echo(f"All as written: {found['rows']} rows, months: {found['partitions']}.")
    else:
        broken = mapping(found["first_broken"])
        click.echo(
            f"BROKEN at row {broken['seq']} of {broken['partition']}: {broken['reason']},"
            f" {broken['detail']} ({found['rows']} rows before it are as written)"
        )
    if not found.get("ok"):
        sys.exit(EXIT_FAILED)
