"""What the kernel tells about itself: frozen numbers for metrics, `glamctl` and the drain's log.

Names and counts only, never a message: what an actor is given may be card data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class ActorState(StrEnum):
    """What the instance of one key is doing."""

    IDLE = "idle"
    ACTIVATING = "activating"
    RECEIVING = "receiving"
    PASSIVATING = "passivating"
    CRASHED = "crashed"
    FAILING = "failing"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorStats:
    """One key: messages waiting, messages handled and crashes since it is in the table."""

    kind: str
    key: str
    state: ActorState
    mailbox: int
    handled: int
    restarts: int
    idle_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KindStats:
    """One kind: keys in the table and messages waiting now; the rest are counts since the start.

    `refused` counts by error code. `unheard` are errors that no asker was left to hear: each one
    is in the log with its code.
    """

    kind: str
    actors: int
    mailbox: int
    handled: int
    activations: int
    passivations: int
    restarts: int
    timeouts: int
    unheard: int
    refused: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemStats:
    """All kinds, and of the actors as many as were asked for, busy ones first."""

    draining: bool
    kinds: tuple[KindStats, ...]
    actors: tuple[ActorStats, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainReport:
    """How a drain ended: instances passivated, and who was still busy when the time was up.

    leftovers         kind and key of every actor that had to be cancelled
    refused_messages  messages in their mailboxes, answered with DRAINING unhandled
    stuck             those of the leftovers that did not even end when cancelled
    """

    passivated: int
    leftovers: tuple[tuple[str, str], ...]
    refused_messages: int
    stuck: tuple[tuple[str, str], ...]
    elapsed_s: float

    @property
    def clean(self) -> bool:
        """Whether everything accepted was handled and everybody was passivated."""
        return not self.leftovers
