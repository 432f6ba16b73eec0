"""glamctl about events: what waits, what could not be applied, and doing it again."""

from datetime import UTC, datetime
from uuid import UUID

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

OUTBOX_COLUMNS = ("outbox", "rows", "oldest_s", "sent_here")
CONSUMER_COLUMNS = ("subject", "waiting", "unfinished", "redelivered")
LETTER_COLUMNS = ("id", "received_at", "subject", "event_id", "attempts", "reason")
PAGE_LIMIT = 200
MAX_LETTER_ID = 10**18 - 1
REPLAY_TIMEOUT_S = 4 * 3600.0
"""What was sent in three days takes its time."""


@click.group(cls=Group)
def events() -> None:
    """Events in and out: lag, dead-letters, replay, discard."""


@events.command()
def lag() -> None:
    """What waits in the outboxes, and in the stream for each subject that is consumed."""
    found = mapping(session().client.get("/v1/events/lag"))
    if session().as_json:
        show_json(found)
        return
    show_list(mappings(found["outboxes"]), OUTBOX_COLUMNS)
    if found["trouble"] is None:
        show_list(mappings(found["consumers"]), CONSUMER_COLUMNS)
    else:
        click.echo(f"Of consumers nothing is known: {found['trouble']}", err=True)


@events.command("dead-letters")
@click.option(
    "--limit", type=click.IntRange(1, PAGE_LIMIT), default=50, show_default=True, help="At most."
)
@click.option(
    "--after", type=click.IntRange(1, MAX_LETTER_ID), help="Only those behind the one with this id."
)
def dead_letters(limit: int, after: int | None) -> None:
    """Events that could not be applied, newest first; with --json also what was in them."""
    query = {"limit": limit, "after": after}
    found = mapping(session().client.get("/v1/events/dead-letters", query))
    show_list(mappings(found["dead_letters"]), LETTER_COLUMNS)
    if found["next"] is not None and not session().as_json:
        click.echo(f"Older letters: --after {found['next']}")


def _moment(_context: click.Context, _parameter: click.Parameter, text: str | None) -> str | None:
    """A moment with its offset; one without is UTC."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter("It is a time such as 2030-01-31T12:00:00Z.") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).isoformat()


@events.command()
@click.option(
    "--since",
    metavar="WHEN",
    callback=_moment,
    help="Send again what was sent since then, such as 2030-01-31T12:00:00Z (UTC).",
)
@click.option("--subject", help="Only events, or letters, of this subject.")
@click.option("--merchant", "merchant_id", type=click.UUID, help="With --since: only this one's.")
@click.option(
    "--dead-letter",
    "letter_id",
    metavar="ID",
    type=click.IntRange(1, MAX_LETTER_ID),
    help="Have the event of this dead letter handled again.",
)
@click.option(
    "--dead-letters",
    "all_letters",
    is_flag=True,
    help="Have those of all open dead letters handled again, or of one --subject.",
)
def replay(
    *,
    since: str | None,
    subject: str | None,
    merchant_id: UUID | None,
    letter_id: int | None,
    all_letters: bool,
) -> None:
    """Send events again, or have dead letters' handled again; who has had them drops them."""
    if (since is not None) + (letter_id is not None) + all_letters != 1:
        raise click.UsageError("It is one of --since, --dead-letter and --dead-letters.")
    if since is None and merchant_id is not None:
        raise click.UsageError("--merchant goes with --since.")
    if letter_id is not None and subject is not None:
        raise click.UsageError("--subject goes with --since or --dead-letters.")
    client = session().client
    if letter_id is not None:
        _show_letter(client.post(f"/v1/events/dead-letters/{letter_id}/replay"))
        return
    if all_letters:
        body = {"subject": subject}
        replayed = client.post("/v1/events/dead-letters/replay", body, timeout_s=REPLAY_TIMEOUT_S)
        show_one(mapping(replayed))
        if mapping(replayed)["failed"]:
            raise click.exceptions.Exit(1)
        return
    body = {"since": since, "subject": subject}
    body["merchant_id"] = None if merchant_id is None else str(merchant_id)
    show_one(mapping(client.post("/v1/events/replay", body, timeout_s=REPLAY_TIMEOUT_S)))


@events.command()
@click.argument("letter_id", metavar="ID", type=click.IntRange(1, MAX_LETTER_ID))
@yes_option
def discard(letter_id: int, *, yes: bool) -> None:
    """Give up a dead letter that you have looked at: its event never has its effect."""
    confirm(f"Dead letter {letter_id} is given up, its event never has its effect. Go on?", yes=yes)
    _show_letter(session().client.post(f"/v1/events/dead-letters/{letter_id}/discard"))


def _show_letter(answer: object) -> None:
    found = dict(mapping(answer))
    if not session().as_json:
        del found["payload"], found["headers"]
    show_one(found)
