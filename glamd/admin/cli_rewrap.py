"""glamctl about key providers: `keys providers`, `keys rewrap`.

No key is shown, for none comes over the socket.
"""

import sys
from typing import Final

import click

from glamd.admin.cli_common import (
    EXIT_FAILED,
    Command,
    confirm,
    mapping,
    mappings,
    session,
    show_json,
    show_list,
    yes_option,
)

REWRAP_TIMEOUT_S: Final = 4 * 3600.0
"""A provider that does not answer takes its seconds for every key."""

PROVIDER_COLUMNS: Final = ("provider", "current", "configured", "keys", "health", "trouble")
REWRAP_COLUMNS: Final = ("key", "outcome", "before", "provider", "reason")


@click.command("providers", cls=Command)
def providers() -> None:
    """Each key provider: how it is, and how many keys it still holds."""
    found = mapping(session().client.get("/v1/key-providers"))
    show_list(mappings(found["providers"]), PROVIDER_COLUMNS)


@click.command("rewrap", cls=Command)
@yes_option
def rewrap(*, yes: bool) -> None:
    """Move every key to the current key provider and key-encryption key."""
    confirm("Wrap every key anew with the current key provider?", yes=yes)
    answer = session().client.post("/v1/key-providers/rewrap", {}, timeout_s=REWRAP_TIMEOUT_S)
    report = mapping(answer)
    if session().as_json:
        show_json(report)
    else:
        show_list(mappings(report["keys"]), REWRAP_COLUMNS)
    if report.get("failed"):
        click.echo(f"Keys that were not moved: {report['failed']}.", err=True)
        sys.exit(EXIT_FAILED)


REWRAP_COMMANDS: Final = (providers, rewrap)
"""For the group `keys`."""
