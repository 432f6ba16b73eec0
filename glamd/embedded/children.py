"""One child process that lives as long as we do: started, watched, started again, stopped.

A child is tied to the thread that started it (PDEATHSIG): when that ends, by `kill -9` too, the
kernel signals the child. Start children from the event loop's thread, which is the process's main
thread in the daemon. What a child is and when it is ready is its owner's knowledge, not ours.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import structlog

from glamd.embedded import _launch
from glamd.errors import UnavailableError

log = structlog.get_logger()

RESTART_LIMIT: Final = 10
"""Attempts in a row to get a child that died ready again; after them it is given up."""

FIRST_DELAY_S: Final = 0.05
LAST_DELAY_S: Final = 2.0
"""Waits between those attempts: doubled each time, from the first to the last of these."""

LOG_LIMIT_BYTES: Final = 16 * 1024 * 1024
"""A log file that is larger than this when the child starts becomes its own predecessor `.1`."""

LOG_TAIL_BYTES: Final = 4096
COMPLAINT: Final = re.compile("fatal|panic|error", re.IGNORECASE)
KILL_TIMEOUT_S: Final = 5.0

Ready = Callable[[], Awaitable[bool]]
"""Asked again and again after a start: True when the child serves. Must be bounded itself."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The user that a child runs as."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to run, where, as whom; `death_signal` comes when we die, `stop_signal` from `stop`."""

    name: str
    command: tuple[str, ...]
    directory: Path
    log: Path
    identity: Identity | None = None
    environment: tuple[tuple[str, str], ...] = ()
    death_signal: signal.Signals = signal.SIGKILL
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_s: float = 10.0
    ready_timeout_s: float = 30.0


class Child:
    """A supervised process: `start` returns when it is ready, and it is restarted when it dies."""

    def __init__(self, program: Program, ready: Ready) -> None:
        self._program = program
        self._ready = ready
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """The process id of the child that runs now."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    async def start(self) -> None:
        """Start the child and wait until it is ready; UnavailableError when it does not get so."""
        assert self._supervisor is None, "the child is started already"
        await self._launch()
        self._supervisor = asyncio.create_task(
            self._supervise(), name=f"child:{self._program.name}"
        )

    async def stop(self, stop_signal: signal.Signals | None = None) -> None:
        """End the child by its stop signal (or this one), by SIGKILL when it takes too long."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        await self._end(stop_signal or self._program.stop_signal)

    async def wait(self) -> None:
        """Return when the child was stopped; UnavailableError when it was given up."""
        supervisor = self._supervisor
        if supervisor is not None:
            await asyncio.wait([supervisor])
            if not supervisor.cancelled():
                supervisor.result()

    def send(self, number: signal.Signals) -> None:
        """Signal the child, if it runs; whatever that does to it, it is supervised."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def _supervise(self) -> None:
        while True:
            assert self._process is not None
            status = await self._process.wait()
            log.warning("child_died", child=self._program.name, status=status)
            delay_s = FIRST_DELAY_S
            for attempt in range(1, RESTART_LIMIT + 1):
                self.restarts += 1
                try:
                    await self._launch()
                    break
                except UnavailableError as error:
                    if attempt == RESTART_LIMIT:
                        log.error("child_given_up", child=self._program.name)  # noqa: TRY400
                        raise
                    log.warning(
                        "child_not_restarted", child=self._program.name, reason=error.message
                    )
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, LAST_DELAY_S)
            log.info("child_restarted", child=self._program.name, restarts=self.restarts)

    async def _launch(self) -> None:
        """Start the process and wait for it; when it does not get ready it is ended again."""
        said_before = _size(self._program.log)
        self._process = process = await spawn(self._program)
        try:
            async with asyncio.timeout(self._program.ready_timeout_s):
                delay_s = 0.01
                while process.returncode is None:
                    if await self._ready():
                        return
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(process.wait(), delay_s)
                    delay_s = min(delay_s * 1.5, 0.25)
        except TimeoutError:
            await self._end(signal.SIGKILL)
        except asyncio.CancelledError:
            await self._end(self._program.stop_signal)
            raise
        msg = f"{self._program.name} does not start: {last_words(self._program.log, said_before)}"
        raise UnavailableError(msg)

    async def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(number)
        try:
            async with asyncio.timeout(self._program.stop_timeout_s):
                await process.wait()
        except TimeoutError:
            log.warning("child_killed", child=self._program.name)
            process.kill()
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await process.wait()


async def run(program: Program, *, timeout_s: float) -> None:
    """Run a program to its end, such as an initializer; UnavailableError unless it ends well."""
    said_before = _size(program.log)
    process = await spawn(program)
    try:
        async with asyncio.timeout(timeout_s):
            status = await process.wait()
    except (TimeoutError, asyncio.CancelledError) as error:
        process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise UnavailableError(f"{program.name} took longer than {timeout_s:g} s.") from None
        raise
    if status != 0:
        msg = f"{program.name} ended with status {status}: {last_words(program.log, said_before)}"
        raise UnavailableError(msg)


async def spawn(program: Program) -> asyncio.subprocess.Process:
    """Start a program through the launcher, its output appended to its log file."""
    who = program.identity or Identity(_launch.KEEP_USER, _launch.KEEP_USER)
    with _open_log(program.log) as output:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-B", _launch.__file__),
            *(str(os.getpid()), str(int(program.death_signal)), str(program.directory)),
            *(str(who.uid), str(who.gid)),
            *program.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC", **dict(program.environment)},
        )


def last_words(path: Path, offset: int) -> str:
    """What a program said last in its log behind the offset: its last complaint, or its last line.

    A log that was begun anew in between counts from its beginning.
    """
    try:
        with path.open("rb") as stream:
            size = _size(path)
            stream.seek(max(offset if offset <= size else 0, size - LOG_TAIL_BYTES))
            lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines()]
    except OSError:
        lines = []
    complaints = [line for line in lines if COMPLAINT.search(line)]
    return next((line for line in reversed(complaints or lines) if line), "it said nothing")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _open_log(path: Path) -> IO[bytes]:
    if _size(path) > LOG_LIMIT_BYTES:
        path.replace(path.with_name(f"{path.name}.1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "ab", buffering=0)
