"""glamctl about base derivation keys: how they are imported, their list, their end.

The questions of a ceremony are asked in `key_entry`.
"""

from pathlib import Path

import click

from glamd.admin import key_entry
from glamd.admin.cli_common import (
    Command,
    confirm,
    mapping,
    mappings,
    session,
    show_list,
    show_one,
    yes_option,
)
from glamd.admin.client import segment

KEY_SET_COLUMNS = (
    "key_set",
    "scheme",
    "data_usage",
    "padding",
    "mac",
    "reader",
    "kcv",
    "provider",
    "hsm_label",
    "devices",
    "status",
    "created_at",
    "retired_at",
)
MAX_BLOCK_BYTES = 16 * 1024


@click.command("list-bdk", cls=Command)
def list_bdk() -> None:
    """Every key set, and how many devices have a key of it."""
    found = mapping(session().client.get("/v1/key-sets"))
    show_list(mappings(found["key_sets"]), KEY_SET_COLUMNS)


@click.command("import-bdk", cls=Command)
@click.argument("key_set")
@click.option("--scheme", type=click.Choice(["tdes-dukpt", "aes-dukpt"]), required=True)
@click.option("--variant", type=click.Choice(["data", "pin"]), help="TDES: the data key's variant.")
@click.option("--data-usage", type=click.Choice(["encrypt", "both"]), help="AES: its key usage.")
@click.option("--padding", type=click.Choice(["zero", "pkcs7", "none"]))
@click.option("--mac", type=click.Choice(["optional", "required"]))
@click.option("--reader", metavar="NAME", help="What its readers put around the ciphertext.")
@click.option("--counter-window", type=int, help="Counters behind the highest that may still come.")
@click.option("--components", is_flag=True, help="Type 2 or 3 components, each with its KCV.")
@click.option(
    "--key-block",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with a TR-31 or X9.143 key block; its protection key is typed in components.",
)
@click.option("--hsm-label", metavar="L", help="A key that the HSM holds already, by its label.")
@click.option("--clear", metavar="HEX", help="In development: the key itself.")
def import_bdk(
    *,
    key_set: str,
    scheme: str,
    variant: str | None,
    data_usage: str | None,
    components: bool,
    key_block: Path | None,
    hsm_label: str | None,
    clear: str | None,
    **settings: object,
) -> None:
    """Import a base derivation key under KEY_SET and show its check value."""
    if [components, key_block is not None, hsm_label is not None, clear is not None].count(
        True
    ) != 1:
        raise click.UsageError(
            "Say one of --components, --key-block FILE, --hsm-label L and --clear HEX."
        )
    if variant is not None and scheme != "tdes-dukpt":
        raise click.UsageError("--variant is for tdes-dukpt; AES has --data-usage.")
    if data_usage is not None and scheme != "aes-dukpt":
        raise click.UsageError("--data-usage is for aes-dukpt; TDES has --variant.")
    body: dict[str, object] = {"key_set": key_set, "scheme": scheme}
    chosen = {"data_usage": variant or data_usage, **settings}
    chosen |= {"hsm_label": hsm_label, "clear": clear}
    body |= {name: value for name, value in chosen.items() if value is not None}
    if key_block is not None:
        block = _block(key_block)
        body |= {"key_block": block, "kbpk": key_entry.protection_key(block, scheme)}
    if components:
        body["components"] = key_entry.base_derivation_key(scheme)
    show_one(mapping(session().client.post("/v1/key-sets", body)))


@click.command("retire-bdk", cls=Command)
@click.argument("key_set")
@yes_option
def retire_bdk(key_set: str, yes: bool) -> None:
    """Refuse its devices' payments, and further devices, from now on and for good."""
    confirm(f"Retire the key set {key_set} for good, with all its devices?", yes=yes)
    show_one(mapping(session().client.post(f"/v1/key-sets/{segment(key_set)}/retire")))


def _block(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(MAX_BLOCK_BYTES + 1)
    if len(raw) > MAX_BLOCK_BYTES or not raw.isascii():
        raise click.UsageError(f"{path} is no key block.")
    return raw.decode("ascii")


KEY_SET_COMMANDS = (list_bdk, import_bdk, retire_bdk)
"""For the group `keys`."""
