"""Which refused attempts have a row in the access log: the first of its kind in a minute. Pure.

Who is refused says to whose log the row goes, so that without a bound any caller could fill the log
of any merchant. What has no row is counted all the same; that is the caller's.
"""

from typing import Final, NamedTuple
from uuid import UUID

from glamd.clock import Clock
from glamd.credentials.model import Action

WINDOW_S: Final = 60.0
CALLER_ROWS: Final = 60
"""Rows of one caller in a window, however many merchants it goes through."""

CALLERS_LIMIT: Final = 1000
"""Callers that are remembered; with more, all is forgotten, which costs rows and hides none."""


class Refusal(NamedTuple):
    """Who (`kind` and `name` of an identity) was refused what, and why."""

    kind: str
    name: str
    merchant_id: UUID
    action: Action
    code: str


class Refusals:
    """The refusals that have had their row in this window."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until_s = float("-inf")
        self._by_caller: dict[tuple[str, str], set[Refusal]] = {}

    def __len__(self) -> int:
        """How many callers are remembered."""
        return len(self._by_caller)

    def is_news(self, refusal: Refusal) -> bool:
        """Whether this one is to have a row; it is remembered as one that has."""
        now_s = self._clock.monotonic_s()
        caller = (refusal.kind, refusal.name)
        is_full = caller not in self._by_caller and len(self) >= CALLERS_LIMIT
        if now_s >= self._until_s or is_full:
            self._by_caller.clear()
            self._until_s = now_s + WINDOW_S
        known = self._by_caller.setdefault(caller, set())
        if refusal in known or len(known) >= CALLER_ROWS:
            return False
        known.add(refusal)
        return True

    def forget(self, refusal: Refusal) -> None:
        """Its row could not be written: the next one is to have it."""
        self._by_caller.get((refusal.kind, refusal.name), set()).discard(refusal)
