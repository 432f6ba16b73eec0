"""glamctl about platform tokens: how connections are, who touched them, and the import.

No secret is shown, for none comes over the socket. The import reads the older service's rows by
itself, so that the daemon is never told where they are.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glamd.admin.cli_common import (
    EXIT_FAILED,
    Group,
    limit_option,
    mapping,
    mappings,
    session,
    show_json,
    show_list,
    show_one,
)
from glamd.admin.client import segment

if TYPE_CHECKING:
    from glamd.admin.older.rows import Place, Rows

PLATFORMS = ("shopify", "woocommerce", "bigcommerce", "magento", "squarespace", "custom")
HEALTHS = ("valid", "expired", "refresh-failing")
COLUMNS = ("merchant_id", "platform", "domain", "health", "expires_at")
LOG_COLUMNS = ("at", "platform", "action", "success", "error", "by", "ip", "correlation_id")
FIELDS = (
    "id",
    "merchant_id",
    "platform_name",
    "platform_shop_id",
    "domain",
    "encrypted_token",
    "token_type",
    "expires_at",
    "scopes",
    "created_at",
    "updated_at",
    "last_accessed_by",
    "last_accessed_at",
    "access_count",
)
"""The fields of an older row; named here too, so that completion needs none of the daemon's."""

URL_VARIABLE = "GLAMD_IMPORT_URL"
BATCH_LIMIT = 500
HOLD_H = 24
HOLD_LIMIT_H = 144
PAGE_LIMIT = 200
MAX_ROW_ID = 2**63 - 1


@click.group(cls=Group)
def credentials() -> None:
    """Platform tokens, without their secrets: list, show, import."""


@credentials.command("list")
@click.option("--merchant", "merchant_id", type=click.UUID, help="Only this merchant's.")
@click.option("--platform", type=click.Choice(PLATFORMS), help="Only with this platform.")
@click.option("--health", type=click.Choice(HEALTHS), help="Only those that are so.")
@click.option("--after", metavar="MERCHANT:PLATFORM", help="Only those behind this one.")
@limit_option
def list_connections(
    *, merchant_id: object, platform: str | None, health: str | None, after: str | None, limit: int
) -> None:
    """Merchants' connections with their platforms, by merchant and platform."""
    query = {
        "merchant_id": None if merchant_id is None else str(merchant_id),
        "platform": platform,
        "health": health,
    }
    found: list[Mapping[str, object]] = []
    following: object = after
    while len(found) < limit:
        size = min(limit - len(found), PAGE_LIMIT)
        page = mapping(
            session().client.get("/v1/credentials", {**query, "limit": size, "after": following})
        )
        found += mappings(page["connections"])
        following = page["next"]
        if following is None:
            break
    show_list(found, COLUMNS)


@credentials.command()
@click.argument("merchant_id", metavar="MERCHANT")
@click.argument("platform", type=click.Choice(PLATFORMS), required=False)
@click.option(
    "--log",
    "rows",
    type=click.IntRange(1, PAGE_LIMIT),
    help="The last rows of the merchant's access log.",
)
@click.option(
    "--before",
    type=click.IntRange(1, MAX_ROW_ID),
    help="With --log: only rows that are older than the one with this id.",
)
def show(merchant_id: str, platform: str | None, rows: int | None, before: int | None) -> None:
    """A merchant's connections, or the one with PLATFORM; never the secret."""
    if before is not None and rows is None:
        raise click.UsageError("--before goes with --log.")
    client = session().client
    path = f"/v1/credentials/{segment(merchant_id)}"
    found = dict(mapping(client.get(path if platform is None else f"{path}/{platform}")))
    page: Mapping[str, object] = {}
    if rows is not None:
        page = mapping(client.get(f"{path}/access-log", {"limit": rows, "before": before}))
    if session().as_json:
        log = {"access_log": page["accesses"], "access_log_next": page["next"]} if page else {}
        show_json({**found, **log})
        return
    for number, connection in enumerate(mappings(found.get("connections", found))):
        if number:
            click.echo()
        show_one(connection)
    if page:
        show_list(mappings(page["accesses"]), LOG_COLUMNS)
        if page["next"] is not None:
            click.echo(f"Older rows: --before {page['next']}")


