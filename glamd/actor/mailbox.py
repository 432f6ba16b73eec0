"""Messages under way: their envelopes, the mailbox where they wait, and how long the askers wait.

No instance and no task lives here. Asks that end in the same 50 ms share one timer of the loop:
a timer for each costs four times as much (`bench/actors.py` measures it) and 10 to 25 % of the
whole ask, and almost every ask is answered long before its time.
"""

import asyncio
from collections import deque
from typing import Final, Protocol, TypeAlias

TICKS_PER_S: Final = 20
"""An ask ends between its time-out and 1 / TICKS_PER_S s after it."""


class Asked(Protocol):
    """Whom an ask was for; says what its asker hears when the time is up."""

    def timed_out(self) -> Exception:
        """Count the time-out, and make the asker's exception."""


Bucket: TypeAlias = dict[asyncio.Future[object], Asked]
Envelope: TypeAlias = tuple[object, asyncio.Future[object] | None, Bucket]
"""The message, the asker's future (None: told, not asked), the bucket with its deadline."""

NO_DEADLINE: Final[Bucket] = {}
"""The bucket of everything that was told: always empty."""


def answer(envelope: Envelope, result: object) -> None:
    """Give the asker its result, unless it was told, timed out or is not waited for any more."""
    future = envelope[1]
    if future is not None:
        envelope[2].pop(future, None)
        if not future.done():
            future.set_result(result)


def refuse(envelope: Envelope, error: Exception) -> bool:
    """Give the asker an error; False where no asker is left to hear it."""
    future = envelope[1]
    if future is None:
        return False
    envelope[2].pop(future, None)
    if future.done():
        return False
    fail(future, error)
    return True


def fail(future: asyncio.Future[object], error: Exception) -> None:
    """Set the exception and mark it as seen.

    Its way through the actor is cut off: those frames hold the message, which should not live as
    long as the answer. It is marked since an asker may have let go of the future without
    cancelling it, and asyncio would complain about that at some later collection, far from any
    cause. Whatever is worth a log line has been logged by the kernel when it happened.
    """
    future.set_exception(error.with_traceback(None))
    future.exception()


class Mailbox(deque[Envelope | None]):
    """Messages of one key, oldest first; None where the instance is to be passivated.

    It exists only while something waits or is handled, since an empty one has 0.6 KiB.
    """

    __slots__ = ()

    def messages(self) -> int:
        """How many messages wait."""
        return len(self) - self.count(None)

    def add_stop(self) -> None:
        """Passivate after what is here now; two stops in a row would be one."""
        if not self or self[-1] is not None:
            self.append(None)

    def take(self, limit: int) -> list[Envelope]:
        """Remove up to `limit` messages, none of them behind a stop."""
        taken: list[Envelope] = []
        while self and len(taken) < limit:
            envelope = self[0]
            if envelope is None:
                break
            taken.append(envelope)
            self.popleft()
        return taken

    def take_all(self) -> list[Envelope]:
        """Remove everything, stops too, and return the messages."""
        taken = [envelope for envelope in self if envelope is not None]
        self.clear()
        return taken


class Deadlines:
    """Buckets of unanswered asks by the tick at which they end.

    An answered ask leaves its bucket at once, so no answer outlives its use here.
    """

    __slots__ = ("_buckets", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buckets: dict[int, Bucket] = {}

    def bucket(self, timeout_s: float) -> Bucket:
        """Where an ask belongs that ends in `timeout_s` seconds; it is not put in yet."""
        tick = int((self._loop.time() + timeout_s) * TICKS_PER_S) + 1
        found = self._buckets.get(tick)
        return self._open(tick) if found is None else found

    def _open(self, tick: int) -> Bucket:
        bucket: Bucket = {}
        self._buckets[tick] = bucket
        self._loop.call_at(tick / TICKS_PER_S, self._expire, tick)
        return bucket

    def _expire(self, tick: int) -> None:
        # Failing a future only schedules its callbacks, so nothing joins or leaves meanwhile.
        for future, asked in self._buckets.pop(tick).items():
            if not future.done():
                fail(future, asked.timed_out())
