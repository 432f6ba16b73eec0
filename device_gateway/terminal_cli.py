"""`glam-terminal`: tap one card, or be very many terminals at once.

Arguments in, exit status out: 0 done, 1 refused or failed, 2 used wrongly. A card number that was
typed in is never shown again, not even in an error. Programs get JSON on stdout with `--json`;
errors are one line on stderr either way.
"""

import asyncio
import re
import resource
import sys
import uuid
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar, get_args

import click
import orjson
import uvloop
from rich.console import Console
from rich.live import Live
from rich.text import Text

from device_gateway.mqtt.codec import Version
from device_gateway.terminal import Answer, Terminal
from device_gateway.terminal_card import CardReader, DemoCard, clear_form
from device_gateway.terminal_device import Counters, Device, load_device
from device_gateway.terminal_load import Load, LoadPlan, LoadReport
from device_gateway.terminal_record import Record
from device_gateway.terminal_show import progress_line, report_json, show_report, show_token
from device_gateway.terminal_site import devices_in, load_devices, read_site, swipe_folder
from glamd.clock import SystemClock
from glamd.errors import ConfigError, GlamError
from glamd.payments.model import Format

DEFAULT_STATE_DIR: Final = Path(".glamd/dev")
PAN_LIMIT_DIGITS: Final = 32
TERMINALS_LIMIT: Final = 20_000
IN_FLIGHT_LIMIT: Final = 64
_PROGRESS_EVERY_S: Final = 0.25
_VERSIONS: Final = {"5": Version.V5, "3.1.1": Version.V311}

_LONG_NUMBER: Final = re.compile(r"\d[\d -]{6,}\d")

T = TypeVar("T")

_state_dir = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    envvar="GLAMD_STATE_DIR",
    default=DEFAULT_STATE_DIR,
    show_default=True,
    show_envvar=True,
    help="Where `glamd dev` wrote its dev.json.",
)
_mqtt = click.option(
    "--mqtt",
    type=click.Choice(list(_VERSIONS)),
    default="5",
    show_default=True,
    help="MQTT version.",
)
_json = click.option("--json", "as_json", is_flag=True, help="JSON on stdout, for programs.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """A virtual payment terminal for glamd: test cards only."""


@cli.command()
@click.argument("pan", nargs=-1, required=True)
@click.option(
    "--exp", default="4912", show_default=True, metavar="YYMM", help="Expiry of the card."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(get_args(Format)),
    default="track2",
    show_default=True,
    help="How the terminal reads it.",
)
@click.option("--device", type=click.Path(path_type=Path), help="A device.json or its directory.")
@_state_dir
@_mqtt
@click.option("--mac", is_flag=True, help="Send a MAC over the ciphertext.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 3600),
    default=15.0,
    show_default=True,
    help="Seconds to wait for the answer.",
)
@_json
def swipe(
    *,
    pan: tuple[str, ...],
    exp: str,
    form: Format,
    device: Path | None,
    state_dir: Path,
    mqtt: str,
    mac: bool,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Tap the card PAN (blanks allowed) and show its token. Bad cards are sent as they are."""
    card = DemoCard(pan=_pan(pan), expiry=_expiry(exp))
    tap = partial(_swipe, card, form, version=_VERSIONS[mqtt], mac=mac, timeout_s=timeout_s)
    if device:
        chosen = load_device(device)
        answer, ms = _run(tap(chosen))
    else:
        site = read_site(state_dir)
        with swipe_folder(site) as folder:
            [chosen] = _run(devices_in(site, [folder]))
            answer, ms = _run(tap(chosen))
    if as_json:
        line = {**answer.fields, "device_id": chosen.device_id, "ms": round(ms, 3)}
        click.echo(orjson.dumps(line))
    elif answer.ok:
        show_token(Console(), answer, ms)
    if not answer.ok:
        _fail(f"{answer.code}: {answer.text('message')}")


@cli.command()
@click.option(
    "--rate",
    type=click.FloatRange(0, 1_000_000),
    default=0.0,
    show_default=True,
    help="Taps a second over all terminals; 0 for as many as are answered.",
)
@click.option("--terminals", type=click.IntRange(1, TERMINALS_LIMIT), default=20, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 86_400), default=10.0, show_default=True)
@click.option(
    "--in-flight",
    type=click.IntRange(1, IN_FLIGHT_LIMIT),
    default=1,
    show_default=True,
    help="With rate 0: requests that a terminal has outstanding.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which cards are tapped.")
