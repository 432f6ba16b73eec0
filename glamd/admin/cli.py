"""glamctl, the operators' command: its groups put together, and the way in.

Commands stand in the `cli_*` files; each asks the daemon over its admin socket, but for `db`, which
goes straight to the database, and the imports, which read an older service's.
"""

from pathlib import Path

import click

from glamd.admin.cli_audit import audit
from glamd.admin.cli_billing import billing
from glamd.admin.cli_common import RootGroup, Session, default_socket
from glamd.admin.cli_credentials import credentials
from glamd.admin.cli_daemon import actors, drain, health, log_level, status, version
from glamd.admin.cli_db import db
from glamd.admin.cli_devices import device
from glamd.admin.cli_events import events
from glamd.admin.cli_import import imports
from glamd.admin.cli_jwt import jwt
from glamd.admin.cli_key_sets import KEY_SET_COMMANDS
from glamd.admin.cli_keys import keys
from glamd.admin.cli_ledger import ledger
from glamd.admin.cli_merchants import merchant
from glamd.admin.cli_rewrap import REWRAP_COMMANDS
from glamd.admin.cli_tokens import tokens


@click.group(
    "glamctl",
    cls=RootGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 failed, 2 wrongly used.",
)
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    default=None,
    help="The daemon's admin socket [$GLAMD_ADMIN_SOCKET, else .glamd/dev/admin.sock if it is"
    " there, else /run/glamd/admin.sock].",
)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON, for programs.")
@click.pass_context
def glamctl(context: click.Context, socket: Path | None, as_json: bool) -> None:
    """Command a running glamd: merchants, devices, keys, tokens, money, and itself."""
    context.obj = Session(socket=socket or default_socket(), as_json=as_json)


for _command in (
    status,
    health,
    drain,
    log_level,
    version,
    actors,
    merchant,
    device,
    keys,
    tokens,
    audit,
    credentials,
    ledger,
    billing,
    events,
    imports,
    jwt,
    db,
):
    glamctl.add_command(_command)
for _command in (*KEY_SET_COMMANDS, *REWRAP_COMMANDS):
    keys.add_command(_command)


def main() -> None:
    """The entry point of the `glamctl` script."""
    glamctl()
