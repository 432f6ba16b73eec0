"""The crashes of one key: how many are remembered, whether it fails fast, what the log may say.

Pure: times come in, decisions go out. Keys that never crashed have none of this.
"""

from pathlib import Path
from traceback import StackSummary, walk_tb
from typing import Final

from glamd.actor.actor import ActorSpec

PLACES_LIMIT: Final = 12
"""Frames of a crash that are logged, the innermost ones."""


class WrongResultCountError(Exception):
    """A batch came back with another number of results than it had messages."""


class Crashes:
    """Times of the crashes within the window, at most one more than the limit."""

    __slots__ = ("_failing_until_s", "_spec", "_times_s", "count")

    def __init__(self, spec: ActorSpec[object, object]) -> None:
        self.count = 0
        self._spec = spec
        self._times_s: tuple[float, ...] = ()
        self._failing_until_s: float | None = None

    def add(self, now_s: float) -> bool:
        """Remember a crash; whether the key fails fast from now on."""
        self.count += 1
        since_s = now_s - self._spec.restart_window_s
        recent = tuple(at_s for at_s in self._times_s if at_s > since_s)
        self._times_s = (*recent, now_s)[-self._spec.restart_limit - 1 :]
        if len(self._times_s) <= self._spec.restart_limit:
            return False
        self._failing_until_s = now_s + self._spec.fail_fast_s
        return True

    def is_failing(self, now_s: float) -> bool:
        """Whether the key refuses at once."""
        return self._failing_until_s is not None and now_s < self._failing_until_s

    def is_history(self, now_s: float) -> bool:
        """Whether nothing of this matters any more."""
        return not self.is_failing(now_s) and all(
            at_s <= now_s - self._spec.restart_window_s for at_s in self._times_s
        )


def where(error: BaseException) -> dict[str, object]:
    """The type of an exception and the places it went through.

    Its text stays out, and so do the texts of its causes: they may quote what the actor was
    given, which may be card data.
    """
    frames = StackSummary.extract(walk_tb(error.__traceback__), lookup_lines=False)
    causes: list[str] = []
    seen = error
    while (inner := seen.__cause__ or seen.__context__) and len(causes) < PLACES_LIMIT:
        causes.append(type(inner).__qualname__)
        seen = inner
    return {
        "error": type(error).__qualname__,
        "causes": causes,
        "places": [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in frames[-PLACES_LIMIT:]
        ],
    }
