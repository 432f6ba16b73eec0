"""Deadlines on the wheel: late by a tick at most, never early, and one each."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_gateway.mqtt.wheel import NOWHERE, Wheel
from tests.support.settable_clock import SettableClock


class Item:
    """Remembers when it was called."""

    def __init__(self, then: Callable[[float], float | None] = lambda _: None) -> None:
        self.wheel_slot = NOWHERE
        self.called_s: list[float] = []
        self._then = then

    def due(self, now_s: float) -> float | None:
        self.called_s.append(now_s)
        return self._then(now_s)


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock()


@pytest.fixture
def wheel(clock: SettableClock) -> Wheel:
    return Wheel(clock, tick_s=0.25)


def test_an_items_fault_does_not_cost_the_others_their_deadline(
    wheel: Wheel, clock: SettableClock
) -> None:
    def fail(_: float) -> float | None:
        raise RuntimeError("a bug")

    broken, good = Item(fail), Item()
    wheel.set_after(broken, 1)
    wheel.set_after(good, 1)
    clock.advance(1.25)
    wheel.turn()
    assert (len(broken.called_s), len(good.called_s)) == (1, 1)
    assert len(wheel) == 0


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.floats(0.001, 3))
def test_nothing_is_early_and_nothing_later_than_a_tick(delays: list[float], step: float) -> None:
    clock = SettableClock()
    wheel = Wheel(clock, tick_s=0.25)
    items = [Item() for _ in delays]
    deadlines = [wheel.set_after(item, delay) for item, delay in zip(items, delays, strict=True)]
    turns = 0
    while len(wheel):
        clock.advance(step)
        wheel.turn()
        turns += 1
        assert turns < 110_000
    for item, at_s in zip(items, deadlines, strict=True):
        (called_s,) = item.called_s
        assert at_s <= called_s <= at_s + max(0.25, step) + 0.25 + step


def test_a_long_pause_calls_everything_once(wheel: Wheel, clock: SettableClock) -> None:
    items = [Item() for _ in range(50)]
    for number, item in enumerate(items):
        wheel.set_after(item, number)
    clock.advance(7 * 24 * 3600)
    wheel.turn()
    assert all(len(item.called_s) == 1 for item in items)


def test_an_item_that_gives_a_next_deadline_stays(wheel: Wheel, clock: SettableClock) -> None:
    item = Item(lambda now_s: now_s + 1)
    wheel.set_after(item, 1)
    for _ in range(8):
        clock.advance(1.25)
        wheel.turn()
    assert 4 <= len(item.called_s) <= 8
    assert len(wheel) == 1


def test_setting_moves_and_sooner_only_moves_forward(wheel: Wheel, clock: SettableClock) -> None:
    item = Item()
    now_s = clock.monotonic_s()
    wheel.set(item, now_s + 1)
    wheel.set(item, now_s + 5)
    wheel.set_sooner(item, now_s + 9)
    clock.advance(4)
    wheel.turn()
    assert item.called_s == []
    wheel.set_sooner(item, now_s + 4.5)
    clock.advance(0.75)
    wheel.turn()
    assert len(item.called_s) == 1
    wheel.set_sooner(item, now_s + 20)
    assert len(wheel) == 1
    wheel.drop(item)
    wheel.drop(item)
    assert len(wheel) == 0


def test_an_item_may_drop_its_neighbour_and_set_itself(wheel: Wheel, clock: SettableClock) -> None:
    neighbour = Item()

    def act(_: float) -> float | None:
        wheel.drop(neighbour)
        wheel.set_after(first, 10)
        return None

    first = Item(act)
    wheel.set_after(first, 1)
    wheel.set_after(neighbour, 1)
    clock.advance(2)
    wheel.turn()
    assert neighbour.called_s == []
    assert len(wheel) == 1
