"""The process's own figures: the build, the loop's lag, and the text that Prometheus reads."""

import asyncio
from collections.abc import Iterable
from contextlib import AsyncExitStack
from datetime import UTC, datetime

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from glamd import __version__, metrics


class Late:
    """A clock by which every other reading, the one after a timer, is later than it should be."""

    def __init__(self, late_s: list[float], interval_s: float) -> None:
        self.late_s = late_s
        self.interval_s = interval_s
        self.now_s = 0.0
        self.readings = 0
        self.used_up = asyncio.Event()

    def now(self) -> datetime:
        return datetime(2025, 1, 1, tzinfo=UTC)

    def monotonic_s(self) -> float:
        sample, after_the_timer = divmod(self.readings, 2)
        self.readings += 1
        if sample == len(self.late_s):
            self.used_up.set()
        elif after_the_timer:
            self.now_s += self.interval_s + self.late_s[sample]
        return self.now_s


def value_of(name: str) -> float:
    families = text_string_to_metric_families(metrics.render()[0].decode())
    (value,) = [s.value for family in families for s in family.samples if s.name == name]
    return value


async def lag_after(late_s: list[float]) -> metrics.LoopLag:
    clock = Late(late_s, 0.001)
    lag = metrics.LoopLag(clock, interval_s=0.001)
    assert lag.worst_s == 0
    task = asyncio.create_task(lag.run())
    async with asyncio.timeout(10):
        await clock.used_up.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    return lag


async def test_the_worst_lag_is_shown_until_it_is_old() -> None:
    lag = await lag_after([0.0, 0.7, 0.1])
    assert round(lag.worst_s, 6) == 0.7
    assert round(value_of("glamd_process_loop_lag_seconds"), 6) == 0.7
    lag = await lag_after([0.7, *[0.25] * metrics.LAG_SAMPLES])
    assert round(lag.worst_s, 6) == 0.25


async def test_a_timer_that_is_early_is_no_negative_lag() -> None:
    assert (await lag_after([-0.5, -0.5])).worst_s == 0


def test_the_build_is_told() -> None:
    body, content_type = metrics.render()
    assert b'glamd_build_info{python_version="3.' in body
    assert f'version="{__version__}"'.encode() in body
    assert content_type.startswith("text/plain; version=")


async def test_a_collector_is_shown_for_as_long_as_its_part_lives() -> None:
    class Figures(Collector):
        def collect(self) -> Iterable[Metric]:
            yield GaugeMetricFamily("glamd_test_part_figures", "Of a part", value=3)

    async with AsyncExitStack() as stack:
        metrics.register(Figures(), stack)
        assert value_of("glamd_test_part_figures") == 3
    assert b"glamd_test_part_figures" not in metrics.render()[0]
    async with AsyncExitStack() as stack:
        metrics.register(Figures(), stack)
        assert value_of("glamd_test_part_figures") == 3
