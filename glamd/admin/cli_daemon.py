"""glamctl about the daemon itself: status, health, drain, log-level, version, actors."""

import sys

import click

from glamd.admin.cli_common import (
    EXIT_FAILED,
    Command,
    Group,
    limit_option,
    mapping,
    mappings,
    session,
    show_json,
    show_list,
    show_one,
    text_of,
)
from glamd.admin.client import segment

LEVELS = ("debug", "info", "warning", "error", "critical")
ACTOR_COLUMNS = ("kind", "key", "mailbox", "handled", "restarts", "idle_s", "state")


@click.command(cls=Command)
def status() -> None:
    """What runs here, since when, and how it is."""
    found = dict(mapping(session().client.get("/v1/status")))
    if not session().as_json:
        kinds = mappings(found["actors"])
        found["health"] = mapping(found["health"]).get("status")
        found["actors"] = {text_of(kind["kind"]): kind["actors"] for kind in kinds}
    show_one(found)


@click.command(cls=Command)
def health() -> None:
    """Whether it may be sent work; exit status 1 if not."""
    found = mapping(session().client.get("/v1/health"))
    show_one(found)
    if found.get("status") == "unavailable":
        sys.exit(EXIT_FAILED)


@click.command(cls=Command)
def drain() -> None:
    """Take no new work, finish what is under way, stop."""
    show_one(mapping(session().client.post("/v1/drain")))


@click.command("log-level", cls=Command)
@click.argument("level", type=click.Choice(LEVELS), required=False)
def log_level(level: str | None) -> None:
    """Show the log level, or set it until the next start or reload."""
    client = session().client
    found = client.put("/v1/log-level", {"level": level}) if level else client.get("/v1/log-level")
    show_one(mapping(found))


@click.command(cls=Command)
def version() -> None:
    """The versions of glamctl and of the daemon."""
    from glamd import __version__  # noqa: PLC0415 - only here

    daemon = mapping(session().client.get("/v1/version")).get("version")
    show_one({"glamctl": __version__, "glamd": daemon})


@click.group(cls=Group)
def actors() -> None:
    """Actors in memory: list, show, stop."""


@actors.command("list")
@click.option("--kind", help="Only actors of this kind.")
@limit_option
def list_actors(kind: str | None, limit: int) -> None:
    """The busy ones first."""
    query = {"kind": kind, "limit": min(limit, 200)}
    found = mapping(session().client.get("/v1/actors", query))
    show_list(mappings(found["actors"]), ACTOR_COLUMNS)


@actors.command("show")
@click.argument("kind")
@click.argument("key")
def show_actor(kind: str, key: str) -> None:
    """One actor."""
    show_one(mapping(session().client.get(f"/v1/actors/{segment(kind)}/{segment(key)}")))


@actors.command("stop")
@click.argument("kind")
@click.argument("key")
def stop_actor(kind: str, key: str) -> None:
    """Passivate one after what is in its mailbox; its next message makes it anew."""
    path = f"/v1/actors/{segment(kind)}/{segment(key)}/stop"
    found = mapping(session().client.post(path))
    if session().as_json:
        show_json(found)
    else:
        click.echo(f"{kind} {key} stops.")
