"""What the daemon tells systemd: that it is ready, reloads, stops, and is still alive.

The protocol is sd_notify(3): one datagram of `NAME=value` lines to the socket that `NOTIFY_SOCKET`
names. Without that variable (nobody supervises us) everything here does nothing. A supervisor that
does not listen is logged and never stops the work. When to say what is the caller's to know.
"""

import asyncio
import os
import socket
import time
from collections.abc import Mapping
from typing import Final, Self

import structlog

log = structlog.get_logger()

SEND_TIMEOUT_S: Final = 0.5
"""A local datagram is taken at once; a supervisor whose queue is full must not hold up the loop."""
MAX_STATUS_CHARS: Final = 256
MIN_WATCHDOG_S: Final = 0.01


class Notifier:
    """The way to systemd, made from the environment that it started us with."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._socket: socket.socket | None = None
        if self._address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.settimeout(SEND_TIMEOUT_S)
        self.watchdog_s = _watchdog_s(environ)
        """How long systemd waits for a sign of life, in seconds; None where it does not."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the socket go; whatever is said after that is said to nobody."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ready(self, status: str = "") -> None:
        """The start, or a reload, is complete."""
        self._send("READY=1", status)

    def reloading(self) -> None:
        """Settings are read anew; `ready` ends it. The time is for `Type=notify-reload`."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str = "") -> None:
        """No new work is taken; systemd's stop timeout runs."""
        self._send("STOPPING=1", status)

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send("", text)

    async def watchdog(self) -> None:
        """Give a sign of life at half of the time that systemd waits, until cancelled.

        It comes from the event loop itself, so that a loop that hangs is found out. Returns at
        once where systemd waits for none.
        """
        if self.watchdog_s is None or self._socket is None:
            return
        while True:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_s / 2)

    def _send(self, state: str, status: str = "") -> None:
        if self._socket is None or self._address is None:
            return
        # A line break would make the rest of a status an assignment of its own.
        told = " ".join(status.split())[:MAX_STATUS_CHARS]
        text = "\n".join(part for part in (state, f"STATUS={told}" if told else "") if part)
        if not text:
            return
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError as error:
            log.warning("notify_failed", state=state.partition("=")[0], error=error.strerror)


def _address(given: str) -> str | bytes | None:
    """The address to send to: a path, or `@name` for a name that has no file (unix(7))."""
    if given.startswith("@"):
        return b"\0" + os.fsencode(given[1:])
    if given.startswith("/"):
        return given
    if given:
        log.warning("notify_unsupported", reason="NOTIFY_SOCKET is neither a path nor @name")
    return None


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """`WATCHDOG_USEC` in seconds, if it is meant for this process (sd_watchdog_enabled(3))."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    given = environ.get("WATCHDOG_USEC", "")
    if not given.isascii() or not given.isdigit():
        if given:
            log.warning("watchdog_unreadable", reason="WATCHDOG_USEC is not a number")
        return None
    return max(int(given) / 1_000_000, MIN_WATCHDOG_S) if int(given) else None
