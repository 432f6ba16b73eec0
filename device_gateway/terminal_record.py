"""A load's own record, outside the daemon: what was sent, and what the daemon acknowledged.

The fault tests compare it with the database, so it must survive what they do to the daemon; it is
lines of JSON, appended. It need not survive a crash of the machine: nothing is synced.
"""

import asyncio
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import orjson

from device_gateway.terminal import Answer
from glamd.clock import Clock


class Record:
    """Appends lines to a file; they are handed to the system before the loop does anything else.

    | `what` | other fields |
    | --- | --- |
    | `sent`, `resent` | `id`, `device`, `at` |
    | `answer` | the same; `code` (`ok` or the error's), `retryable`, `replayed`, `token` |
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        """Opens `path` for appending; OSError where that cannot be."""
        self._clock = clock
        self._lines: list[bytes] = []
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)

    def sent(self, device_id: str, request_id: str, *, again: bool = False) -> None:
        """A request is going out."""
        self._append(
            {
                "what": "resent" if again else "sent",
                "id": request_id,
                "device": device_id,
                "at": self._clock.now(),
            }
        )

    def answer(self, device_id: str, answer: Answer) -> None:
        """An answer came."""
        self._append(
            {
                "what": "answer",
                "id": answer.fields.get("id"),
                "device": device_id,
                "at": self._clock.now(),
                "code": answer.code,
                "retryable": not answer.final,
                "replayed": answer.replayed,
                "token": answer.fields.get("token"),
            }
        )

    def _append(self, line: dict[str, object]) -> None:
        if not self._lines:
            # One write for all that this turn of the loop has to say.
            asyncio.get_running_loop().call_soon(self.flush)
        self._lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z))

    def flush(self) -> None:
        """Hand everything to the operating system now."""
        data = memoryview(b"".join(self._lines))
        self._lines.clear()
        while data:
            data = data[os.write(self._descriptor, data) :]

    def __enter__(self) -> Self:
        """The record itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Flush and close."""
        self.flush()
        os.close(self._descriptor)
        self._descriptor = -1
