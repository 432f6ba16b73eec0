"""How callers fared: `glamd_http_auth_total` by kind and outcome.

`cached` and `verified` are believed, every other outcome is a `jws.Reason` or a
`certificates.Reason`. Who is refused is of kind `unknown`, since nothing that such a token or
certificate says is believed.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class Outcomes(Collector):
    """Plain integers: a counter of the client library's takes a lock, at each request."""

    def __init__(self) -> None:
        self.cached = {"client": 0, "internal": 0, "worker": 0, "device": 0}
        self._others: Counter[tuple[str, str]] = Counter()

    def count(self, kind: str, outcome: str) -> None:
        """One more that was not answered from the cache."""
        self._others[kind, outcome] += 1

    def collect(self) -> Iterable[Metric]:
        """The family of this moment."""
        family = CounterMetricFamily(
            "glamd_http_auth",
            "Callers, by what became of them.",
            labels=["kind", "outcome"],
        )
        for kind, number in self.cached.items():
            family.add_metric([kind, "cached"], number)
        for labels, number in self._others.items():
            family.add_metric(labels, number)
        yield family


OUTCOMES: Final = Outcomes()
REGISTRY.register(OUTCOMES)
