"""The actor kernel: one instance per key, one message at a time, nothing unbounded.

Here lives only what every actor needs: addresses, bounded mailboxes, activation, time-outs,
crashes, passivation, drain, and the numbers about them. No actor of glamd lives here, and no
payment, key, database or socket: the kernel knows `glamd.errors` and `glamd.clock` and nothing
else of ours, so that each capability can keep its actor beside its own rules and SQL.

`glamd.actor.testing` has the virtual-time loop that tests of actors run on. `docs/kernel.md` says
in one page what the kernel promises.
"""

from glamd.actor.actor import Actor, ActorSpec
from glamd.actor.metrics import ActorCollector
from glamd.actor.reports import ActorState, ActorStats, DrainReport, KindStats, SystemStats
from glamd.actor.system import Ref, System

__all__ = [
    "Actor",
    "ActorCollector",
    "ActorSpec",
    "ActorState",
    "ActorStats",
    "DrainReport",
    "KindStats",
    "Ref",
    "System",
    "SystemStats",
]
