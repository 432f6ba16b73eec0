"""glamctl about payment tokens."""

import sys
from typing import Final

import click

from glamd.admin.cli_common import (
    EXIT_FAILED,
    Group,
    confirm,
    mapping,
    mappings,
    session,
    show_list,
    show_one,
    yes_option,
)
from glamd.admin.client import segment

PURGE_TIMEOUT_S: Final = 3600.0
GRANT_COLUMNS: Final = ("worker", "purposes", "fields", "merchants", "rate_per_s")


@click.group(cls=Group)
def tokens() -> None:
    """Payment tokens: show, revoke, purge, grants."""


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


@tokens.command()
def purge() -> None:
    """Do now what the jobs do by and by: expire, delete what is old, shred, drop days.

    Exit status 1 where a partition could not be had, which somebody reads for long.
    """
    done = mapping(session().client.post("/v1/purge", timeout_s=PURGE_TIMEOUT_S))
    show_one(done)
    if done.get("waiting"):
        sys.exit(EXIT_FAILED)


@tokens.command()
def grants() -> None:
    """What each worker may detokenize, as it is in force."""
    found = mapping(session().client.get("/v1/grants"))
    show_list(mappings(found.get("grants")), GRANT_COLUMNS)
