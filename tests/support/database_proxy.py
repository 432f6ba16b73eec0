"""A TCP proxy before PostgreSQL that loses what a test wants lost.

Everything passes until a test says otherwise; nothing is understood but that one chunk from the
client is a question and one from the server an answer, which holds for a driver that waits.
"""

import asyncio
import contextlib
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

CHUNK_BYTES = 65536


class DatabaseProxy:
    """Stands between a client and the server of `url`; use it as an asynchronous context manager.

    `is_down` refuses everybody. `lose_question` counts questions down to the one that does not
    arrive, `lose_answer` answers likewise: the connection ends there, both ways.
    """

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_down = False
        self.lose_question = 0
        self.lose_answer = 0
        self.questions = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    @property
    def url(self) -> str:
        """The database's URL, by way of this proxy."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        login = self._target.netloc.rpartition("@")[0]
        return urlunsplit(self._target._replace(netloc=f"{login}@127.0.0.1:{port}"))

    def go_down(self) -> None:
        """Cut all connections and let nobody in."""
        self.is_down = True
        self.cut()

    def cut(self) -> None:
        """Cut all connections."""
        for writer in self._open:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.is_down:
            writer.close()
            return
        host, port = self._target.hostname, self._target.port or 5432
        there_reader, there_writer = await asyncio.open_connection(host, port)
        both = {writer, there_writer}
        self._open |= both
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, there_writer, both, "question"))
                group.create_task(self._pump(there_reader, writer, both, "answer"))
        finally:
            self._open -= both

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        both: set[asyncio.StreamWriter],
        kind: str,
    ) -> None:
        with contextlib.suppress(OSError):
            while (chunk := await source.read(CHUNK_BYTES)) and not self._is_lost(kind):
                sink.write(chunk)
                await sink.drain()
        for writer in both:
            writer.close()

    def _is_lost(self, kind: str) -> bool:
        if kind == "question":
            self.questions += 1
            self.lose_question -= 1
            return self.lose_question == 0
        self.lose_answer -= 1
        return self.lose_answer == 0
