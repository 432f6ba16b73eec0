"""glamctl about keys: the ceremony at which components are typed, and lists of check values.

What is typed is not echoed, not kept, not an argument, and goes to the daemon over its socket.
"""

import re
import sys

import click

from glamd.admin.cli_common import Group, mapping, mappings, session, show_list, show_one

KEY_COLUMNS = ("keyring", "version", "status", "provider", "kcv", "created_at")
KEY_SET_COLUMNS = (
    "key_set",
    "scheme",
    "data_usage",
    "padding",
    "mac",
    "kcv",
    "status",
    "created_at",
)

_COMPONENT = re.compile(r"(?:[0-9A-Fa-f]{2}){16,32}")
_KCV = re.compile(r"[0-9A-Fa-f]{6}")


@click.group(cls=Group)
def keys() -> None:
    """Keys, by name and check value: list, import-bdk, list-bdk."""


@keys.command("list")
def list_keys() -> None:
    """Every version of every keyring."""
    show_list(mappings(mapping(session().client.get("/v1/keys"))["keys"]), KEY_COLUMNS)


@keys.command("list-bdk")
def list_bdk() -> None:
    """Every key set."""
    found = mapping(session().client.get("/v1/key-sets"))
    show_list(mappings(found["key_sets"]), KEY_SET_COLUMNS)


@keys.command("import-bdk")
@click.argument("key_set")
@click.option("--scheme", type=click.Choice(["tdes-dukpt", "aes-dukpt"]), required=True)
@click.option("--variant", type=click.Choice(["data", "pin"]), help="TDES: the data key's variant.")
@click.option("--data-usage", type=click.Choice(["encrypt", "both"]), help="AES: its key usage.")
@click.option("--padding", type=click.Choice(["zero", "pkcs7", "none"]))
@click.option("--mac", type=click.Choice(["optional", "required"]))
@click.option("--components", is_flag=True, help="Type 2 or 3 components, each with its KCV.")
@click.option("--clear", metavar="HEX", help="In development: the key itself.")
def import_bdk(
    *,
    key_set: str,
    scheme: str,
    variant: str | None,
    data_usage: str | None,
    padding: str | None,
    mac: str | None,
    components: bool,
    clear: str | None,
) -> None:
    """Import a base derivation key under KEY_SET and show its check value."""
    if components == (clear is not None):
        raise click.UsageError("Say either --components or --clear HEX.")
    if variant is not None and scheme != "tdes-dukpt":
        raise click.UsageError("--variant is for tdes-dukpt; AES has --data-usage.")
    if data_usage is not None and scheme != "aes-dukpt":
        raise click.UsageError("--data-usage is for aes-dukpt; TDES has --variant.")
    body: dict[str, object] = {"key_set": key_set, "scheme": scheme}
    chosen = {"data_usage": variant or data_usage, "padding": padding, "mac": mac}
    body |= {name: value for name, value in chosen.items() if value is not None}
    if clear is not None:
        body["clear"] = clear
    else:
        body["components"] = _components()
    show_one(mapping(session().client.post("/v1/key-sets", body)))


def _components() -> list[dict[str, str]]:
    count = int(_asked("How many components", re.compile("[23]"), "It is 2 or 3.", hidden=False))
    found = []
    for number in range(1, count + 1):
        component = _asked(
            f"Component {number} of {count}, in hex (not shown)",
            _COMPONENT,
            "It is 32 to 64 hexadecimal digits.",
            hidden=True,
        )
        kcv = _asked(
            f"Check value of component {number}", _KCV, "It is 6 hexadecimal digits.", hidden=False
        )
        found.append({"hex": component, "kcv": kcv})
    return found


def _asked(question: str, shape: re.Pattern[str], rule: str, *, hidden: bool) -> str:
    """What was typed, blanks between digits allowed; asked again at a terminal until it fits.

    From a pipe one line is one answer, and nothing is echoed for there is no terminal to do it.
    """
    while True:
        if sys.stdin.isatty():
            typed = click.prompt(question, hide_input=hidden, err=True, type=str)
        else:
            typed = sys.stdin.readline()
        typed = "".join(typed.split())
        if shape.fullmatch(typed):
            return typed
        if not sys.stdin.isatty():
            raise click.UsageError(f"{question}: {rule}")
        click.echo(rule, err=True)
