"""glamctl about merchants."""

from typing import Final, Literal

import click

from glamd.admin.cli_common import (
    Group,
    confirm,
    limit_option,
    mapping,
    pages,
    session,
    show_list,
    show_one,
    yes_option,
)
from glamd.admin.client import segment

ERASE_TIMEOUT_S: Final = 4 * 3600.0
"""Many millions of tokens take their time; what is not done by then goes on without us."""

COLUMNS = ("merchant_id", "platform", "shop_id", "domain", "created_at")


@click.group(cls=Group)
def merchant() -> None:
    """Merchants: create, list, show, set, erase."""


@merchant.command()
@click.option("--platform", required=True, help="shopify, woocommerce, …, custom.")
@click.option("--shop-id", required=True, help="The shop's id on its platform.")
@click.option("--domain", required=True, help="The shop's domain.")
@click.option("--id", "merchant_id", type=click.UUID, help="Its id, where it has one already.")
def create(platform: str, shop_id: str, domain: str, merchant_id: object) -> None:
    """Make a merchant; the same command again gives the same merchant."""
    body: dict[str, object] = {"platform": platform, "shop_id": shop_id, "domain": domain}
    if merchant_id is not None:
        body["merchant_id"] = str(merchant_id)
    show_one(mapping(session().client.post("/v1/merchants", body)))


@merchant.command("list")
@limit_option
def list_merchants(limit: int) -> None:
    """All merchants, by id."""
    show_list(pages("/v1/merchants", "merchants", limit=limit), COLUMNS)


@merchant.command()
@click.argument("merchant_id")
def show(merchant_id: str) -> None:
    """One merchant."""
    show_one(mapping(session().client.get(f"/v1/merchants/{segment(merchant_id)}")))


class Hours(click.ParamType[int | Literal["default"]]):
    """Hours, or `default`; in seconds."""

    name = "hours"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["default"]:
        """The seconds."""
        if value == "default":
            return "default"
        try:
            return round(float(value) * 3600)
        except (ValueError, OverflowError):
            self.fail("It is a number of hours, or default.", param, ctx)


@merchant.command("set")
@click.argument("merchant_id")
@click.option("--token-ttl-h", type=Hours(), metavar="H|default", help="How long tokens live.")
@click.option(
    "--sensitive-data",
    type=click.Choice(["drop", "until-authorized"]),
    help="What becomes of full tracks and EMV cryptograms.",
)
def set_merchant(merchant_id: str, token_ttl_h: object, sensitive_data: str | None) -> None:
    """Change a merchant's settings, for tokens that are made from now on."""
    given = {"token_ttl_s": token_ttl_h, "sensitive_data": sensitive_data}
    body = {name: value for name, value in given.items() if value is not None}
    if not body:
        raise click.UsageError("Say --token-ttl-h or --sensitive-data.")
    path = f"/v1/merchants/{segment(merchant_id)}/settings"
    show_one(mapping(session().client.post(path, body)))


@merchant.command()
@click.argument("merchant_id")
@yes_option
def erase(merchant_id: str, yes: bool) -> None:
    """Delete its tokens and card data and revoke its devices, for good; books and audit stay."""
    confirm(f"Erase the cards of merchant {merchant_id} and revoke its devices for good?", yes=yes)
    path = f"/v1/merchants/{segment(merchant_id)}/erase"
    show_one(mapping(session().client.post(path, timeout_s=ERASE_TIMEOUT_S)))
