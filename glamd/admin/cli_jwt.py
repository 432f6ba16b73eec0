"""glamctl about JWTs: revoking them, and minting some to try things out with."""

import click

from glamd.admin.cli_common import (
    Group,
    confirm,
    mapping,
    mappings,
    session,
    show_json,
    show_list,
    show_one,
    yes_option,
)

COLUMNS = ("kind", "value", "revoked_at", "revoked_by", "expires_at")


@click.group(cls=Group)
def jwt() -> None:
    """JWTs: revoke, revoked; in development mint."""


@jwt.command()
@click.option("--jti", help="The id of a JWT: that one is not believed any more.")
@click.option("--kid", help="The id of a key: nothing that it signed is believed any more.")
@yes_option
def revoke(jti: str | None, kid: str | None, yes: bool) -> None:
    """Believe one JWT, or all that a key signed, no more; on every node and for good."""
    if (jti is None) == (kid is None):
        raise click.UsageError("Say either --jti or --kid.")
    what, body = (
        (f"the JWT {jti}", {"jti": jti}) if kid is None else (f"the key {kid}", {"kid": kid})
    )
    confirm(f"Revoke {what} for good?", yes=yes)
    show_one(mapping(session().client.post("/v1/jwt/revocations", body)))


@jwt.command()
def revoked() -> None:
    """What was revoked, the newest first."""
    found = mapping(session().client.get("/v1/jwt/revocations"))
    show_list(mappings(found["revocations"]), COLUMNS)


@jwt.group()
def mint() -> None:
    """Make a JWT that the daemon believes for twelve hours."""


@mint.command()
@click.option("--merchant", "merchant_id", required=True, help="It need not exist.")
@click.option("--shop", required=True, help="The shop's domain.")
@click.option("--scope", help="Scopes, between spaces.")
def client(merchant_id: str, shop: str, scope: str | None) -> None:
    """A storefront back end's."""
    _mint("client", {"merchant_id": merchant_id, "shop": shop, "scope": scope})


@mint.command()
@click.option("--service", required=True, help="The service's name.")
@click.option("--scope", help="Scopes, between spaces.")
def internal(service: str, scope: str | None) -> None:
    """An internal service's."""
    _mint("internal", {"service": service, "scope": scope})


def _mint(kind: str, body: dict[str, str | None]) -> None:
    given = {name: value for name, value in body.items() if value is not None}
    found = mapping(session().client.post(f"/v1/jwt/{kind}", given))
    if session().as_json:
        show_json(found)
    else:
        click.echo(found["token"])
