"""The settings of a daemon in development: loopback, generous rates, everything in one folder.

Secrets and keys that are missing are made here and kept in the state directory. Production has its
settings from a file and the environment, never from here.
"""

import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glamd import config
from glamd.embedded.certificates import DevelopmentCertificates
from glamd.embedded.files import write_private
from glamd.errors import ConfigError, FieldError
from glamd.keys.providers.local import create_kek_file

LOOPBACK: Final = "127.0.0.1"
WORKER: Final = "demo"
WORKER_URI: Final = f"spiffe://glamd/worker/{WORKER}"
RATE_PER_S: Final = 10_000
"""Far above what a script needs; spec 6 wants at least 2,000/s for each caller."""

SECRET_BYTES: Final = 32
_PURPOSES: Final = ("settlement", "refund", "support")
_FIELDS: Final = ("pan", "expiry", "cardholder_name", "service_code", "track2", "emv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where the listeners go; None is the usual port, or any free one where that is taken."""

    http: int | None = None
    worker: int | None = None
    mqtt: int | None = None


@dataclass(frozen=True, slots=True, repr=False)
class JwtSecrets:
    """What client and internal JWTs are signed with."""

    client: str
    internal: str


def jwt_secrets(state_dir: Path) -> JwtSecrets:
    """The secrets of this state directory, made at the first call."""
    return JwtSecrets(_secret(state_dir / "client.secret"), _secret(state_dir / "internal.secret"))


def development_settings(
    state_dir: Path,
    certificates: DevelopmentCertificates,
    *,
    database_url: str,
    nats_url: str,
    ports: Ports,
    changes: Mapping[str, Mapping[str, object]] | None = None,
) -> config.Settings:
    """Settings for a daemon of this state directory; `changes` go over them, section by section."""
    kek_file = state_dir / "kek"
    if not kek_file.exists():
        create_kek_file(kek_file)
    made = jwt_secrets(state_dir)
    server = certificates.server()
    rate = {"rate_limit_per_s": RATE_PER_S, "rate_burst": RATE_PER_S}
    tls = {"tls_cert": server.certificate_file, "tls_key": server.key_file}
    grant = {
        "name": WORKER,
        "purposes": _PURPOSES,
        "fields": _FIELDS,
        "merchants": "*",
        "rate_per_s": RATE_PER_S,
    }
    sections: dict[str, dict[str, object]] = {
        "database": {"url": database_url},
        "http": {"host": LOOPBACK, "port": _port(ports.http, 8080), **rate},
        "worker": {
            "enabled": True,
            "host": LOOPBACK,
            "port": _port(ports.worker, 8443),
            "client_ca": certificates.worker_ca.certificate_file,
            "grants": [grant],
            **tls,
        },
        "mqtt": {
            "host": LOOPBACK,
            "port": _port(ports.mqtt, 8883),
            "client_ca": certificates.device_ca.certificate_file,
            **tls,
            **rate,
        },
        "devices": {
            "ca_cert": certificates.device_ca.certificate_file,
            "ca_key": certificates.device_ca.key_file,
            "server_ca": certificates.server_ca.certificate_file,
        },
        "admin": {"socket": state_dir / "admin.sock"},
        "auth": {"client_secrets": [made.client], "internal_secrets": [made.internal]},
        "keys": {"kek_file": kek_file},
        "events": {"servers": [nats_url]},
        "logging": {"format": "json"},
    }
    for section, change in (changes or {}).items():
        sections.setdefault(section, {}).update(change)
    return config.from_values({"environment": "development", "node_id": "dev", **sections})


def _secret(path: Path) -> str:
    if not path.exists():
        write_private(path, secrets.token_hex(SECRET_BYTES).encode())
    return path.read_text()


def refuse_taken(ports: Ports) -> None:
    """Raise ConfigError that names every port asked for which is somebody else's already.

    Said before anything is started; whoever takes one later is met by the listener itself.
    """
    asked = {"--http-port": ports.http, "--worker-port": ports.worker, "--mqtt-port": ports.mqtt}
    wrong = [FieldError(name, why) for name, port in asked.items() if port and (why := _why(port))]
    if wrong:
        told = "; ".join(f"{each.field} {asked[each.field]}: {each.message}" for each in wrong)
        raise ConfigError(f"These ports cannot be had on {LOOPBACK}: {told}.", fields=wrong)


def _port(asked: int | None, usual: int) -> int:
    """The port asked for, else the usual one, else, where that is taken, any free one."""
    if asked is not None:
        return asked
    return 0 if _why(usual) else usual


def _why(port: int) -> str:
    """Why nobody can listen on this port, empty where that is possible."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            return (error.strerror or "unknown").lower()
    return ""
