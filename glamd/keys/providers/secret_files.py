"""Secrets out of files: a key-encryption key, an HSM's PIN. Who may own them, and with which mode.

What is in the file, and what is done with it, is for the providers.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from glamd.errors import ConfigError, FieldError

LIMIT_BYTES = 128
"""A file longer than this is no key and no PIN, and no more of it is read."""

_OWN_MODES = frozenset({0o600, 0o400})
_CREDENTIAL_MODES = _OWN_MODES | {0o440}
_CREDENTIALS_DIRECTORY = "CREDENTIALS_DIRECTORY"


@dataclass(frozen=True, slots=True)
class SecretFile:
    """One file with a secret: what it is for people, and the setting that names it."""

    path: Path
    what: str
    setting: str

    def read(self) -> bytes:
        """Its content, up to LIMIT_BYTES.

        The file must be ours or root's with mode 0600 or 0400; of systemd's credentials directory
        0440 is taken too, which is how the access list that it sets there shows. ConfigError, which
        says how to mend it, otherwise.
        """
        try:
            # Without O_NONBLOCK a named pipe in the file's place would hold the start up for ever.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise self.wrong(f"{self.path} cannot be opened ({error.strerror})") from None
        try:
            self._check(os.fstat(descriptor))
            return os.read(descriptor, LIMIT_BYTES)
        except OSError as error:
            raise self.wrong(f"{self.path} cannot be read ({error.strerror})") from None
        finally:
            os.close(descriptor)

    def _check(self, status: os.stat_result) -> None:
        path = self.path
        if not stat.S_ISREG(status.st_mode):
            raise self.wrong(f"{path} is not a regular file")
        if status.st_uid not in {0, os.geteuid()}:
            message = f"{path} belongs to another user; mend it with: chown {os.geteuid()} {path}"
            raise self.wrong(message)
        # Credentials of a service with a user of its own are root's and opened to it by an access
        # list, whose mask shows where the group's bits are.
        credential = status.st_uid == 0 and path.parent == _credentials_directory()
        mode = stat.S_IMODE(status.st_mode)
        if mode not in (_CREDENTIAL_MODES if credential else _OWN_MODES):
            raise self.wrong(
                f"{path} has mode {mode:04o} and must have 0600 or 0400; "
                f"mend it with: chmod 0600 {path}"
            )

    def wrong(self, message: str) -> ConfigError:
        """A ConfigError about this file, for the caller to raise; never with what is in it."""
        return ConfigError(f"{self.what}: {message}.", fields=(FieldError(self.setting, message),))


def _credentials_directory() -> Path | None:
    directory = os.environ.get(_CREDENTIALS_DIRECTORY)
    return Path(directory) if directory else None
