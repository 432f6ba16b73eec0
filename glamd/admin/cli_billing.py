"""glamctl about billing: what a merchant has had, and ending at once what is over."""

import click

from glamd.admin.cli_common import (
    Group,
    mapping,
    mappings,
    session,
    show_json,
    show_list,
    show_one,
)
from glamd.admin.client import segment

COLUMNS = (
    "created_at",
    "pack",
    "credits",
    "amount",
    "currency",
    "status",
    "failure",
    "platform",
    "id",
)


@click.group(cls=Group)
def billing() -> None:
    """Trials and purchases: show, expire-now."""


@billing.command()
@click.argument("merchant_id", metavar="MERCHANT")
def show(merchant_id: str) -> None:
    """A merchant's trial and its last purchases."""
    found = dict(mapping(session().client.get(f"/v1/billing/{segment(merchant_id)}")))
    if session().as_json:
        show_json(found)
        return
    purchases = mappings(found.pop("recent_purchases"))
    trial = mapping(found.pop("trial"))
    show_one({**found, **{f"trial_{name}": value for name, value in trial.items()}})
    if purchases:
        show_list(purchases, COLUMNS)


@billing.command("expire-now")
def expire_now() -> None:
    """End trials and purchases whose time is over, without waiting for the jobs."""
    show_one(mapping(session().client.post("/v1/billing/expire-now")))
