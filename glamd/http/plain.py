"""An answer as one piece of bytes: head and body, with no dictionary of headers in between.

aiohttp's own response is made for much that nobody does here (chunks, compression, cookies, bodies
that are streams) and costs more than all that most of our routes do. What HTTP wants of an answer
with a whole body is little: its length, no body to HEAD or with a 204, and a word on whether the
connection goes on.
"""

import re
import time
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

PIECE_BYTES: Final = 64 * 1024
"""What is handed to the transport at once; so much of an answer waits there for a slow client."""

_PHRASES: Final = {int(status): status.phrase for status in HTTPStatus}
_LINE = re.compile(r"[A-Za-z0-9-]+: [\t\x20-\x7e]*")


class PlainResponse(web.StreamResponse):
    """A status, header lines and a whole body."""

    def __init__(self, *, status: int, lines: str, body: bytes) -> None:
        """`lines` are those of `header_lines`; length, date and connection are added to them."""
        super().__init__(status=status)
        self._lines = lines
        self._whole = body

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write the answer.

        A large body goes out piece by piece, each once the client has taken the one before: it is
        not copied for each connection, nor into the transport of those that do not read.
        """
        writer = self._payload_writer = request.writer
        head, body = self._head(request)
        if len(body) <= PIECE_BYTES:
            await writer.write(head + body)
            return writer
        await writer.write(head)
        whole = memoryview(body)
        for at in range(0, len(whole), PIECE_BYTES):
            await writer.write(whole[at : at + PIECE_BYTES])
            await writer.drain()
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Wait until the client has taken most of what was written to it."""
        assert not data, "the body is whole from the beginning"
        if self._payload_writer is not None:
            await self._payload_writer.drain()
        self._eof_sent = True

    def _head(self, request: web.BaseRequest) -> tuple[bytes, bytes]:
        """The head, and as much of the body as goes with it: all or nothing."""
        version, status, whole = request.version, self._status, self._whole
        if self._keep_alive is None:
            self._keep_alive = request.keep_alive
        connection = ""
        if not self._keep_alive:
            connection = "Connection: close\r\n"
        elif version < HttpVersion11:
            connection = "Connection: keep-alive\r\n"
        # RFC 9110, 8.6: a 204 has no length, the answer to HEAD that of the one to GET.
        length = "" if status == HTTPStatus.NO_CONTENT else f"Content-Length: {len(whole)}\r\n"
        head = (
            f"HTTP/{version.major}.{version.minor} {status} {_PHRASES[status]}\r\n{self._lines}"
            f"{length}{_date.line()}{connection}\r\n"
        ).encode("ascii")
        return head, b"" if request.method == "HEAD" or not length else whole


def header_lines(headers: Mapping[str, str]) -> str:
    """Header lines as they are sent; `ValueError` for what would be no single line of ASCII."""
    lines = [f"{name}: {value}" for name, value in headers.items()]
    if not all(map(_LINE.fullmatch, lines)):
        raise ValueError("a header that is none")
    return "".join(f"{line}\r\n" for line in lines)


class _Date:
    """The header line `Date`, written once a second."""

    def __init__(self) -> None:
        self._second = -1
        self._line = ""

    def line(self) -> str:
        second = int(time.time())
        if second != self._second:
            self._second, self._line = second, f"Date: {formatdate(second, usegmt=True)}\r\n"
        return self._line


_date = _Date()
