"""How fast background work goes beside traffic: a clock moved by hand, commits made up."""

import pytest

from glamd.keys.throttle import (
    BASELINE_LEAST,
    DECIDE_SAMPLES,
    IDLE_S,
    PAUSE_MOST_S,
    REST_EVERY_S,
    REST_S,
    ROWS_LEAST,
    ROWS_MOST,
    SPEED_FIRST,
    SPEED_LEAST,
    SPEED_STEP,
    Throttle,
)
from tests.support.settable_clock import SettableClock

CALM_S = 0.002
BATCH_S = 0.020


@pytest.fixture
def clock() -> SettableClock:
    """A clock that stands."""
    return SettableClock()


@pytest.fixture
def throttle(clock: SettableClock) -> Throttle:
    """A throttle that has seen traffic at rest."""
    made = Throttle(clock, first=1.0)
    commits(made, clock, CALM_S, count=BASELINE_LEAST * 4)
    return made


def commits(throttle: Throttle, clock: SettableClock, seconds: float, *, count: int) -> None:
    """So many commits, one after the other."""
    for _ in range(count):
        clock.advance(seconds)
        throttle.observe(seconds)


def batch(
    throttle: Throttle, clock: SettableClock, commit_s: float, *, count: int = DECIDE_SAMPLES
) -> float:
    """A batch under which traffic commits so; the rest that follows it, which is taken."""
    throttle.begin()
    clock.advance(BATCH_S)
    for _ in range(count):
        throttle.observe(commit_s)
    pause_s = throttle.end()
    clock.advance(pause_s)
    return pause_s


def test_traffic_that_suffers_halves_the_batches_again_and_again_down_to_a_floor(
    throttle: Throttle, clock: SettableClock
) -> None:
    rows = []
    for _ in range(10):
        batch(throttle, clock, 2 * CALM_S)
        rows.append(throttle.rows)
    assert rows[:4] == [250, 125, 62, ROWS_LEAST]
    assert rows[-1] == ROWS_LEAST
    assert throttle.speed == SPEED_LEAST


def test_beside_traffic_it_begins_slowly_each_time_that_there_is_some(
    clock: SettableClock,
) -> None:
    throttle = Throttle(clock)
    commits(throttle, clock, CALM_S, count=BASELINE_LEAST)
    assert throttle.speed == 1.0
    for _ in range(2):
        batch(throttle, clock, CALM_S)
        assert throttle.speed == pytest.approx(SPEED_FIRST + SPEED_STEP)
        clock.advance(IDLE_S)
        batch(throttle, clock, CALM_S, count=0)
        assert throttle.speed == 1.0
        commits(throttle, clock, CALM_S, count=1)


def test_there_are_rests_only_when_batches_cannot_become_smaller(
    throttle: Throttle, clock: SettableClock
) -> None:
    pauses = [batch(throttle, clock, 2 * CALM_S) for _ in range(5)]
    assert pauses[:3] == [0.0, 0.0, 0.0]
    # 31.25 rows are wanted and then 15.6, where a batch has 32.
    assert pauses[3:] == pytest.approx([BATCH_S * (32 / 31.25 - 1), BATCH_S * (32 / 15.625 - 1)])


def test_the_speed_comes_back_little_by_little_once_traffic_is_well(
    throttle: Throttle, clock: SettableClock
) -> None:
    batch(throttle, clock, 2 * CALM_S)
    batch(throttle, clock, CALM_S)
    assert throttle.speed == pytest.approx(0.5 + SPEED_STEP)
    for _ in range(30):
        batch(throttle, clock, CALM_S)
    assert throttle.speed == pytest.approx(1.0)
    assert throttle.rows == ROWS_MOST


def test_without_traffic_it_goes_at_full_speed_at_once(
    throttle: Throttle, clock: SettableClock
) -> None:
    for _ in range(8):
        batch(throttle, clock, 5 * CALM_S)
    clock.advance(IDLE_S)
    assert throttle.is_idle
    assert batch(throttle, clock, CALM_S, count=0) == 0.0
    assert throttle.speed == 1.0


def test_where_there_never_was_traffic_it_never_rests(clock: SettableClock) -> None:
    throttle = Throttle(clock)
    for _ in range(1000):
        assert batch(throttle, clock, 0.0, count=0) == 0.0


def test_a_work_that_begins_amid_traffic_rests_until_it_knows_what_is_normal(
    clock: SettableClock,
) -> None:
    throttle = Throttle(clock, first=1.0)
    assert batch(throttle, clock, 50 * CALM_S) == REST_S
    assert batch(throttle, clock, 50 * CALM_S) == REST_S
    commits(throttle, clock, CALM_S, count=BASELINE_LEAST)
    batch(throttle, clock, 50 * CALM_S)
    assert throttle.speed == 0.5


def test_a_commit_that_began_under_the_work_does_not_count_as_normal(clock: SettableClock) -> None:
    throttle = Throttle(clock)
    throttle.begin()
    throttle.observe(CALM_S)
    throttle.end()
    clock.advance(CALM_S)
    for _ in range(BASELINE_LEAST):
        throttle.observe(10 * CALM_S)
    assert batch(throttle, clock, 10 * CALM_S) == REST_S


def test_too_few_commits_decide_nothing(throttle: Throttle, clock: SettableClock) -> None:
    batch(throttle, clock, 100 * CALM_S, count=DECIDE_SAMPLES - 1)
    assert throttle.speed == 1.0


@pytest.mark.parametrize(("slow", "speed"), [(2, 1.0), (3, 0.5)])
def test_two_slow_commits_among_fifty_are_chance_and_three_are_not(
    throttle: Throttle, clock: SettableClock, slow: int, speed: float
) -> None:
    throttle.begin()
    clock.advance(BATCH_S)
    for number in range(DECIDE_SAMPLES):
        throttle.observe(100 * CALM_S if number < slow else CALM_S)
    throttle.end()
    assert throttle.speed == speed


def test_it_looks_again_now_and_then_what_traffic_is_like_without_it(
    throttle: Throttle, clock: SettableClock
) -> None:
    clock.advance(REST_EVERY_S)
    throttle.observe(CALM_S)
    assert batch(throttle, clock, CALM_S) == REST_S
    assert batch(throttle, clock, CALM_S) < REST_S


def test_traffic_that_is_slow_without_it_as_well_does_not_stop_it(
    throttle: Throttle, clock: SettableClock
) -> None:
    for _ in range(10):
        batch(throttle, clock, 10 * CALM_S)
    assert throttle.speed == SPEED_LEAST
    commits(throttle, clock, 10 * CALM_S, count=256)
    for _ in range(60):
        batch(throttle, clock, 10 * CALM_S)
    assert throttle.speed > 0.9


def test_a_batch_that_took_ages_is_not_followed_by_a_rest_of_ages(
    throttle: Throttle, clock: SettableClock
) -> None:
    for _ in range(10):
        batch(throttle, clock, 10 * CALM_S)
    throttle.begin()
    clock.advance(5.0)
    throttle.observe(10 * CALM_S)
    assert throttle.end() == PAUSE_MOST_S
