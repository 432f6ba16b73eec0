"""What a virtual terminal is on disk: its `device.json`, and the counter it must never use twice.

Nothing of MQTT and no encryption here. A real terminal keeps both in tamper-proof memory; this one
is for development and tests, and its initial key lies in a file that dev mode wrote.
"""

import fcntl
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import orjson

from device_gateway import topics
from glamd.crypto import dukpt
from glamd.errors import ConfigError, ConflictError, InputError
from glamd.payments.model import Scheme

FILE_LIMIT_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One enrolled device: who it is, its certificate, its initial key and where glamd listens.

    `key_id` says which initial key that is (10 bytes TDES, 8 AES; `dukpt.initial_key_id`).
    """

    device_id: str
    merchant_id: str
    scheme: Scheme
    key_set: str
    key_id: bytes
    initial_key: bytes = field(repr=False)
    cert: Path
    key: Path
    ca: Path
    host: str
    port: int

    @property
    def counter_path(self) -> Path:
        """Where the highest counter that may be spent is written down."""
        return self.cert.parent / f"{self.device_id}.counter"

    def ksn_at(self, counter: int) -> bytes:
        """The KSN of this device with the transaction counter `counter`."""
        return dukpt.ksn_with_counter(self.scheme, self.key_id, counter)

    def at_address(self, host: str, port: int) -> "Device":
        """The same device, told another place to connect to."""
        return replace(self, host=host, port=port)

    def tls(self) -> ssl.SSLContext:
        """A client context with this device's certificate that trusts its CA file and no other."""
        try:
            context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(self.ca))
            context.load_cert_chain(str(self.cert), str(self.key))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"the certificate files of {self.device_id} cannot be read"
            ) from error
        return context


def load_device(path: Path) -> Device:
    """The device described by `path`, a `device.json` or the directory that it stands in."""
    file = path / "device.json" if path.is_dir() else path
    return device_from(read_json(file), file.parent)


def device_from(raw: object, directory: Path) -> Device:
    """A device from parsed JSON; file names are relative to `directory`. ConfigError if wrong."""
    if not isinstance(raw, dict):
        raise ConfigError("device.json is not a JSON object")
    scheme = _text(raw, "scheme")
    if scheme not in ("tdes-dukpt", "aes-dukpt"):
        raise ConfigError("device.json: scheme must be tdes-dukpt or aes-dukpt")
    known: Scheme = "tdes-dukpt" if scheme == "tdes-dukpt" else "aes-dukpt"
    try:
        key_id = dukpt.initial_key_id(known, _hex(raw, "ksn"))
    except InputError as error:
        raise ConfigError(f"device.json: {error.message}") from error
    if "initial_key" not in raw:
        raise ConfigError(
            "device.json has no initial_key; only dev mode exports one "
            "(glamctl device enroll --export-initial-key)"
        )
    device_id = _text(raw, "device_id")
    if not topics.is_device_id(device_id):
        raise ConfigError("device.json: device_id is not a device id")
    host, port = address_of(raw.get("mqtt"))
    return Device(
        device_id=device_id,
        merchant_id=_text(raw, "merchant_id"),
        scheme=known,
        key_set=_text(raw, "key_set"),
        key_id=key_id,
        initial_key=_hex(raw, "initial_key"),
        cert=directory / _text(raw, "cert"),
        key=directory / _text(raw, "key"),
        ca=directory / _text(raw, "ca"),
        host=host,
        port=port,
    )


def address_of(raw: object) -> tuple[str, int]:
    """Host and port out of `{"host", "port"}`."""
    if isinstance(raw, dict):
        host, port = raw.get("host"), raw.get("port")
        if isinstance(host, str) and host and type(port) is int and 0 < port < 65536:
            return host, port
    raise ConfigError('mqtt must be {"host": name, "port": number}')


def read_json(path: Path) -> object:
    """What stands in the JSON file at `path`; ConfigError when there is none, or it is no JSON."""
    try:
        with path.open("rb") as file:
            raw: object = orjson.loads(file.read(FILE_LIMIT_BYTES))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except orjson.JSONDecodeError:
        raise ConfigError(f"{path} is not JSON") from None
    return raw


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace the file at `path` by `data`; after a crash it is whole, the old or the new one."""
    fresh = path.with_name(f"{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fresh.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class Counters:
    """Hands out a device's transaction counters, each once, whatever crashes in between.

    What is handed out was written down and synced before, in blocks. Two processes may share a
    device: a file lock is held over each read-and-write, so their blocks are never the same.
    """

    def __init__(self, device: Device, *, block: int = 1) -> None:
        """`block` counters are set aside with each write; a crash costs at most that many."""
        self._path = device.counter_path
        self._key_id = device.key_id.hex()
        self._scheme = device.scheme
        self._block = block
        self._last = 0
        self._reserved = 0

    def take(self) -> int:
        """The next counter.

        Raises ConflictError when the initial key has none left, ConfigError when the counter
        cannot be written down or the file is not one of ours.
        """
        counter = dukpt.next_counter(self._scheme, self._last)
        if counter is not None and counter > self._reserved:
            counter = self._reserve()
        if counter is None:
            raise ConflictError("the device has used up its transaction counters; inject a new key")
        self._last = counter
        return counter

    def give_back(self) -> None:
        """Return what of the block was not used, where nobody has reserved more since."""
        if self._last < self._reserved:
            # Where that fails, some counters are lost; an initial key has plenty.
            with suppress(OSError), self._locked():
                if self._read() == self._reserved:
                    self._write(self._last)
            self._reserved = self._last

    def _reserve(self) -> int | None:
        try:
            with self._locked():
                first = dukpt.next_counter(self._scheme, self._read())
                if first is not None:
                    last = first + self._block - 1
                    self._write(last)
                    # Only now: a counter that could not be written down is not handed out.
                    self._reserved = last
        except OSError as error:
            raise ConfigError(f"cannot write {self._path}: {error.strerror}") from error
        return first

    def _read(self) -> int:
        if not self._path.exists():
            return 0
        raw = read_json(self._path)
        reserved = raw.get("reserved") if isinstance(raw, dict) else None
        if not isinstance(raw, dict) or type(reserved) is not int or reserved < 0:
            # Starting over would use counters twice, so a broken file stops the terminal.
            raise ConfigError(f"{self._path} does not say which counters are used")
        return reserved if raw.get("key_id") == self._key_id else 0

    def _write(self, reserved: int) -> None:
        write_durably(self._path, orjson.dumps({"key_id": self._key_id, "reserved": reserved}))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(
            self._path.with_name(f"{self._path.name}.lock"),
            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
            0o600,
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _text(raw: dict[str, object], name: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"device.json: {name} is missing")
    return value


def _hex(raw: dict[str, object], name: str) -> bytes:
    try:
        return bytes.fromhex(_text(raw, name))
    except ValueError:
        raise ConfigError(f"device.json: {name} is not hex") from None
