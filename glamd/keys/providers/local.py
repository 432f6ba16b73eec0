"""The key provider `local`: a key-encryption key out of a file or a systemd credential.

The KEK is read once, at start, and is then in the memory of this process, as is every key that it
unwraps: a P2PE assessment does not accept that, and the docs say so. No database here; which keys
exist, and under which names, is for `keyrings` and `service`.
"""

import binascii
import contextlib
import os
import secrets
import stat
from pathlib import Path

from typing_extensions import override

from glamd.crypto import aead
from glamd.errors import ConfigError, CryptoError, FieldError, UnavailableError
from glamd.keys.providers.in_memory import BdksInMemory
from glamd.keys.providers.interface import ProviderName

KEK_BYTES = 32
KEK_FILE_LIMIT_BYTES = 128
"""A file longer than this is not a KEK's, and no more of it is read."""

FORMAT = b"\x01"
"""First byte of what `wrap` returns: AES-256-GCM as `glamd.crypto.aead` seals."""

SETTING = "keys.kek_file"

_OWN_MODES = frozenset({0o600, 0o400})
_CREDENTIAL_MODES = _OWN_MODES | {0o440}
_CONTEXT = b"glamd key "
_CREDENTIALS_DIRECTORY = "CREDENTIALS_DIRECTORY"


class LocalProvider(BdksInMemory):
    """Wraps keys with AES-256-GCM under the KEK of a file, each bound to its own name."""

    @property
    @override
    def name(self) -> ProviderName:
        """`local`."""
        return "local"

    def __init__(self, kek_file: Path) -> None:
        """Read the KEK: 64 hexadecimal characters or 32 raw bytes.

        The file must be ours or root's with mode 0600 or 0400; of systemd's credentials directory
        0440 is taken too, which is how the access list that it sets there shows. ConfigError, which
        says how to mend it, otherwise.
        """
        self._sealer = aead.Sealer(_read_kek(kek_file))

    @override
    async def wrap(self, key: bytes, *, context: str) -> bytes:
        """Seal a key; only the same `context`, the key's name, opens it again."""
        return FORMAT + self._sealer.seal(key, associated_data=_CONTEXT + context.encode())

    @override
    async def unwrap(self, wrapped: bytes, *, context: str) -> bytes:
        """The key that was wrapped under this context; CryptoError for any other or another KEK."""
        if not wrapped.startswith(FORMAT):
            raise CryptoError(f"the wrapped key {context} is not in a form of provider local")
        try:
            clear = self._sealer.open_sealed(
                wrapped[len(FORMAT) :], associated_data=_CONTEXT + context.encode()
            )
        except CryptoError:
            msg = f"the wrapped key {context} does not open under this key-encryption key"
            raise CryptoError(msg) from None
        return bytes(clear)

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
        raise _wrong(f"{path} cannot be made ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _read_kek(path: Path) -> bytes:
    try:
        # Without O_NONBLOCK a named pipe in the file's place would hold the start up for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _wrong(f"{path} cannot be opened ({error.strerror})") from None
    try:
        _check_file(path, os.fstat(descriptor))
        content = os.read(descriptor, KEK_FILE_LIMIT_BYTES)
    except OSError as error:
        raise _wrong(f"{path} cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)
    return _parse_kek(path, content)


def _check_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _wrong(f"{path} is not a regular file")
    if status.st_uid not in {0, os.geteuid()}:
        raise _wrong(f"{path} belongs to another user; mend it with: chown {os.geteuid()} {path}")
    # Credentials of a service with a user of its own are root's and opened to it by an access list,
    # whose mask shows where the group's bits are.
    credential = status.st_uid == 0 and path.parent == _credentials_directory()
    mode = stat.S_IMODE(status.st_mode)
    if mode not in (_CREDENTIAL_MODES if credential else _OWN_MODES):
        raise _wrong(
            f"{path} has mode {mode:04o} and must have 0600 or 0400; "
            f"mend it with: chmod 0600 {path}"
        )


def _credentials_directory() -> Path | None:
    directory = os.environ.get(_CREDENTIALS_DIRECTORY)
    return Path(directory) if directory else None


def _parse_kek(path: Path, content: bytes) -> bytes:
    kek = content
    if len(kek) != KEK_BYTES:
        with contextlib.suppress(binascii.Error):
            kek = binascii.unhexlify(content.strip())
    if len(kek) != KEK_BYTES:
        raise _wrong(f"{path} must hold {KEK_BYTES} bytes, raw or as {2 * KEK_BYTES} hexadecimals")
    if not any(kek):
        raise _wrong(f"{path} holds nothing but zeros, which is no key")
    return kek


def _wrong(message: str) -> ConfigError:
    return ConfigError(
        f"The key-encryption key: {message}.", fields=(FieldError(SETTING, message),)
    )
