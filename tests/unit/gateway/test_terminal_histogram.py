"""The histogram against plain sorting: never too low, at most 1.6 % too high."""

import math

from hypothesis import given
from hypothesis import strategies as st

from device_gateway.terminal_histogram import Histogram


def filled(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


def test_an_empty_histogram_has_nothing_to_say() -> None:
    empty = Histogram()
    assert (empty.count, empty.percentile(0.5), empty.percentile(1.0), empty.max_us) == (0, 0, 0, 0)
    assert empty.octaves() == []


def test_known_data_gives_known_percentiles() -> None:
    histogram = filled(list(range(1, 101)))
    assert [histogram.percentile(share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert histogram.percentile(0.0) == 1


def test_one_slow_answer_in_a_hundred_shows_in_the_maximum_and_not_in_p99() -> None:
    histogram = filled([100] * 99 + [1_000_000])
    assert histogram.percentile(0.99) == 100
    assert histogram.percentile(0.991) == 1_000_000
    assert histogram.max_us == 1_000_000


@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60),
    st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
)
def test_a_percentile_is_the_sorted_ones_within_its_bucket(values: list[int], share: float) -> None:
    exact = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
    told = filled(values).percentile(share)
    assert exact <= told <= max(exact, exact * (1 + 1 / 64))


@given(st.lists(st.integers(-5, 2**40), max_size=60))
def test_nothing_is_lost_whatever_the_clock_does(values: list[int]) -> None:
    histogram = filled(values)
    assert histogram.count == len(values) == sum(count for _, count in histogram.octaves())
    assert histogram.max_us < 2**32


def test_octaves_have_no_gaps_between_the_first_and_the_last() -> None:
    assert filled([3, 3, 40]).octaves() == [(4, 2), (8, 0), (16, 0), (32, 0), (64, 1)]
