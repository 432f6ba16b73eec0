"""glamctl about merchants."""

import click

from glamd.admin.cli_common import Group, limit_option, mapping, pages, session, show_list, show_one
from glamd.admin.client import segment

COLUMNS = ("merchant_id", "platform", "shop_id", "domain", "created_at")


@click.group(cls=Group)
def merchant() -> None:
    """Merchants: create, list, show."""


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
