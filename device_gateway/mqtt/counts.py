"""What the endpoint counts, as plain integers: the hot path adds, a scrape reads.

prometheus_client's own counters take a lock for each message; here its registry calls `collect`.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


@dataclass(slots=True)
class Counts:
    """Totals since the start; a `Counter` is keyed by a reason out of a fixed set."""

    connections: int = 0
    accepted: int = 0
    take_overs: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    requests_failed: int = 0
    acknowledged: int = 0
    delivered: int = 0
    redelivered: int = 0
    undelivered: Counter[str] = field(default_factory=Counter)
    wills: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointStats:
    """The endpoint at this moment."""

    connected: int
    opening: int
    sessions: int
    requests_in_flight: int
    retained: int


_TOTALS = (
    ("connections", "TCP connections accepted"),
    ("accepted", "CONNECTs accepted"),
    ("take_overs", "Connections that took a session over from an open one"),
    ("requests", "PUBLISH packets handed to the gateway"),
    ("requests_failed", "Requests left unacknowledged because the gateway failed"),
    ("acknowledged", "PUBACK packets sent"),
    ("delivered", "PUBLISH packets sent to devices"),
    ("redelivered", "PUBLISH packets sent again after a reconnect"),
    ("wills", "Last wills handed to the gateway"),
)
_REASONS = (
    ("refused", "Connections closed before their CONNECT was accepted"),
    ("ended", "Accepted connections that ended"),
    ("undelivered", "Downlink messages that were not taken or not sent"),
)


class EndpointCollector(Collector):
    """The endpoint's numbers as Prometheus wants them, read at each scrape."""

    def __init__(self, counts: Counts, stats: Callable[[], EndpointStats]) -> None:
        self._counts = counts
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """Every metric of the endpoint, `glamd_mqtt_…`."""
        for name, text in _TOTALS:
            value = getattr(self._counts, name)
            yield CounterMetricFamily(f"glamd_mqtt_{name}_total", text, value=value)
        for name, text in _REASONS:
            family = CounterMetricFamily(f"glamd_mqtt_{name}_total", text, labels=["reason"])
            for reason, value in getattr(self._counts, name).items():
                family.add_metric([reason], value)
            yield family
        stats = self._stats()
        for name in EndpointStats.__slots__:
            yield GaugeMetricFamily(
                f"glamd_mqtt_{name}_count",
                f"{name.replace('_', ' ').capitalize()} now",
                value=getattr(stats, name),
            )
