"""A clock that stands where the test puts it."""

from datetime import UTC, datetime, timedelta


class SettableClock:
    """Wall and monotonic time, both moved by hand."""

    def __init__(self, now: datetime = datetime(2025, 11, 12, 10, 30, tzinfo=UTC)) -> None:
        self._now = now
        self._monotonic_s = 1000.0

    def now(self) -> datetime:
        """The wall time as it was set."""
        return self._now

    def monotonic_s(self) -> float:
        """The monotonic time, which only `advance` moves."""
        return self._monotonic_s

    def set(self, now: datetime) -> None:
        """Set the wall time alone, forwards or backwards."""
        self._now = now

    def advance(self, seconds: float) -> None:
        """Let both go on."""
        self._now += timedelta(seconds=seconds)
        self._monotonic_s += seconds
