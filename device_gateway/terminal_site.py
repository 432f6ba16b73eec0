"""Where `glamd dev` runs, from its `dev.json`, and devices enrolled there for a load or a swipe.

It asks the daemon for devices through its admin socket, as glamctl does, and keeps them in
`<state-dir>/load/` and `<state-dir>/swipe/`. The devices that `glamd dev` itself made are never
used: their own terminals are connected. It is a tool's half: nothing here runs inside the daemon.
"""

import asyncio
import fcntl
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from device_gateway.terminal_device import (
    FILE_LIMIT_BYTES,
    Device,
    address_of,
    device_from,
    load_device,
    read_json,
    write_durably,
)
from glamd.errors import ConfigError, GlamError, UnavailableError
from glamd.payments.model import Scheme

if TYPE_CHECKING:
    import aiohttp

ENROL_PARALLEL: Final = 8
ENROL_TIMEOUT_S: Final = 30.0
ENROL_ATTEMPTS: Final = 3
SWIPES_AT_ONCE: Final = 64
_KSN_BYTES: Final[dict[Scheme, int]] = {"tdes-dukpt": 10, "aes-dukpt": 12}
_PREFIX_BYTES: Final[dict[Scheme, int]] = {"tdes-dukpt": 2, "aes-dukpt": 4}
_SERIAL_BYTES: Final[dict[Scheme, int]] = {"tdes-dukpt": 5, "aes-dukpt": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One running `glamd dev`: where its parts listen, and the devices that it made."""

    state_dir: Path
    admin_socket: Path
    merchant_id: str
    host: str
    port: int
    ca: Path
    devices: tuple[Device, ...]


def read_site(state_dir: Path) -> Site:
    """The site whose `dev.json` stands in `state_dir`; ConfigError where none is running."""
    file = state_dir / "dev.json"
    # Where we may not even look, reading it says so.
    with suppress(PermissionError):
        if not file.exists():
            raise ConfigError(f"there is no {file}: is `glamd dev` running and ready?")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} is not a JSON object")
    admin, mqtt, listed = raw.get("admin"), raw.get("mqtt"), raw.get("devices")
    socket = admin.get("socket") if isinstance(admin, dict) else None
    ca = mqtt.get("ca") if isinstance(mqtt, dict) else None
    merchant_id = raw.get("merchant_id")
    if not isinstance(socket, str) or not isinstance(ca, str) or not isinstance(merchant_id, str):
        raise ConfigError(f"{file} lacks admin.socket, mqtt.ca or merchant_id")
    host, port = address_of(mqtt)
    devices = listed if isinstance(listed, list) else []
    return Site(
        state_dir=state_dir,
        admin_socket=Path(socket),
        merchant_id=merchant_id,
        host=host,
        port=port,
        ca=Path(ca),
        devices=tuple(device_from(each, state_dir) for each in devices),
    )


@contextmanager
def swipe_folder(site: Site) -> Iterator[Path]:
    """A folder whose device no other swipe uses while this one lasts, so that none is cut off.

    Raises UnavailableError when SWIPES_AT_ONCE are under way.
    """
    home = site.state_dir / "swipe"
    home.mkdir(mode=0o700, exist_ok=True)
    for number in range(SWIPES_AT_ONCE):
        descriptor = os.open(
            home / f"{number:02d}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield home / f"{number:02d}"
            return
        finally:
            os.close(descriptor)
    raise UnavailableError(f"{SWIPES_AT_ONCE} swipes are under way already")


async def load_devices(site: Site, count: int) -> list[Device]:
    """`count` devices of this site, kept in `<state-dir>/load/`; see `devices_in`."""
    home = site.state_dir / "load"
    return await devices_in(site, [home / f"{number:05d}" for number in range(count)])


async def devices_in(site: Site, directories: Sequence[Path]) -> list[Device]:
    """A device of this site for each directory, with the key sets of its own devices in turn.

    Those that the directories have from earlier are used again, missing ones are enrolled.
    """
    if not site.devices:
        raise ConfigError("dev.json lists no device, so no key set to enrol others under is known")
    ca_pem = site.ca.read_bytes()
    kept = [_cached(directory, site, ca_pem) for directory in directories]
    missing = {n: directories[n] for n, device in enumerate(kept) if device is None}
    made = await _enrol_all(site, missing, ca_pem) if missing else {}
    devices = [device or made[number] for number, device in enumerate(kept)]
    return [device.at_address(site.host, site.port) for device in devices]


async def _enrol_all(site: Site, missing: Mapping[int, Path], ca_pem: bytes) -> dict[int, Device]:
    """A new device for each directory, ENROL_PARALLEL at a time, by the numbers given."""
    # It is half of what there is to load, and most swipes have their device already.
    import aiohttp  # noqa: PLC0415

    room = asyncio.Semaphore(ENROL_PARALLEL)

    async def one(number: int, directory: Path) -> Device:
        async with room:
            pattern = site.devices[number % len(site.devices)]
            return await _enrol(session, site, pattern, directory, ca_pem)

    async with aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(path=str(site.admin_socket), limit=ENROL_PARALLEL),
        timeout=aiohttp.ClientTimeout(total=ENROL_TIMEOUT_S),
    ) as session:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    number: group.create_task(one(number, directory), name=f"enrol-{number}")
                    for number, directory in missing.items()
                }
        except* GlamError as errors:
            # One refusal ends them all, and one line says why.
            raise _first(errors) from None
    return {number: task.result() for number, task in tasks.items()}


def _first(errors: BaseExceptionGroup[GlamError]) -> GlamError:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _cached(directory: Path, site: Site, ca_pem: bytes) -> Device | None:
    """The device enrolled here earlier, unless it belongs to a site that is no more."""
    if not (directory / "device.json").exists():
        return None
    device = load_device(directory)
    same = device.merchant_id == site.merchant_id and device.ca.read_bytes() == ca_pem
    return device if same else None


async def _enrol(
    session: "aiohttp.ClientSession", site: Site, pattern: Device, directory: Path, ca_pem: bytes
) -> Device:
    import aiohttp  # noqa: PLC0415 - as above

    for _ in range(ENROL_ATTEMPTS):
        body = {
            "merchant_id": site.merchant_id,
            "key_set": pattern.key_set,
            "ksn": _fresh_ksn(pattern).hex(),
            "export_initial_key": True,
        }
        try:
            async with session.post("http://glamd/v1/devices", json=body) as response:
                raw: object = orjson.loads(await response.content.read(FILE_LIMIT_BYTES))
                status = response.status
        except (OSError, aiohttp.ClientError, orjson.JSONDecodeError) as error:
            raise UnavailableError("the admin socket does not answer; is glamd running?") from error
        if status == 409:
            continue  # the random KSN is another device's already; the next one will not be
        if status >= 400 or not isinstance(raw, dict):
            raise UnavailableError(f"enrolling a device failed: {_detail(raw)}")
        return _keep(raw, pattern, site, directory, ca_pem)
    raise UnavailableError("enrolling a device failed: every KSN that was tried is taken")


def _detail(raw: object) -> str:
    detail = raw.get("detail") if isinstance(raw, dict) else None
    return detail if isinstance(detail, str) else "the answer says not why"


def _fresh_ksn(pattern: Device) -> bytes:
    """A KSN under the same key set id, with a serial number of its own and counter 0."""
    prefix = pattern.key_id[: _PREFIX_BYTES[pattern.scheme]]
    serial = secrets.token_bytes(_SERIAL_BYTES[pattern.scheme])
    return (prefix + serial).ljust(_KSN_BYTES[pattern.scheme], b"\0")


def _keep(
    raw: dict[str, object], pattern: Device, site: Site, directory: Path, ca_pem: bytes
) -> Device:
    """Write what enrolment gave as files; `device.json` last, so that half a device is none."""
    told = raw.get("device")
    described = told if isinstance(told, dict) else {}
    certificate, key = raw.get("certificate_pem"), raw.get("private_key_pem")
    if not isinstance(certificate, str) or not isinstance(key, str):
        raise UnavailableError("enrolling a device failed: the answer has no certificate")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    # The answer's own CA is the devices'; a terminal has to trust the one of the server.
    for name, pem in (("cert.pem", certificate.encode()), ("key.pem", key.encode())):
        write_durably(directory / name, pem)
    write_durably(directory / "ca.pem", ca_pem)
    device = {
        "device_id": described.get("device_id"),
        "merchant_id": site.merchant_id,
        "scheme": pattern.scheme,
        "key_set": pattern.key_set,
        "ksn": described.get("ksn"),
        "cert": "cert.pem",
        "key": "key.pem",
        "ca": "ca.pem",
        "mqtt": {"host": site.host, "port": site.port},
        "initial_key": raw.get("initial_key"),
    }
    made = device_from(device, directory)
    write_durably(directory / "device.json", orjson.dumps(device, option=orjson.OPT_INDENT_2))
    return made
