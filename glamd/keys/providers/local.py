"""The key provider `local`: a key-encryption key out of a file or a systemd credential.

The KEKs are read once, at start, and are then in the memory of this process, as is every key that
it unwraps: a P2PE assessment does not accept that, and the docs say so. No database here; which
keys exist, and under which names, is for the rooms above.
"""

import binascii
import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from glamd.crypto import aead
from glamd.errors import CryptoError, UnavailableError
from glamd.keys.providers.in_memory import BdksInMemory
from glamd.keys.providers.interface import ProviderName
from glamd.keys.providers.secret_files import SecretFile

KEK_BYTES = 32
FORMAT = b"\x01"
"""First byte of what `wrap` returns: AES-256-GCM as `glamd.crypto.aead` seals."""

SETTING = "keys.kek_file"
FORMER_SETTING = "keys.former_kek_files"

_CONTEXT = b"glamd key "


class LocalProvider(BdksInMemory):
    """Wraps keys with AES-256-GCM under the KEK of a file, each bound to its own name."""

    @property
    @override
    def name(self) -> ProviderName:
        """`local`."""
        return "local"

    def __init__(self, kek_file: Path, *, former: Sequence[Path] = ()) -> None:
        """Read the KEKs: each is 64 hexadecimal characters or 32 raw bytes.

        The first one wraps; those in `former` still open what they wrapped. Errors as those of
        `SecretFile.read`.
        """
        self._sealer = aead.Sealer(_read_kek(_file(kek_file)))
        self._former = tuple(aead.Sealer(_read_kek(_file(path, FORMER_SETTING))) for path in former)

    @override
    async def wrap(self, key: bytes, *, context: str) -> bytes:
        """Seal a key; only the same `context`, the key's name, opens it again."""
        return FORMAT + self._sealer.seal(key, associated_data=_CONTEXT + context.encode())

    @override
    async def unwrap(self, wrapped: bytes, *, context: str) -> bytes:
        """The key that was wrapped under this context; CryptoError for any other or another KEK."""
        if not wrapped.startswith(FORMAT):
            raise CryptoError(f"the wrapped key {context} is not in a form of provider local")
        for sealer in (self._sealer, *self._former):
            with contextlib.suppress(CryptoError):
                return _opened(sealer, wrapped, context)
        raise CryptoError(f"the wrapped key {context} does not open under this key-encryption key")

    @override
    async def is_current(self, wrapped: bytes, *, context: str) -> bool:
        """Whether the first KEK wrapped this, and not a former one."""
        try:
            _opened(self._sealer, wrapped, context)
        except CryptoError:
            return False
        return True

    @override
    async def close(self) -> None:
        """There is nothing to let go of."""

    @override
    async def health(self) -> None:
        """Return when keys can be wrapped and unwrapped; UnavailableError otherwise."""
        probe = secrets.token_bytes(KEK_BYTES)
        wrapped = await self.wrap(probe, context="health")
        if not secrets.compare_digest(await self.unwrap(wrapped, context="health"), probe):
            raise UnavailableError("The key provider local does not give back what it wrapped.")

    def __repr__(self) -> str:
        return "<LocalProvider, key masked>"


def _opened(sealer: aead.Sealer, wrapped: bytes, context: str) -> bytes:
    associated = _CONTEXT + context.encode()
    return bytes(sealer.open_sealed(wrapped[len(FORMAT) :], associated_data=associated))


def create_kek_file(path: Path) -> None:
    """Make a random KEK file with mode 0600 (for `glamd dev`); one that is there is left alone.

    The file appears whole or not at all, whatever interrupts this. ConfigError where it cannot.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o600), "w") as file:
            file.write(secrets.token_hex(KEK_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(temporary)
    except OSError as error:
        raise _file(path).wrong(f"{path} cannot be made ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _read_kek(file: SecretFile) -> bytes:
    content = file.read()
    kek = content
    if len(kek) != KEK_BYTES:
        with contextlib.suppress(binascii.Error):
            kek = binascii.unhexlify(content.strip())
    if len(kek) != KEK_BYTES:
        message = f"must hold {KEK_BYTES} bytes, raw or as {2 * KEK_BYTES} hexadecimals"
        raise file.wrong(f"{file.path} {message}")
    if not any(kek):
        raise file.wrong(f"{file.path} holds nothing but zeros, which is no key")
    return kek


def _file(path: Path, setting: str = SETTING) -> SecretFile:
    return SecretFile(path, "The key-encryption key", setting)
