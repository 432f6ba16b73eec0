"""The clock that everything is given, so that no rule reads the time by itself.

Wall time is for what is stored and shown; monotonic time is for what is waited for. Timers do
not live here: the event loop has them.
"""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Wall time (aware, UTC) and monotonic seconds."""

    def now(self) -> datetime:
        """The wall time, aware, in UTC."""

    def monotonic_s(self) -> float:
        """Seconds since some fixed moment; never runs backwards."""


class SystemClock:
    """The operating system's clocks."""

    def now(self) -> datetime:
        """The wall time, aware, in UTC."""
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        """CLOCK_MONOTONIC in seconds."""
        return time.monotonic()
