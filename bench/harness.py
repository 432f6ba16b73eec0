"""A `glamd dev` of one's own, started, killed and driven from outside, as a script would do it.

Benchmarks, fault runs and acceptance tests share it. It knows the process, its `dev.json` and
nothing inside the daemon, so that what it observes is what a user observes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

PROGRAMS: Final = Path(sys.executable).parent
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 40.0
POLL_S: Final = 0.02
# The tests' own server is not meant for a daemon that brings one along.
_NOT_OURS_TO_GIVE: Final = frozenset({"GLAMD_STATE_DIR", "DATABASE_URL"})


class DevDaemon:
    """One `glamd dev` and its state directory, over any number of lives.

    `demo` lets its terminals tap; `environment` is laid over ours.
    """

    def __init__(
        self,
        state_dir: Path,
        *arguments: str,
        demo: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.state_dir = state_dir
        self._arguments = arguments if demo else ("--no-demo", *arguments)
        self._process: subprocess.Popen[bytes] | None = None
        ours = {k: v for k, v in os.environ.items() if k not in _NOT_OURS_TO_GIVE}
        self._environment = {**ours, **(environment or {})}
        self.description: dict[str, object] = {}

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self._process is not None
        return self._process.pid

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the process and wait for nothing; what it prints goes to `output`."""
        with (self.state_dir.parent / f"{self.state_dir.name}.out").open("ab") as output:
            self._process = subprocess.Popen(
                [
                    str(PROGRAMS / "glamd"),
                    "dev",
                    *("--state-dir", str(self.state_dir)),
                    *("--http-port", "0", "--worker-port", "0", "--mqtt-port", "0"),
                    *self._arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )
        return self._process

    def start(self) -> float:
        """Start it, wait until `dev.json` is written, and return the seconds that took."""
        began_s = time.monotonic()
        self.launch()
        self.wait_until_ready()
        return time.monotonic() - began_s

    def wait_until_ready(self) -> None:
        """Return when `dev.json` is that of the process that was launched."""
        began_s = time.monotonic()
        process = self._process
        assert process is not None
        path = self.state_dir / "dev.json"
        while True:
            status = process.poll()
            if status is not None:
                raise RuntimeError(f"glamd dev ended with {status}:\n{self.output()}")
            description = _read(path)
            if description.get("pid") == process.pid:
                self.description = description
                return
            if time.monotonic() - began_s > START_TIMEOUT_S:
                self.kill9()
                raise RuntimeError(f"glamd dev does not get ready:\n{self.output()}")
            time.sleep(POLL_S)

    def kill9(self) -> None:
        """Kill the daemon as nothing can prepare for."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it as systemd does, or as Ctrl-C does, and return its exit status."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill9()
            raise

    def output(self) -> str:
        """What it printed, over all its lives."""
        path = self.state_dir.parent / f"{self.state_dir.name}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def text(self, *path: str) -> str:
        """A text out of `dev.json`, by its path of keys."""
        found: object = self.description
        for key in path:
            assert isinstance(found, dict)
            found = found[key]
        assert isinstance(found, str)
        return found

    def run(
        self, program: str, *arguments: str, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run `glamctl` or `glam-terminal` against it and return what came out."""
        return subprocess.run(
            self.command(program, *arguments),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )

    def command(self, program: str, *arguments: str) -> Sequence[str]:
        """The command line that runs `glamctl` or `glam-terminal` against it."""
        where = {
            "glamctl": ("--socket", str(self.state_dir / "admin.sock")),
            "glam-terminal": (),
        }[program]
        return [str(PROGRAMS / program), *where, *arguments]


def _read(path: Path) -> dict[str, object]:
    try:
        found: dict[str, object] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found