def _columns(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> dict[str, str]:
    """Which column each field is in; as the field is called, where nothing else is said."""
    columns = {name: name for name in FIELDS}
    for pair in given:
        name, separator, theirs = pair.partition("=")
        if not separator or name not in columns:
            raise click.BadParameter(f"It is NAME=THEIRS, with a NAME of {', '.join(FIELDS)}.")
        columns[name] = theirs
    return columns


@credentials.command("import")
@click.option("--from-url", "url", metavar="URL", help=f"The older database [${URL_VARIABLE}].")
@click.option(
    "--from-url-file",
    "url_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with that URL in it, so that its password is in no argument.",
)
@click.option(
    "--from-file",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with a row on each line, as JSON.",
)
@click.option("--table", default="platform_tokens", show_default=True, help="The older table.")
@click.option(
    "--column",
    "columns",
    multiple=True,
    callback=_columns,
    metavar="NAME=THEIRS",
    help="What the older table calls a field; may be repeated.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, BATCH_LIMIT),
    default=BATCH_LIMIT,
    show_default=True,
    help="Rows in a transaction.",
)
@click.option(
    "--hold-renewal",
    "hold_renewal_h",
    metavar="HOURS",
    type=click.IntRange(0, HOLD_LIMIT_H),
    default=HOLD_H,
    show_default=True,
    help="For so long glamd renews none of these tokens, since that may end them where they are"
    " from; 0 lets renewals begin.",
)
@click.option("--restart", is_flag=True, help="Go through all rows again, from the first one.")
@click.option("--dry-run", is_flag=True, help="Say what would become of the rows, write nothing.")
def import_tokens(
    *,
    url: str | None,
    url_file: Path | None,
    file: Path | None,
    table: str,
    columns: dict[str, str],
    batch: int,
    hold_renewal_h: int,
    restart: bool,
    dry_run: bool,
) -> None:
    """Bring over what the older token service kept, ids and all; go on where it stopped.

    The daemon opens and seals; it needs the older TOKEN_ENCRYPTION_KEY as credentials.import_key.
    """
    given = _source(url=url, url_file=url_file, file=file)
    client, as_json = session().client, session().as_json
    progress = mapping(client.get("/v1/credentials/import"))

    from glamd.admin.older import run  # noqa: PLC0415 - it draws with rich

    state = run.begun(progress, restart=restart, dry_run=dry_run, hold_renewal_h=hold_renewal_h)
    with _opened(given, table=table, columns=columns, after=state.place) as source:
        run.look_at(source, state, as_json=as_json)
        meter = run.meter(source.total, as_json=as_json)
        run.run(client, source, meter, state=state, batch=batch)
    run.show(state, as_json=as_json)
    if not state.clean:
        sys.exit(EXIT_FAILED)


def _source(*, url: str | None, url_file: Path | None, file: Path | None) -> str | Path:
    """The one source that was named: the older database's URL, or a file of rows."""
    given = [source for source in (url, url_file, file) if source is not None]
    if not given:
        url = os.environ.get(URL_VARIABLE) or None
        given = [] if url is None else [url]
    if len(given) != 1:
        raise click.UsageError(
            f"Say one of --from-url, --from-url-file, --from-file (or ${URL_VARIABLE})."
        )
    if file is not None and not file.is_file():
        raise click.UsageError(f"{file} is no file that can be read twice.")
    if url_file is None:
        return given[0]
    try:
        text = url_file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        raise click.UsageError(f"{url_file} cannot be read.") from None
    if not text or len(text.splitlines()) > 1:
        raise click.UsageError(f"{url_file} should hold one line, a URL.")
    return text


def _opened(
    source: str | Path, *, table: str, columns: dict[str, str], after: "Place"
) -> AbstractContextManager["Rows"]:
    from glamd import logs  # noqa: PLC0415 - only what connects to a database logs
    from glamd.admin.older import rows, store  # noqa: PLC0415 - they bring the driver along

    # What goes wrong is told by the command; stdout is for its answer.
    logs.configure("critical", "console", sys.stderr)
    if isinstance(source, Path):
        return rows.of_file(source, columns=columns, after=after)
    return store.of_table(source, table=table, columns=columns, after=after)
