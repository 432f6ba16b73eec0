"""A SoftHSM2 token of the test session, and how to hurt it: sessions cut, token gone.

The module is begun once in a process and reads its configuration then, so there is one token
directory for all tests of a session. Labels tell the tests' objects apart.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pkcs11

from glamd.keys.providers.hsm import TokenAddress
from glamd.keys.providers.one_thread import PKCS11

MODULE = Path("/usr/lib/softhsm/libsofthsm2.so")
UTIL = "/usr/bin/softhsm2-util"
PACKAGE = "softhsm2"
TOKEN = "glamd-tests"
PIN = "24681357"


class SoftHsm:
    """One initialized token."""

    def __init__(self, directory: Path) -> None:
        """Make the token; SOFTHSM2_CONF is set for this process and its children."""
        self._tokens = directory / "tokens"
        self._tokens.mkdir()
        configuration = directory / "softhsm2.conf"
        configuration.write_text(
            f"directories.tokendir = {self._tokens}\n"
            "objectstore.backend = file\n"
            "log.level = ERROR\n"
        )
        os.environ["SOFTHSM2_CONF"] = str(configuration)
        subprocess.run(
            [UTIL, "--init-token", "--free", "--label", TOKEN, "--pin", PIN, "--so-pin", PIN],
            check=True,
            capture_output=True,
            timeout=20,
        )
        self.pin_file = directory / "pin"
        self.pin_file.write_text(PIN + "\n")
        self.pin_file.chmod(0o600)

    @property
    def address(self) -> TokenAddress:
        """Where glamd finds it."""
        return TokenAddress(module=MODULE, token_label=TOKEN, pin_file=self.pin_file)

    async def cut_sessions(self) -> None:
        """Close every session of this process behind the provider's back."""

        def cut() -> None:
            slot = pkcs11.lib(str(MODULE)).get_token(token_label=TOKEN).slot.slot_id
            assert ctypes.CDLL(str(MODULE)).C_CloseAllSessions(ctypes.c_ulong(slot)) == 0

        await PKCS11.run(cut)

    async def finalize(self) -> None:
        """End the module behind the provider's back, as another library in the process may."""

        def end() -> None:
            assert ctypes.CDLL(str(MODULE)).C_Finalize(None) == 0

        await PKCS11.run(end)

    @contextmanager
    def away(self) -> Iterator[None]:
        """The token is not there."""
        aside = self._tokens.with_name("aside")
        self._tokens.rename(aside)
        try:
            yield
        finally:
            aside.rename(self._tokens)
