"""What a person sees of `glamd dev`: what runs where, what happens, line by line, what to try next.

Only printing. On a terminal with colour, into a file plainly and with every line whole. The daemon
never waits for its reader nor ends with it: what nobody takes is not shown.
"""

import io
import os
import select
import sys
from datetime import datetime
from pathlib import Path
from typing import Final

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from glamd import __version__
from glamd.embedded import money_lines
from glamd.embedded.demo import Tap
from glamd.embedded.demo_events import Happening
from glamd.embedded.describe import Description

PLAIN_WIDTH: Final = 200
_BRAND_STYLES: Final = {
    "visa": "bold blue",
    "mastercard": "bold red",
    "amex": "bold cyan",
    "discover": "bold yellow",
    "jcb": "bold green",
}


class _Paper(Console):
    """A console whose reader may go away: rich's own ends the process then."""

    def on_broken_pipe(self) -> None:
        """Be quiet from now on, also in Python's last flush."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Screen:
    """The terminal that `glamd dev` was started on."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal of another encoding shows a question mark where it has no character.
            sys.stdout.reconfigure(errors="replace")
        self._console = _Paper(highlight=False)
        if not self._console.is_terminal:
            self._console = _Paper(highlight=False, width=PLAIN_WIDTH)

    def step(self, text: str) -> None:
        """One thing that is being done before anything runs."""
        self._print(Text("  · ", style="dim") + Text(text, style="dim"))

    def ready(self, description: Description, *, state_dir: Path, taken_s: float) -> None:
        """What runs where, and what to try."""
        buyer = description.credits_demo
        places = Table.grid(padding=(0, 2))
        for name, place in (
            ("REST API", f"{description.http_url}  (to read and to try: /docs)"),
            ("worker API", f"{description.worker_url}  (mutual TLS)"),
            ("MQTT/TLS", f"{description.mqtt_host}:{description.mqtt_port}  (client certificates)"),
            ("admin socket", _shown(description.admin_socket)),
            ("PostgreSQL", _without_password(description.database_url)),
            ("NATS", _without_password(description.nats_url)),
            ("merchant", f"{description.merchant_id}  {description.domain}"),
            ("buyer", f"{buyer.merchant_id}  {buyer.domain}"),
            ("shop platform", f"{buyer.shopify_url}  (a stand-in for Shopify)"),
            ("for scripts", _shown(state_dir / "dev.json")),
            ("log", _shown(state_dir / "glamd.log")),
        ):
            places.add_row(Text(name, style="bold"), Text(place))
        title = f"glamd {__version__} · development · ready in {taken_s:.1f} s"
        self._print(Panel(places, title=title, title_align="left", expand=False))
        self._print(Text("Try, in another terminal:", style="bold"))
        for line in _suggestions(description, state_dir):
            self._print(Text(f"  {line}", style="green"), soft_wrap=True)
        self._print(Text("Ctrl-C drains and stops everything.\n", style="dim"))

    def tap(self, tap: Tap) -> None:
        """One tap: who, what card, which token, how long."""
        line = _now() + Text(f"{tap.scheme:<11}", style="magenta")
        line += Text(f"{tap.device_id}  ", style="dim")
        if tap.code == "ok":
            style = _BRAND_STYLES.get(tap.brand, "bold")
            line += Text(f"{tap.brand:<11}", style=style) + Text(f"•••• {tap.last4}  ")
            line += Text(tap.token, style="bold green")
        else:
            line += Text(tap.code, style="bold red")
        line += Text(f"  {tap.elapsed_ms:.1f} ms", style="dim")
        self._print(line, soft_wrap=True)

    def happening(self, happening: Happening) -> None:
        """One event about money, or several of a kind: which, how much, what is left."""
        self._print(_now() + money_lines.of(happening), soft_wrap=True)

    def checkout(self, pack: str, page: str) -> None:
        """One pack that is being bought, and where that is approved."""
        self._print(_now() + money_lines.of_checkout(pack, page), soft_wrap=True)

    def trouble(self, text: str) -> None:
        """Why the demo does not go on for the moment."""
        self._print(_now() + money_lines.of_trouble(text), soft_wrap=True)

    def say(self, text: str, *, style: str = "") -> None:
        """One line."""
        self._print(Text(text, style=style), soft_wrap=True)

    def _print(self, what: RenderableType, *, soft_wrap: bool = False) -> None:
        """Print if that can be done at once. A pipe that takes anything takes 4 KiB (pipe(7))."""
        _, ready, _ = select.select([], [sys.stdout], [], 0)
        if not ready:
            return
        try:
            self._console.print(what, soft_wrap=soft_wrap)
        except OSError:
            # The terminal is gone, or the disk of the file is full.
            self._console.quiet = True


def _now() -> Text:
    return Text(datetime.now().astimezone().strftime("%H:%M:%S "), style="dim")


def _suggestions(description: Description, state_dir: Path) -> tuple[str, ...]:
    state = _shown(state_dir)
    mine = Path.cwd() / ".venv" / "bin" / "glamctl"
    programs = ".venv/bin/" if mine.exists() else ""
    socket = f"{state}/admin.sock"
    buyer = description.credits_demo

    def bearer(name: str, place: str) -> str:
        read = f"import json; print(json.load(open('{state}/dev.json')){place})"
        return f'{name}=$(python3 -c "{read}")'

    body = '{"purpose": "support", "fields": ["pan", "expiry"]}'
    pack = f'{{"pack": "medium", "platform": "shopify", "return_url": "https://{buyer.domain}/"}}'
    purchase = (
        f'curl -s {description.http_url}/api/billing/purchases -H "Authorization: Bearer $BUYER" '
        f"--json '{pack}'  # and open its checkout_url in a browser"
    )
    look = (
        f"curl -s {description.worker_url}/internal/v1/payment-tokens/ptk_…/decrypt "
        f"--cacert {_shown(description.server_ca)} --cert {_shown(description.worker_cert)} "
        f"--key {_shown(description.worker_key)} --json '{body}'"
    )
    return (
        f"{programs}glam-terminal swipe 4242424242424242 --state-dir {state}",
        bearer("TOKEN", "['jwt']['client']"),
        f'curl -s {description.http_url}/api/v1/payment-tokens -H "Authorization: Bearer $TOKEN"',
        look,
        f"{programs}glamctl --socket {socket} status",
        f"{programs}glamctl --socket {socket} audit verify",
        bearer("BUYER", "['credits_demo']['jwt']"),
        f'curl -s {description.http_url}/api/credits -H "Authorization: Bearer $BUYER"',
        purchase,
        f"{programs}glamctl --socket {socket} ledger history {buyer.merchant_id}",
        f"{programs}glamctl --socket {socket} events lag",
    )


def _shown(path: Path) -> str:
    """A path as a person at this prompt would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://…@{rest.rpartition('@')[2]}"