@click.option(
    "--record",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Append what was sent and answered to this file, as JSON lines.",
)
@_state_dir
@_mqtt
@_json
def load(
    *,
    rate: float,
    terminals: int,
    seconds: float,
    in_flight: int,
    seed: int,
    record: Path | None,
    state_dir: Path,
    mqtt: str,
    as_json: bool,
) -> None:
    """Be many terminals at once, and show how fast they were answered.

    The terminals are enrolled with the `glamd dev` of the state directory and kept for next time.
    """
    plan = LoadPlan(
        rate_per_s=rate, seconds=seconds, in_flight=in_flight, seed=seed, version=_VERSIONS[mqtt]
    )
    report = _run(_load(plan, state_dir, terminals, record, quiet=as_json))
    if as_json:
        click.echo(orjson.dumps(report_json(report)))
    else:
        show_report(Console(), report)
    if report.unanswered:
        _fail(f"{report.unanswered} requests were not answered")


async def _swipe(
    card: DemoCard, form: Format, device: Device, *, version: Version, mac: bool, timeout_s: float
) -> tuple[Answer, float]:
    """The answer, and the milliseconds from tap to answer on a connection that stands."""
    clock = SystemClock()
    reader = CardReader(device, Counters(device))
    terminal = Terminal(device, clock=clock, version=version, give_up=True)
    async with asyncio.TaskGroup() as group:
        group.create_task(terminal.run(), name="terminal")
        try:
            deadline_s = clock.monotonic_s() + timeout_s
            await terminal.connect(timeout_s=timeout_s)
            request_id = uuid.uuid4().hex
            payload = reader.request(
                request_id, clear_form(card, form), form, mac=mac, at=clock.now()
            )
            tapped_s = clock.monotonic_s()
            answer = await terminal.ask(request_id, payload, timeout_s=deadline_s - tapped_s)
            return answer, (clock.monotonic_s() - tapped_s) * 1000
        finally:
            terminal.close()


async def _load(
    plan: LoadPlan, state_dir: Path, terminals: int, record: Path | None, *, quiet: bool
) -> LoadReport:
    clock = SystemClock()
    site = read_site(state_dir)
    _allow_descriptors(terminals)
    devices = await load_devices(site, terminals)

    def locate() -> tuple[str, int]:
        # A daemon that was started again may listen elsewhere, and dev.json is gone in between.
        with suppress(ConfigError):
            again = read_site(state_dir)
            return again.host, again.port
        return site.host, site.port

    if record is None:
        return await _shown(Load(plan, devices, clock=clock, locate=locate), quiet=quiet)
    try:
        lines = Record(record, clock)
    except OSError as error:
        raise ConfigError(f"cannot append to {record}: {error.strerror}") from error
    with lines:
        load = Load(plan, devices, clock=clock, locate=locate, record=lines)
        return await _shown(load, quiet=quiet)


async def _shown(load: Load, *, quiet: bool) -> LoadReport:
    """Run the load, with a line on stderr that keeps up with it where a person is looking."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return await load.run()
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        running = loop.create_task(load.run(), name="load")
        try:
            while not running.done():
                live.update(Text(progress_line(load, loop.time() - started_s)), refresh=True)
                await asyncio.wait({running}, timeout=_PROGRESS_EVERY_S)
        finally:
            running.cancel()
            await asyncio.wait({running})
        return running.result()


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on uvloop; of several errors that come of one cause, the first one counts."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(work)
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None


def _pan(parts: tuple[str, ...]) -> str:
    """Messages from here name no digit: what was typed may be a real card by mistake."""
    pan = "".join(parts).replace(" ", "").replace("-", "")
    if not (pan.isascii() and pan.isdigit() and len(pan) <= PAN_LIMIT_DIGITS):
        raise click.UsageError(f"PAN must be 1 to {PAN_LIMIT_DIGITS} digits")
    return pan


def _expiry(text: str) -> str:
    if not (text.isascii() and text.isdigit() and len(text) == 4):
        raise click.UsageError("--exp must be four digits, YYMM")
    return text


def _allow_descriptors(terminals: int) -> None:
    """A socket for each terminal, as far as the hard limit lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = terminals + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        new = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))


def _fail(message: str) -> NoReturn:
    click.echo(f"glam-terminal: {message}", err=True)
    raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command's entry point; always ends in SystemExit."""
    try:
        cli.main(args=argv, prog_name="glam-terminal", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.ClickException as error:
        # Click repeats a misplaced argument, which may be a card number.
        message = _LONG_NUMBER.sub("…", error.format_message()).rstrip(".")
        click.echo(f"glam-terminal: {message}; --help says how it is used", err=True)
        raise SystemExit(error.exit_code) from None
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted")
    except GlamError as error:
        _fail(error.message)
    sys.exit(0)


if __name__ == "__main__":
    main()
