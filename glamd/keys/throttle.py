"""How fast background work may go beside traffic that must not suffer from it.

Pure: no event loop and no database. It is fed with how long traffic's commits take, compares the
slow ones under the work with those of the moments in which the work rests, and says how large the
next batch may be: a little larger while traffic does not notice, half as large when it does. What
delays a commit is the batch that it meets, so batches become small first, and only when they cannot
become smaller are there rests between them. Without traffic there is nothing to spare.
"""

from collections import deque
from collections.abc import Collection
from typing import Final

from glamd.clock import Clock

ROWS_MOST: Final = 500
"""Rows in one batch at full speed: more held the event loop for longer and won nothing."""
ROWS_LEAST: Final = 32
"""Smaller batches cost more in round trips than they spare; from here on there are rests."""

SUFFERING: Final = 1.4
"""Traffic suffers when its slow commits take so many times as long as while the work rests."""
QUANTILE: Final = 0.96
"""Which commit counts as slow: the third slowest of DECIDE_SAMPLES."""
SPEED_LEAST: Final = 0.004
"""Of the full speed: batches of ROWS_LEAST, and rests of some fifteen times their length."""
SPEED_STEP: Final = 0.02
SPEED_FIRST: Final = 0.2
"""Where it begins beside traffic: faster it gets once traffic is seen not to notice."""
IDLE_S: Final = 1.0
"""Without a commit for so long there is no traffic to spare."""
DECIDE_SAMPLES: Final = 50
"""Commits under the work that are looked at before its speed is changed."""
BASELINE_SAMPLES: Final = 256
BASELINE_LEAST: Final = 8
"""Fewer commits than these, seen at rest, are no baseline: the work rests until it has one."""
REST_S: Final = 0.25
"""How long it rests to see what traffic is like without it."""
REST_EVERY_S: Final = 10.0
PAUSE_MOST_S: Final = 2.0


class Throttle:
    """Says after each batch how long to rest, and how many rows the next one may have."""

    def __init__(self, clock: Clock, *, first: float = SPEED_FIRST) -> None:
        """`first` is the part of the full speed at which it begins beside traffic."""
        self._first = first
        self._clock = clock
        self._speed = 1.0
        self._beside_traffic = False
        self._resting: deque[float] = deque(maxlen=BASELINE_SAMPLES)
        self._working: deque[float] = deque(maxlen=DECIDE_SAMPLES)
        self._began_s: float | None = None
        self._looked_at_s = clock.monotonic_s()
        self._rested_since_s = float("-inf")
        self._seen_at_s = float("-inf")

    @property
    def speed(self) -> float:
        """Part of the full speed, above 0 and up to 1."""
        return self._speed

    @property
    def is_idle(self) -> bool:
        """Whether there is no traffic."""
        return self._clock.monotonic_s() - self._seen_at_s >= IDLE_S

    @property
    def rows(self) -> int:
        """How many rows the next batch may have."""
        return max(ROWS_LEAST, round(ROWS_MOST * self._speed))

    def observe(self, seconds: float) -> None:
        """A commit of traffic ended just now and took so long."""
        now_s = self._clock.monotonic_s()
        self._seen_at_s = now_s
        if self._began_s is not None:
            self._working.append(seconds)
        elif now_s - seconds >= self._rested_since_s:
            # One that began under the work says nothing of traffic without it.
            self._resting.append(seconds)

    def begin(self) -> None:
        """A batch begins."""
        self._began_s = self._clock.monotonic_s()

    def end(self) -> float:
        """The batch has ended; seconds to rest before the next one."""
        now_s = self._clock.monotonic_s()
        assert self._began_s is not None, "a batch ends that has begun"
        took_s = now_s - self._began_s
        self._began_s = None
        self._rested_since_s = now_s
        if self.is_idle:
            self._speed = 1.0
            self._beside_traffic = False
            self._working.clear()
            return 0.0
        if not self._beside_traffic:
            self._beside_traffic = True
            self._speed = min(self._speed, self._first)
        if len(self._resting) < BASELINE_LEAST or now_s - self._looked_at_s >= REST_EVERY_S:
            self._looked_at_s = now_s
            return REST_S
        self._decide()
        # What a batch of the least size is too fast by is made up for by a rest.
        too_fast = self.rows / (ROWS_MOST * self._speed)
        return min(took_s * max(0.0, too_fast - 1.0), PAUSE_MOST_S)

    def _decide(self) -> None:
        if len(self._working) < DECIDE_SAMPLES:
            return
        if _slow(self._working) > SUFFERING * _slow(self._resting):
            self._speed = max(SPEED_LEAST, self._speed / 2)
        else:
            self._speed = min(1.0, self._speed + SPEED_STEP)
        self._working.clear()


def _slow(samples: Collection[float]) -> float:
    ordered = sorted(samples)
    return ordered[int(QUANTILE * (len(ordered) - 1))]
