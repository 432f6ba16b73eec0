"""What the author of an actor writes: the class, and the spec that says how it is kept.

No mailbox, task or clock lives here: an actor that knows nothing of the kernel but these two
names can be tested by calling its methods.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from glamd.errors import GlamError

M = TypeVar("M")
R = TypeVar("R")

MAILBOX_LIMIT: Final = 256
BATCH_LIMIT: Final = 1
IDLE_S: Final = 300.0
RESTART_LIMIT: Final = 3
RESTART_WINDOW_S: Final = 60.0
FAIL_FAST_S: Final = 5.0


class Actor(Generic[M, R]):
    """State that belongs to one key, and the only code that touches it.

    The four methods of one instance never overlap. They run in the system's context, not in the
    sender's: what the sender's context variables hold must travel in the message. An await in
    them on anything outside needs a time-out of its own, since the kernel never cancels them
    before the hard end of a drain.

    A `GlamError` that is raised is an answer and the instance stays. Any other exception is a
    crash: the instance is dropped, with whatever it held.
    """

    __slots__ = ()

    async def on_activate(self) -> None:
        """Load the state, before the first message.

        A `GlamError` here answers every message that waits, and the instance is not kept; the
        next message tries again. Such a refusal is not a crash and does not count as one.
        """

    async def receive(self, message: M) -> R:
        """Handle one message and return its answer; for specs whose `batch_limit` is 1."""
        raise NotImplementedError(f"{type(self).__qualname__} has no receive")

    async def receive_batch(self, messages: Sequence[M]) -> Sequence[R | GlamError]:
        """Handle 1 to `batch_limit` messages, oldest first; one result for each, in that order.

        A result that is a `GlamError` becomes the exception of that one ask. Another number of
        results than of messages is a crash, since nobody could say whose answer is missing.
        """
        raise NotImplementedError(f"{type(self).__qualname__} has no receive_batch")

    async def on_passivate(self) -> None:
        """Let go of what is held, after the last message; not called after a crash.

        Nothing may depend on it: a process can die at any time. A message that comes meanwhile
        waits and gets a fresh instance.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSpec(Generic[M, R]):
    """How the actors of one kind are made and bounded; one kind has one spec in a system.

    kind              lower-case name, for tables, task names, logs and metrics
    factory           makes the instance of a key; no I/O in it, that belongs to `on_activate`
    mailbox_limit     messages that may wait per key, the ones being handled not counted; a stop
                      among them takes a place too
    batch_limit       1: `receive`; more: `receive_batch` gets up to so many at once
    idle_s            seconds without a message until the instance is passivated
    restart_limit     crashes allowed within `restart_window_s`; one more and the key fails fast
    restart_window_s  seconds that a crash is remembered
    fail_fast_s       seconds that a failing key refuses at once; then one more crash within the
                      window is enough to fail again

    A limit out of range is a programmer's error: ValueError.
    """

    kind: str
    factory: Callable[[str], Actor[M, R]]
    mailbox_limit: int = MAILBOX_LIMIT
    batch_limit: int = BATCH_LIMIT
    idle_s: float = IDLE_S
    restart_limit: int = RESTART_LIMIT
    restart_window_s: float = RESTART_WINDOW_S
    fail_fast_s: float = FAIL_FAST_S

    def __post_init__(self) -> None:
        if not self.kind:
            raise ValueError("an actor's kind needs a name")
        if min(self.mailbox_limit, self.batch_limit) < 1 or self.restart_limit < 0:
            raise ValueError(f"a limit of actor kind {self.kind!r} is too small")
        if min(self.idle_s, self.restart_window_s, self.fail_fast_s) <= 0:
            raise ValueError(f"a duration of actor kind {self.kind!r} is not positive")
