"""The demo of `glamd dev`: a merchant, a TDES and an AES key set, a device of each, and their taps.

Everything is made through the same services that `glamctl` uses, and kept: a second start finds it.
The base derivation keys are random and belong to this state directory alone.
"""

import asyncio
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

import orjson

from device_gateway.registry import Registry
from device_gateway.terminal import Terminal
from device_gateway.terminal_card import TEST_CARDS, CardReader, clear_form
from device_gateway.terminal_device import Counters, load_device
from glamd.clock import Clock
from glamd.crypto.blocks import odd_parity
from glamd.crypto.dukpt import Profile
from glamd.embedded.files import write_private
from glamd.errors import ConflictError, NotFoundError, UnavailableError
from glamd.keys.key_sets.service import Keys
from glamd.onboarding import Onboarding
from glamd.payments.model import Scheme

DOMAIN: Final = "demo-shop.example"
SHOP_ID: Final = "demo-1"
TAP_EVERY_S: Final = 3.0
TAP_TIMEOUT_S: Final = 60.0
_ACTOR: Final = "glamd-dev"
# The KSN each demo device was "injected" with: BDK id and device serial, the counter at zero.
_DEVICES: Final[tuple[tuple[str, Scheme, bytes, str], ...]] = (
    ("demo-tdes", "tdes-dukpt", bytes.fromhex("FFFF9876543210E00000"), "Counter reader (TDES)"),
    ("demo-aes", "aes-dukpt", bytes.fromhex("123456789012345600000000"), "Tap reader (AES)"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoDevice:
    """One demo device: its folder, and what `device.json` says of it."""

    directory: Path
    device_id: str
    merchant_id: str
    scheme: Scheme
    key_set: str
    ksn: str
    mqtt_host: str
    mqtt_port: int
    initial_key: str = field(repr=False)

    def document(self, *, absolute: bool) -> dict[str, object]:
        """The content of `device.json`, with file names, or with absolute paths."""

        def name(file: str) -> str:
            return str(self.directory / file) if absolute else file

        return {
            "device_id": self.device_id,
            "merchant_id": self.merchant_id,
            "scheme": self.scheme,
            "key_set": self.key_set,
            "ksn": self.ksn,
            "cert": name("cert.pem"),
            "key": name("key.pem"),
            "ca": name("ca.pem"),
            "mqtt": {"host": self.mqtt_host, "port": self.mqtt_port},
            "initial_key": self.initial_key,
        }


@dataclass(frozen=True, slots=True)
class Tap:
    """One tap as the terminal saw it."""

    device_id: str
    scheme: Scheme
    code: str
    token: str
    brand: str
    last4: str
    elapsed_ms: float


async def seed(
    *,
    onboarding: Onboarding,
    keys: Keys,
    registry: Registry,
    folder: Path,
    server_ca_pem: bytes,
    mqtt: tuple[str, int],
) -> tuple[UUID, tuple[DemoDevice, ...]]:
    """Make what is missing of the demo and return its merchant and devices."""
    merchant = await onboarding.create(
        platform="custom", shop_id=SHOP_ID, domain=DOMAIN, merchant_id=_kept_id(folder)
    )
    devices = []
    for key_set, scheme, ksn, model in _DEVICES:
        await _key_set(keys, key_set, scheme)
        directory = folder / "devices" / key_set
        if not await _is_enrolled(registry, directory):
            enrolled = await registry.enroll(
                merchant_id=merchant.merchant_id,
                key_set=key_set,
                ksn=ksn,
                serial=f"demo-{key_set}",
                model=model,
                csr_pem=None,
                export_initial_key=True,
            )
            assert enrolled.private_key_pem is not None
            assert enrolled.initial_key is not None
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(directory / "cert.pem", enrolled.certificate_pem.encode())
            write_private(directory / "key.pem", enrolled.private_key_pem.encode())
            made = {"device_id": enrolled.device.device_id, "initial_key": enrolled.initial_key}
            write_private(directory / "enrolled.json", orjson.dumps(made))
        write_private(directory / "ca.pem", server_ca_pem)
        kept = orjson.loads((directory / "enrolled.json").read_bytes())
        device = DemoDevice(
            directory=directory,
            device_id=kept["device_id"],
            merchant_id=str(merchant.merchant_id),
            scheme=scheme,
            key_set=key_set,
            ksn=ksn.hex().upper(),
            mqtt_host=mqtt[0],
            mqtt_port=mqtt[1],
            initial_key=kept["initial_key"],
        )
        document = orjson.dumps(device.document(absolute=False), option=orjson.OPT_INDENT_2)
        write_private(directory / "device.json", document)
        devices.append(device)
    return merchant.merchant_id, tuple(devices)


def _kept_id(folder: Path) -> UUID:
    """The demo merchant's id, made once for this state directory."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "merchant"
    if not path.exists():
        write_private(path, str(UUID(bytes=secrets.token_bytes(16), version=4)).encode())
    return UUID(path.read_text())


async def _key_set(keys: Keys, name: str, scheme: Scheme) -> None:
    try:
        await keys.key_set(name)
    except NotFoundError:
        await keys.import_bdk(
            key_set=name,
            profile=Profile(scheme=scheme),
            # On an AES key it does no harm.
            bdk=odd_parity(secrets.token_bytes(16)),
            actor=_ACTOR,
        )


async def _is_enrolled(registry: Registry, directory: Path) -> bool:
    """Whether the device of this folder is one that the database knows."""
    path = directory / "enrolled.json"
    if not path.exists():
        return False
    try:
        found = await registry.show(orjson.loads(path.read_bytes())["device_id"])
    except NotFoundError:
        return False
    return found.status != "revoked"


async def tap_for_ever(
    device: DemoDevice, *, clock: Clock, first_after_s: float, show: Callable[[Tap], None]
) -> None:
    """Tap one test card after another over real MQTT and TLS until cancelled."""
    described = load_device(device.directory)
    reader = CardReader(described, Counters(described, block=16))
    terminal = Terminal(described, clock=clock)
    running = asyncio.create_task(terminal.run(), name=f"terminal:{device.device_id}")
    try:
        await terminal.connected.wait()
        await asyncio.sleep(first_after_s)
        for card in itertools.cycle(TEST_CARDS):
            request_id = secrets.token_hex(8)
            payload = reader.request(request_id, clear_form(card, "track2"), "track2")
            await _tap(terminal, device, request_id, payload, show)
            await asyncio.sleep(TAP_EVERY_S)
    except ConflictError:
        return
    finally:
        terminal.close()
        await _ended(running)


async def _tap(
    terminal: Terminal,
    device: DemoDevice,
    request_id: str,
    payload: bytes,
    show: Callable[[Tap], None],
) -> None:
    began_s = time.perf_counter()
    try:
        answer = await terminal.ask(request_id, payload, timeout_s=TAP_TIMEOUT_S)
        code, token = answer.code, answer.text("token")
        brand, last4 = answer.text("brand"), answer.text("last4")
    except UnavailableError as error:
        code, token, brand, last4 = error.code, "", "", ""
    elapsed_ms = (time.perf_counter() - began_s) * 1000
    show(Tap(device.device_id, device.scheme, code, token, brand, last4, elapsed_ms))


async def _ended(task: Awaitable[None]) -> None:
    await asyncio.gather(task, return_exceptions=True)
