"""The kernel's numbers for Prometheus, read when they are scraped and not before.

By kind only: a key is a device or a merchant, and there may be a hundred thousand of them.
"""

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from glamd.actor.system import System

COUNTERS: Final = (
    ("handled", "handled_messages", "Messages given to an instance"),
    ("activations", "activations", "Instances made"),
    ("passivations", "passivations", "Instances let go without a crash"),
    ("restarts", "crashes", "Instances lost to an unexpected exception"),
    ("timeouts", "timed_out_asks", "Asks whose answer came too late or never"),
    ("unheard", "unheard_errors", "Errors that nobody was left to hear"),
)


class ActorCollector(Collector):
    """Give it to a registry once per system: `registry.register(ActorCollector(system))`."""

    def __init__(self, system: System) -> None:
        self._system = system

    def collect(self) -> Iterable[Metric]:
        """The families of this moment."""
        kinds = self._system.stats(limit=0).kinds
        actors = GaugeMetricFamily("glamd_actor_instances", "Keys in the table", labels=["kind"])
        waiting = GaugeMetricFamily(
            "glamd_actor_mailbox_messages", "Messages waiting", labels=["kind"]
        )
        refused = CounterMetricFamily(
            "glamd_actor_refused_messages", "Messages not handled", labels=["kind", "code"]
        )
        for kind in kinds:
            actors.add_metric([kind.kind], kind.actors)
            waiting.add_metric([kind.kind], kind.mailbox)
            for code, count in kind.refused.items():
                refused.add_metric([kind.kind, code], count)
        yield from (actors, waiting, refused)
        for field, name, text in COUNTERS:
            family = CounterMetricFamily(f"glamd_actor_{name}", text, labels=["kind"])
            for kind in kinds:
                family.add_metric([kind.kind], getattr(kind, field))
            yield family
