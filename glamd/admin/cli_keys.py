"""glamctl about data keys: their versions, the steps of a version's life, and how far they are.

Keys go by name and check value; nothing here shows one.
"""

import sys
from collections.abc import Mapping

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
    text_of,
    yes_option,
)
from glamd.admin.client import segment

KEY_COLUMNS = ("keyring", "version", "status", "provider", "kcv", "created_at")
VERSION_COLUMNS = ("keyring", "version", "status", "provider", "kcv", "activated_at")

LOOK_TIMEOUT_S = 620.0
"""The daemon looks at all rows twice before a version is retired."""
BAR_WIDTH = 24
PIPE_WIDTH = 1000


@click.group(cls=Group)
def keys() -> None:
    """Keys, by name and check value: their versions, rotation, base derivation keys."""


@keys.command("list")
def list_keys() -> None:
    """Every version of every keyring."""
    show_list(mappings(mapping(session().client.get("/v1/keys"))["keys"]), KEY_COLUMNS)


@keys.command("rotate")
@click.argument("keyring")
def rotate(*, keyring: str) -> None:
    """Make the next version of KEYRING active; its rows are re-encrypted in the background."""
    show_one(mapping(session().client.post(f"/v1/keyrings/{segment(keyring)}/rotate")))


@keys.command("retire")
@click.argument("keyring")
@click.argument("version")
def retire(*, keyring: str, version: str) -> None:
    """Say that no row needs VERSION of KEYRING; refused while one does."""
    _step(keyring, version, "retire")


@keys.command("destroy")
@click.argument("keyring")
@click.argument("version")
@yes_option
def destroy(*, keyring: str, version: str, yes: bool) -> None:
    """Erase a retired VERSION of KEYRING for good."""
    told = "Rows that are restored from backups without it stay shut."
    confirm(f"Destroy {version} of {keyring}? {told}", yes=yes)
    _step(keyring, version, "destroy")


@keys.command("status")
def status() -> None:
    """Where each keyring stands, and how far re-encryption is."""
    found = mapping(session().client.get("/v1/keyrings"))
    if session().as_json:
        show_json(found)
        return
    keyrings = {name: mapping(entry) for name, entry in found.items()}
    _show_progress(keyrings)
    show_list(
        [version for entry in keyrings.values() for version in mappings(entry["versions"])],
        VERSION_COLUMNS,
    )
    for name, entry in keyrings.items():
        warnings = entry["warnings"]
        assert isinstance(warnings, list)
        for warning in warnings:
            click.echo(f"warning: {name}: {text_of(warning)}", err=True)


def _step(keyring: str, version: str, step: str) -> None:
    path = f"/v1/keyrings/{segment(keyring)}/{segment(version)}/{step}"
    show_one(mapping(session().client.post(path, timeout_s=LOOK_TIMEOUT_S)))


def _show_progress(keyrings: Mapping[str, Mapping[str, object]]) -> None:
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - only where a table is drawn
    from rich.console import Console  # noqa: PLC0415
    from rich.progress_bar import ProgressBar  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("keyring", "active", "re-encrypted", "", "remaining", "rows/s", "time left"):
        # On a narrow terminal the bar gives way, not the names.
        table.add_column(name, overflow="fold", no_wrap=name == "keyring")
    for name, entry in keyrings.items():
        done, remaining = _number(entry["done"]), _number(entry["remaining"])
        total = done + remaining
        share = done / total if total else 1.0
        bar = ProgressBar(total=1.0, completed=share, width=BAR_WIDTH)
        table.add_row(
            name,
            text_of(entry["active"]),
            bar,
            # Never rounded up: 100 % is when nothing is left.
            f"{int(100 * share)} %",
            f"{remaining:,.0f}",
            f"{_number(entry['rate']):,.0f}",
            _time_left(entry["eta_s"]),
        )
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _time_left(eta_s: object) -> str:
    if not isinstance(eta_s, int | float):
        return "?"
    minutes, seconds = divmod(round(eta_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if eta_s else "-"
