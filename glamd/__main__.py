"""`glamd`: the arguments, the event loop, the signals, and how a failed start is told.

What runs is built in `glamd.app` (`run`) and `glamd.embedded.dev` (`dev`); nothing of it is here.
"""

import asyncio
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Final

import click
import uvloop

from glamd import __version__
from glamd.errors import ConfigError, FieldError, GlamError
from glamd.hygiene import protect_memory

EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 78
"""EX_CONFIG of sysexits.h: systemd does not restart what only an operator can mend."""

_CONFIG = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The TOML file; without it /etc/glamd/glamd.toml where that exists.",
)
_PORT = click.IntRange(0, 65535)


@click.group()
@click.version_option(__version__, prog_name="glamd")
def main() -> None:
    """Payment tokens for a commerce platform, in one daemon."""
    # Before there is a key in it; what did not hold is logged.
    protect_memory()


@main.command()
@_CONFIG
def run(config_file: Path | None) -> None:
    """Run the daemon; what systemd starts."""
    from glamd import service  # noqa: PLC0415 - `glamd --help` need not load the whole daemon

    _run(service.serve(config_file))


@main.command()
@click.option("--state-dir", type=click.Path(path_type=Path, file_okay=False), help="Its folder.")
@click.option("--http-port", type=_PORT, help="0: any free one.")
@click.option("--worker-port", type=_PORT, help="0: any free one.")
@click.option("--mqtt-port", type=_PORT, help="0: any free one.")
@click.option("--no-demo", is_flag=True, help="No tapping terminals, no merchant that buys.")
@click.option("--fresh", is_flag=True, help="Forget what an earlier start left.")
def dev(
    *,
    state_dir: Path | None,
    http_port: int | None,
    worker_port: int | None,
    mqtt_port: int | None,
    no_demo: bool,
    fresh: bool,
) -> None:
    """Run everything at once for development: database, authorities, terminals."""
    from glamd.embedded import dev as development  # noqa: PLC0415 - as above
    from glamd.embedded.settings import Ports  # noqa: PLC0415 - as above

    given = os.environ.get("GLAMD_STATE_DIR")
    chosen = state_dir or (Path(given) if given else development.DEFAULT_STATE_DIR)
    _run(
        development.run(
            development.Options(
                state_dir=chosen,
                ports=Ports(http=http_port, worker=worker_port, mqtt=mqtt_port),
                demo=not no_demo,
                fresh=fresh,
            )
        )
    )


@main.command("check-config")
@_CONFIG
def check_config(config_file: Path | None) -> None:
    """Print the effective configuration, secrets masked, or every mistake at once."""
    from glamd import config, wiring  # noqa: PLC0415 - as above

    try:
        settings = config.load(config.file_of(config_file), environ=os.environ)
        config.check_files(settings)
        wiring.check(settings)
    except ConfigError as error:
        for field in error.fields or (FieldError("config", error.message),):
            click.echo(f"glamd: {field.field}: {field.message}", err=True)
        sys.exit(EXIT_CONFIG)
    for warning in settings.warnings:
        click.echo(f"glamd: warning: {warning}", err=True)
    click.echo(config.effective(settings))


def _run(work: Coroutine[None, None, None]) -> None:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work)
    except GlamError as error:
        _fail(error)


def _fail(error: GlamError) -> None:
    click.echo(f"glamd: {error.message}", err=True)
    sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED)


if __name__ == "__main__":
    main()
