"""A way to a KMS that a test can shut: mid-rewrap, by the call, or altogether, as an outage is."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

LOOPBACK = "127.0.0.1"
NOT_PASSED_ON = {"Content-Length", "Connection", "Transfer-Encoding", "Date", "Server"}


class GatedKms:
    """Passes requests to the KMS at `target` until told otherwise."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._session: aiohttp.ClientSession
        self._runner: web.AppRunner
        self._port = 0
        self._wraps_left: int | None = None
        self.held_up = asyncio.Event()
        """A call waits at the shut gate."""
        self._open = asyncio.Event()
        self._open.set()

    @property
    def url(self) -> str:
        """Where glamd finds it; the same after an outage."""
        return f"http://{LOOPBACK}:{self._port}"

    def shut_after(self, wraps: int) -> None:
        """Let so many more Encrypt calls through; the next, and all behind it, get no answer."""
        self._wraps_left = wraps
        self.held_up.clear()

    def open(self) -> None:
        """Let everything through again."""
        self._wraps_left = None
        self._open.set()

    async def leave(self) -> None:
        """Cut every connection and refuse new ones."""
        await self._runner.cleanup()

    async def come_back(self) -> None:
        """Listen where it was."""
        application = web.Application()
        application.router.add_post("/", self._pass_on)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, LOOPBACK, self._port).start()
        self._port = self._runner.addresses[0][1]

    @asynccontextmanager
    async def running(self) -> AsyncIterator["GatedKms"]:
        """It listens while this is entered."""
        async with aiohttp.ClientSession() as self._session:
            await self.come_back()
            try:
                yield self
            finally:
                self._open.set()
                await self.leave()

    async def _pass_on(self, request: web.Request) -> web.Response:
        if request.headers["X-Amz-Target"].endswith(".Encrypt") and self._wraps_left is not None:
            if self._wraps_left == 0:
                self._open.clear()
                self.held_up.set()
            else:
                self._wraps_left -= 1
        await self._open.wait()
        body = await request.read()
        headers = {k: v for k, v in request.headers.items() if k not in NOT_PASSED_ON}
        async with self._session.post(self._target, data=body, headers=headers) as answer:
            kept = {k: v for k, v in answer.headers.items() if k not in NOT_PASSED_ON}
            return web.Response(status=answer.status, body=await answer.read(), headers=kept)
