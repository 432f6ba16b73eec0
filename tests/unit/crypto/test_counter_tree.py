"""Which counters exist, and that remembered keys are the right ones, few, and worth it.

Keys are symbols here: the key of a counter is the way to it, written down.
"""

import gc
from itertools import count
from math import comb
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glamd.crypto import dukpt_aes, dukpt_tdes
from glamd.crypto.counter_tree import CounterRule, KeyTree
from glamd.errors import CryptoError, InputError

RULES = (dukpt_tdes.COUNTERS, dukpt_aes.COUNTERS)
REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=80)


def valid_counters(rule: CounterRule) -> st.SearchStrategy[int]:
    """Counters that a device may use, any number of ones being as likely as any other."""
    bits = st.integers(0, rule.width_bits - 1)
    return st.sets(bits, min_size=1, max_size=rule.ones_limit).map(lambda s: sum(1 << b for b in s))


def way_to(counter: int) -> bytes:
    """The symbol that is the key of this counter: its ancestors and itself, from the root down."""
    ancestors = []
    while counter:
        ancestors.append(counter)
        counter &= counter - 1
    return b"root" + b"".join(b">%x" % ancestor for ancestor in reversed(ancestors))


class Steps:
    """Derives symbols and counts how often it was asked to."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, key: bytes, counter: int) -> bytes:
        self.taken += 1
        return key + b">%x" % counter


# ---- which counters there are


@pytest.mark.parametrize("rule", RULES)
def test_counters_a_device_must_skip_are_refused(rule: CounterRule) -> None:
    tree = KeyTree(rule, b"root", Steps())
    too_many_ones = (1 << rule.ones_limit + 1) - 1
    for counter in (0, -1, too_many_ones, too_many_ones << 1, 1 << rule.width_bits, 1 << 64):
        assert not rule.valid(counter)
        with pytest.raises(InputError) as caught:
            tree.key_at(counter)
        assert caught.value.code == "KSN_INVALID"
        assert [error.field for error in caught.value.fields] == ["ksn"]
    assert len(tree) == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_counter_at_the_limit_of_ones_is_the_last_that_counts(rule: CounterRule) -> None:
    at_limit = (1 << rule.ones_limit) - 1
    assert rule.valid(at_limit)
    assert rule.next_after(at_limit) == at_limit + 1
    assert rule.next_after(at_limit << 1) == (at_limit + 1) << 1, "the ones between are skipped"


@pytest.mark.parametrize("rule", RULES)
def test_the_counters_end(rule: CounterRule) -> None:
    last = (1 << rule.ones_limit) - 1 << rule.width_bits - rule.ones_limit
    assert rule.valid(last)
    assert rule.next_after(last) is None
    assert rule.next_after(last + 1) is None
    assert rule.next_after(1 << rule.width_bits) is None


@REPEATABLE
@given(width_bits=st.integers(1, 9), ones_limit=st.integers(1, 9))
def test_walking_meets_every_valid_counter_once(width_bits: int, ones_limit: int) -> None:
    rule = CounterRule(width_bits=width_bits, ones_limit=ones_limit)
    everyone = [n for n in range(1, 1 << width_bits) if n.bit_count() <= ones_limit]
    walked = []
    counter = rule.next_after(0)
    while counter is not None:
        walked.append(counter)
        counter = rule.next_after(counter)
    assert walked == everyone
    assert len(walked) == sum(comb(width_bits, k) for k in range(1, ones_limit + 1))


@REPEATABLE
@given(counter=st.integers(-3, 1 << 10))
def test_from_a_counter_no_device_has_the_next_is_still_the_smallest_valid_one(
    counter: int,
) -> None:
    rule = CounterRule(width_bits=9, ones_limit=3)
    above = (n for n in range(max(counter, 0) + 1, 1 << 9) if rule.valid(n))
    assert rule.next_after(counter) == next(above, None)


# ---- the keys


@pytest.mark.parametrize("rule", RULES)
def test_every_counter_in_sequence_costs_one_step(rule: CounterRule) -> None:
    steps = Steps()
    tree = KeyTree(rule, b"root", steps)
    counter: int | None = 0
    for taken in range(1, 3000):
        assert counter is not None
        counter = rule.next_after(counter)
        assert counter is not None
        assert tree.key_at(counter) == way_to(counter)
        assert steps.taken == taken


def test_the_same_counter_again_costs_nothing() -> None:
    steps = Steps()
    tree = KeyTree(dukpt_tdes.COUNTERS, b"root", steps)
    tree.key_at(0x155555 & 0xFFF)
    before = steps.taken
    assert tree.key_at(0x155555 & 0xFFF) == way_to(0x155555 & 0xFFF)
    assert steps.taken == before


@pytest.mark.parametrize("rule", RULES)
def test_no_counter_costs_more_steps_than_it_has_ones(rule: CounterRule) -> None:
    random = Random(1)
    steps = Steps()
    tree = KeyTree(rule, b"root", steps)
    for _ in range(500):
        ones = random.randint(1, rule.ones_limit)
        counter = sum(1 << bit for bit in random.sample(range(rule.width_bits), ones))
        before = steps.taken
        assert tree.key_at(counter) == way_to(counter)
        assert steps.taken - before <= ones


@pytest.mark.parametrize("rule", RULES)
@REPEATABLE
@given(data=st.data())
def test_counters_in_any_order_get_their_own_keys_and_the_memory_stays_bounded(
    rule: CounterRule, data: st.DataObject
) -> None:
    tree = KeyTree(rule, b"root", Steps())
    near = st.integers(1, 64)
    for counter in data.draw(st.lists(st.one_of(valid_counters(rule), near), max_size=40)):
        assert tree.key_at(counter) == way_to(counter)
        assert len(tree) <= rule.width_bits


def test_memory_is_bounded_by_the_bits_when_every_bit_was_used() -> None:
    rule = dukpt_tdes.COUNTERS
    tree = KeyTree(rule, b"root", Steps())
    for bit in range(rule.width_bits):
        tree.key_at(1 << bit)
    assert len(tree) == rule.width_bits
    for counter in range(1, 512):
        tree.key_at(counter)
    assert len(tree) == rule.width_bits


def test_a_step_that_fails_leaves_nothing_wrong_behind() -> None:
    calls = count()

    def failing(key: bytes, counter: int) -> bytes:
        if next(calls) == 1:
            raise RuntimeError("the second step")
        return key + b">%x" % counter

    tree = KeyTree(dukpt_tdes.COUNTERS, b"root", failing)
    with pytest.raises(RuntimeError):
        tree.key_at(0b111)
    assert tree.key_at(0b111) == way_to(0b111)


def test_after_forget_there_are_no_keys_any_more() -> None:
    tree = KeyTree(dukpt_tdes.COUNTERS, b"root", Steps())
    tree.key_at(3)
    tree.forget()
    assert len(tree) == 0
    with pytest.raises(CryptoError):
        tree.key_at(3)


def test_forgetting_overwrites_what_was_held_and_not_only_drops_it() -> None:
    tree = KeyTree(dukpt_tdes.COUNTERS, b"root", Steps())
    tree.key_at(3)
    tree.key_at(4)
    within = gc.get_referents(tree)
    keys = [each for each in within if isinstance(each, bytearray)]
    keys += [key for each in within if isinstance(each, dict) for _, key in each.values()]
    assert len(keys) == 1 + len(tree)
    assert all(any(key) for key in keys)
    tree.forget()
    assert not any(any(key) for key in keys)


def test_a_tree_does_not_show_its_keys() -> None:
    tree = KeyTree(dukpt_tdes.COUNTERS, b"root", Steps())
    tree.key_at(3)
    assert "root" not in repr(tree)
