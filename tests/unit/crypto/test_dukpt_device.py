"""The host's derivation is the device's: the same keys for the same counters, step by step.

The device is the register machine of `tests.support.dukpt_device`, which shares no line with what
is tested here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glamd.crypto import dukpt, dukpt_aes, dukpt_tdes
from glamd.crypto.counter_tree import CounterRule
from tests.support.dukpt_device import AesDevice, ExhaustedError, TdesDevice

REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=30)
STEPS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One scheme with one length of key."""

    scheme: str
    key_bytes: int
    key_id_bytes: int
    rule: CounterRule
    device: Callable[[bytes, bytes], TdesDevice | AesDevice]
    host: Callable[[bytes, bytes], dukpt_tdes.Deriver | dukpt_aes.Deriver]

    def key_id(self, seed: bytes) -> bytes:
        """An id as this scheme has it, out of any bytes enough."""
        ksn = seed[: dukpt.ksn_length_bytes(self.scheme)]
        return dukpt.initial_key_id(self.scheme, ksn)


TDES = Kind(
    scheme=dukpt.TDES_DUKPT,
    key_bytes=16,
    key_id_bytes=10,
    rule=dukpt_tdes.COUNTERS,
    device=TdesDevice,
    host=dukpt_tdes.Deriver,
)
AES = tuple(
    Kind(
        scheme=dukpt.AES_DUKPT,
        key_bytes=key_bytes,
        key_id_bytes=8,
        rule=dukpt_aes.COUNTERS,
        device=AesDevice,
        host=dukpt_aes.Deriver,
    )
    for key_bytes in (16, 24, 32)
)
KINDS = [pytest.param(kind, id=f"{kind.scheme}-{kind.key_bytes}") for kind in (TDES, *AES)]
KEY = bytes(range(32))
SERIAL = bytes.fromhex("FFFF9876543210E012345678")


def valid_counters(rule: CounterRule) -> st.SearchStrategy[int]:
    """Counters that a device may use, any number of ones being as likely as any other."""
    bits = st.integers(0, rule.width_bits - 1)
    return st.sets(bits, min_size=1, max_size=rule.ones_limit).map(lambda s: sum(1 << b for b in s))


def walk(kind: Kind, key: bytes, key_id: bytes, *, start: int, steps: int) -> int:
    """Takes up to `steps` keys from a device at `start` and compares each with the host's.

    The counters must be those that `next_counter` names; the device must cease where it ends.
    """
    device = kind.device(key, key_id)
    device.skip_to(start)
    remembering = kind.host(key, key_id)
    expected: int | None = start
    for taken in range(steps):
        if expected is None:
            with pytest.raises(ExhaustedError):
                device.take()
            return taken
        counter, device_key = device.take()
        assert counter == expected
        assert remembering.transaction_key(counter) == device_key
        assert kind.host(key, key_id).transaction_key(counter) == device_key
        expected = dukpt.next_counter(kind.scheme, counter)
    return steps


@pytest.mark.parametrize("kind", KINDS)
def test_from_its_first_counter_on_the_device_has_the_hosts_keys(kind: Kind) -> None:
    key_id = kind.key_id(SERIAL)
    assert walk(kind, KEY[: kind.key_bytes], key_id, start=1, steps=300) == 300


@pytest.mark.parametrize("kind", KINDS)
@REPEATABLE
@given(data=st.data())
def test_from_any_counter_on_the_device_has_the_hosts_keys(kind: Kind, data: st.DataObject) -> None:
    key = data.draw(st.binary(min_size=kind.key_bytes, max_size=kind.key_bytes))
    key_id = kind.key_id(data.draw(st.binary(min_size=12, max_size=12)))
    start = data.draw(valid_counters(kind.rule))
    walk(kind, key, key_id, start=start, steps=STEPS)


@pytest.mark.parametrize("kind", KINDS)
@REPEATABLE
@given(data=st.data())
def test_over_a_rollover_the_device_has_the_hosts_keys(kind: Kind, data: st.DataObject) -> None:
    """As many ones as there may be, so that the next counters are skipped and a carry runs."""
    ones = kind.rule.ones_limit
    shift = data.draw(st.integers(0, kind.rule.width_bits - ones))
    start = (1 << ones) - 1 << shift
    walk(kind, KEY[: kind.key_bytes], kind.key_id(SERIAL), start=start, steps=STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_ceases_where_the_host_says_that_counters_end(kind: Kind) -> None:
    ones, width = kind.rule.ones_limit, kind.rule.width_bits
    start = (1 << ones - 1) - 1 << width - ones + 1
    left = walk(kind, KEY[: kind.key_bytes], kind.key_id(SERIAL), start=start, steps=100)
    assert left == 1 + (width - ones + 1), "itself, and each place of the last one bit"


@pytest.mark.parametrize("kind", KINDS)
def test_walking_there_and_skipping_there_give_one_device_the_same_keys(kind: Kind) -> None:
    """What the tests above take for granted when they begin in the middle."""
    key, key_id = KEY[: kind.key_bytes], kind.key_id(SERIAL)
    walked, skipped = kind.device(key, key_id), kind.device(key, key_id)
    for _ in range(0b1011010 - 1):
        walked.take()
    skipped.skip_to(0b1011010)
    for _ in range(60):
        assert walked.take() == skipped.take()


@pytest.mark.parametrize("kind", KINDS)
@REPEATABLE
@given(data=st.data())
def test_out_of_order_counters_get_the_keys_that_an_empty_memory_gives(
    kind: Kind, data: st.DataObject
) -> None:
    key, key_id = KEY[: kind.key_bytes], kind.key_id(SERIAL)
    remembering = kind.host(key, key_id)
    anywhere = valid_counters(kind.rule)
    close = st.integers(1, 40)
    for counter in data.draw(st.lists(st.one_of(anywhere, close), max_size=15)):
        fresh = kind.host(key, key_id)
        assert remembering.transaction_key(counter) == fresh.transaction_key(counter)
        assert remembering.held_keys <= kind.rule.width_bits


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_another_device_are_different(kind: Kind) -> None:
    key = KEY[: kind.key_bytes]
    one = kind.host(key, kind.key_id(SERIAL))
    # The lowest bit of the id that is not counter.
    other_serial = int.from_bytes(SERIAL[: kind.key_id_bytes], "big") + (1 << 21)
    other = kind.host(key, kind.key_id(other_serial.to_bytes(kind.key_id_bytes, "big") + bytes(4)))
    assert one.transaction_key(1) != other.transaction_key(1)
