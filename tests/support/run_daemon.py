"""A `glamd run` of one's own with a configuration file, and a stand-in for systemd beside it."""

import json
import os
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.harness import PROGRAMS
from glamd.admin.minting import Mint
from glamd.clock import SystemClock
from glamd.embedded.certificates import DevelopmentCertificates
from glamd.embedded.settings import WORKER_URI
from glamd.keys.providers.local import create_kek_file

TIMEOUT_S = 30.0
LOOPBACK = "127.0.0.1"
SECRETS = {"client": "c" * 32, "internal": "i" * 32}
Changes = Mapping[str, Mapping[str, object]]


class Supervisor:
    """The socket that systemd gives a service of `Type=notify`, and what was said on it.

    It listens all the time, as systemd does: a service that fills the socket is held up.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self.said: list[str] = []
        self._heard = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._listener = threading.Thread(target=self._listen, name="supervisor")
        self._listener.start()

    def forget(self) -> None:
        """What was said before does not count any more."""
        with self._heard:
            self.said.clear()

    def until(self, line: str, *, times: int = 1) -> None:
        """Wait until this line was said so often; TimeoutError."""
        with self._heard:
            if not self._heard.wait_for(lambda: self.said.count(line) >= times, TIMEOUT_S):
                raise TimeoutError(f"{line} was not said, but {self.said}")

    def close(self) -> None:
        """Listen no more."""
        self._socket.shutdown(socket.SHUT_RD)
        self._listener.join(TIMEOUT_S)
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def _listen(self) -> None:
        while told := self._socket.recv(4096):
            with self._heard:
                self.said += told.decode().splitlines()
                self._heard.notify_all()


class RunDaemon:
    """The files of one installation in `directory`, whose certificates are there already."""

    def __init__(
        self, directory: Path, database_url: str, *, changes: Changes | None = None
    ) -> None:
        self.directory = directory
        self.certificates = DevelopmentCertificates(directory, SystemClock())
        self.config = directory / "glamd.toml"
        self.settings = _settings(directory, self.certificates, database_url)
        for section, change in (changes or {}).items():
            self.settings.setdefault(section, {}).update(change)
        self.write()
        if not (directory / "kek").exists():
            create_kek_file(directory / "kek")
        self.mint = Mint(
            client_secret=SECRETS["client"],
            internal_secret=SECRETS["internal"],
            clock=SystemClock(),
        )
        self.environment: dict[str, str] = {}
        """Variables beside PATH, as a unit's `Environment=` has them."""
        self.process: subprocess.Popen[bytes]

    def as_worker(self) -> ssl.SSLContext:
        """How a worker connects that has the demo worker's name."""
        own = self.certificates.worker(WORKER_URI)
        context = ssl.create_default_context(cafile=self.certificates.server_ca.certificate_file)
        context.load_cert_chain(own.certificate_file, own.key_file)
        return context

    def write(self) -> None:
        """Put the settings into the file."""
        lines = ['environment = "development"']
        for section, values in self.settings.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        self.config.write_text("\n".join(lines) + "\n")

    def launch(self, supervisor: Supervisor | None = None, *, watchdog_s: float = 0.0) -> None:
        """Start the process, with core dumps allowed as far as we are concerned."""
        environment = {"PATH": os.environ["PATH"], **self.environment}
        if supervisor is not None:
            environment["NOTIFY_SOCKET"] = str(supervisor.path)
        if watchdog_s:
            environment["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        with (self.directory / "out").open("ab") as out:
            self.process = subprocess.Popen(
                [
                    *("sh", "-c", 'ulimit -S -c "$(ulimit -H -c)"; exec "$@"', "sh"),
                    *(PROGRAMS / "glamd", "run", "--config", self.config),
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,
                env=environment,
            )

    def ended(self) -> tuple[int, str]:
        """Its exit status and what it said on stderr, once it has ended by itself."""
        _, said = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, said.decode()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def close(self) -> None:
        """End it in whatever state it is."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=TIMEOUT_S)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines of one event."""
        lines = [json.loads(line) for line in (self.directory / "out").read_text().splitlines()]
        return [line for line in lines if line["event"] == name]

    def glamctl(self, *words: str) -> Any:
        """What a command answers."""
        done = subprocess.run(
            [PROGRAMS / "glamctl", "--socket", self.directory / "admin.sock", "--json", *words],
            capture_output=True,
            check=True,
            timeout=TIMEOUT_S,
        )
        return json.loads(done.stdout)

    def listeners(self) -> dict[str, int]:
        """The ports by name."""
        found = self.glamctl("status")["listeners"]
        return {name: int(place.rpartition(":")[2]) for name, place in found.items()}


@contextmanager
def supervised(
    daemon: RunDaemon, *, watchdog_s: float = 0.0, ready: bool = True
) -> Iterator[Supervisor]:
    """Run it under a supervisor, from when it is ready (or was begun) to the end of the context."""
    supervisor = Supervisor(daemon.directory)
    daemon.launch(supervisor, watchdog_s=watchdog_s)
    try:
        if ready:
            supervisor.until("READY=1")
        yield supervisor
    finally:
        daemon.close()
        supervisor.close()


def _settings(
    directory: Path, certificates: DevelopmentCertificates, database_url: str
) -> dict[str, dict[str, object]]:
    server = certificates.server()
    tls = {"tls_cert": str(server.certificate_file), "tls_key": str(server.key_file)}
    device_ca = certificates.device_ca
    return {
        "database": {"url": database_url},
        "http": {"port": 0},
        "worker": {
            "enabled": True,
            "host": LOOPBACK,
            "port": 0,
            "client_ca": str(certificates.worker_ca.certificate_file),
            **tls,
        },
        "mqtt": {
            "host": LOOPBACK,
            "port": 0,
            "client_ca": str(device_ca.certificate_file),
            **tls,
        },
        "devices": {
            "ca_cert": str(device_ca.certificate_file),
            "ca_key": str(device_ca.key_file),
            "server_ca": str(certificates.server_ca.certificate_file),
        },
        "admin": {"socket": str(directory / "admin.sock")},
        "auth": {
            "client_secrets": [SECRETS["client"]],
            "internal_secrets": [SECRETS["internal"]],
        },
        "keys": {"kek_file": str(directory / "kek")},
        "logging": {"level": "info"},
    }
