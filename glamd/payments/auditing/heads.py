"""Heads of the audit chain that leave the database: signed, as JSON, one line each in a file.

Whoever keeps such a line elsewhere can show later that the chain was cut behind it. No SQL and no
rule of the chain stands here.
"""

import asyncio
import os
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Final

import orjson
import structlog
from prometheus_client import Counter

APPEND_TIMEOUT_S: Final = 5.0
FILE_MODE: Final = 0o600

log = structlog.get_logger()

_FAILED = Counter("glamd_audit_head_file_failures_total", "Heads that did not get into the file.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedHead:
    """The end of the chain at a time: the last row's number and MAC, and the audit key's word.

    `signature` (32 bytes) is that of the open head, under the key's version `key_version`.
    """

    at: datetime
    month: date
    seq: int
    mac: bytes
    key_version: str
    signature: bytes

    def as_json(self) -> dict[str, object]:
        """In words that JSON has."""
        return {
            "at": self.at.isoformat(),
            "month": f"{self.month:%Y-%m}",
            "seq": self.seq,
            "mac": self.mac.hex(),
            "key_version": self.key_version,
            "signature": self.signature.hex(),
        }


class HeadFile:
    """A file of mode 0600 to which heads are appended and synced, one at a time.

    What goes wrong is logged and counted: a full disk must not stop payments.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing: asyncio.Task[None] | None = None

    async def append(self, head: SignedHead) -> None:
        """Add a line, within APPEND_TIMEOUT_S."""
        if self._writing is not None and not self._writing.done():
            # A file system that hangs gets no second thread to hold.
            self._failed("Busy")
            return
        line = orjson.dumps(head.as_json()) + b"\n"
        self._writing = asyncio.create_task(
            asyncio.to_thread(_append, self._path, line), name="audit:head-file"
        )
        try:
            async with asyncio.timeout(APPEND_TIMEOUT_S):
                await asyncio.shield(self._writing)
        except OSError as error:  # TimeoutError is one
            self._failed(type(error).__name__)

    def _failed(self, kind: str) -> None:
        _FAILED.inc()
        log.warning("audit_head_not_exported", error=kind)


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    try:
        os.fchmod(descriptor, FILE_MODE)
        size = os.fstat(descriptor).st_size
        # A line that a crash cut short stays alone with its damage.
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) != len(line):
            raise OSError("the line was written in part")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
