"""How long `glamd run` takes from exec to READY=1, on a database that stands."""

import asyncio
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from glamd.admin import migrate
from glamd.clock import SystemClock
from glamd.embedded.certificates import DevelopmentCertificates
from glamd.embedded.postgres import EmbeddedPostgres
from glamd.keys.providers.local import create_kek_file

TIMEOUT_S = 30.0
TRIES = 3


def measure() -> float:
    """Seconds until the service manager is told READY=1, the best of three."""
    with tempfile.TemporaryDirectory(prefix="glamd-bench-") as folder:
        return uvloop.run(_measure(Path(folder)))


async def _measure(folder: Path) -> float:
    server = EmbeddedPostgres(folder)
    try:
        urls = await server.start()
        await migrate.upgrade(urls.app)
        environment = _environment(folder, urls.app)
        return min([await asyncio.to_thread(_start, folder, environment) for _ in range(TRIES)])
    finally:
        await server.stop()


def _environment(folder: Path, database_url: str) -> dict[str, str]:
    certificates = DevelopmentCertificates(folder, SystemClock())
    create_kek_file(folder / "kek")
    server = certificates.server()
    given = {
        "DATABASE__URL": database_url,
        "AUTH__CLIENT_SECRETS": secrets.token_hex(32),
        "AUTH__INTERNAL_SECRETS": secrets.token_hex(32),
        "HTTP__PORT": "0",
        "MQTT__HOST": "127.0.0.1",
        "MQTT__PORT": "0",
        "MQTT__TLS_CERT": server.certificate_file,
        "MQTT__TLS_KEY": server.key_file,
        "MQTT__CLIENT_CA": certificates.device_ca.certificate_file,
        "DEVICES__CA_CERT": certificates.device_ca.certificate_file,
        "DEVICES__CA_KEY": certificates.device_ca.key_file,
        "ADMIN__SOCKET": folder / "admin.sock",
        "KEYS__KEK_FILE": folder / "kek",
    }
    return os.environ | {f"GLAMD_{name}": str(value) for name, value in given.items()}


def _start(folder: Path, environment: dict[str, str]) -> float:
    path = folder / "notify"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        notify.settimeout(TIMEOUT_S)
        began_s = time.monotonic()
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "glamd"), "run"],
            env=environment | {"NOTIFY_SOCKET": str(path)},
            stdout=subprocess.DEVNULL,
        )
        try:
            while b"READY=1" not in notify.recv(4096):
                pass
            return time.monotonic() - began_s
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)
