"""Components: what is refused before a key comes of them, and that the right ones make it."""

import functools
import operator
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.crypto import dukpt
from glamd.crypto.blocks import odd_parity
from glamd.crypto.dukpt import AES_DUKPT, TDES_DUKPT, key_check_value
from glamd.errors import InputError
from glamd.keys.key_sets import ceremony
from glamd.keys.key_sets.ceremony import Component

TDES_BDK = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
FIRST = bytes.fromhex("1C587F1CD8F5E3B92A4D6E0851AB91C7")


def xor(*parts: bytes) -> bytes:
    return bytes(functools.reduce(operator.xor, column) for column in zip(*parts, strict=True))


NAMES = ("Ann", "Ben", "Cem", "Dua")


def component(key: bytes, scheme: str, *, holder: str = "") -> Component:
    return Component(holder, key, key_check_value(key, scheme))


def named(components: Sequence[Component]) -> list[Component]:
    """Each typed by another person, where nothing else is said."""
    return [
        replace(one, holder=one.holder or name)
        for one, name in zip(components, NAMES, strict=False)
    ]


def combined(components: Sequence[Component], scheme: str) -> bytes:
    return ceremony.combine(named(components), ceremony.bdk_ceremony(scheme))


def fields(error: InputError) -> list[str]:
    return [one.field for one in error.fields]


def refused(components: Sequence[Component], scheme: str = TDES_DUKPT) -> list[str]:
    with pytest.raises(InputError) as raised:
        combined(components, scheme)
    for one in components:
        assert not one.key or one.key.hex().lower() not in str(raised.value).lower()
        assert not one.key or one.key.hex().lower() not in repr(one).lower()
    return fields(raised.value)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_two_or_three_components_make_a_key_and_no_other_number(count: int) -> None:
    parts = [component(bytes([2 * n + 2]) * 16, TDES_DUKPT) for n in range(count)]
    assert refused(parts) == ["components"]


@pytest.mark.parametrize("name", ["", "  ", "a" * 65, "a\nb", "\x1b[2J", "\0"])
def test_what_is_no_name_is_refused(name: str) -> None:
    parts = [replace(component(FIRST, TDES_DUKPT), holder="Ann")]
    parts += [replace(component(TDES_BDK, TDES_DUKPT), holder=name)]
    with pytest.raises(InputError) as raised:
        ceremony.combine(parts, ceremony.bdk_ceremony(TDES_DUKPT))
    assert fields(raised.value) == ["components.1.holder"]


@pytest.mark.parametrize("again", ["Ann Lee", "ann lee", " ANN  LEE ", "\uff21nn Lee"])
def test_nobody_types_two_components_however_the_name_is_written(again: str) -> None:
    parts = [component(FIRST, TDES_DUKPT, holder="Ann Lee"), component(TDES_BDK, TDES_DUKPT)]
    parts += [component(bytes(range(2, 18)), TDES_DUKPT, holder=again)]
    assert refused(parts) == ["components.2.holder"]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_mistyped_check_value_is_named_by_its_component(position: int) -> None:
    components = [component(bytes([n]) * 16, TDES_DUKPT) for n in (2, 4, 7)]
    components[position] = replace(components[position], kcv="000000")
    assert refused(components) == [f"components.{position}.kcv"]


@pytest.mark.parametrize(
    "typed", ["", "ABC", "08D7B4FF", "zzzzzz", "\ud800", "\uff10\uff18D7B4", "08D7B"]
)
def test_a_check_value_of_another_form_does_not_fit(typed: str) -> None:
    components = [component(FIRST, TDES_DUKPT), Component("", TDES_BDK, typed)]
    assert refused(components) == ["components.1.kcv"]


def test_a_check_value_may_be_typed_in_small_letters_with_blanks() -> None:
    typed = f" {key_check_value(FIRST, TDES_DUKPT).lower()}\n"
    combined([Component("", FIRST, typed), component(TDES_BDK, TDES_DUKPT)], TDES_DUKPT)


def test_components_of_different_lengths_are_refused() -> None:
    components = [component(bytes([n]) * n, AES_DUKPT) for n in (16, 24)]
    assert refused(components, AES_DUKPT) == ["components.1"]


@pytest.mark.parametrize(("scheme", "length"), [(TDES_DUKPT, 8), (TDES_DUKPT, 24), (AES_DUKPT, 15)])
def test_a_length_that_the_scheme_does_not_have_is_refused(scheme: str, length: int) -> None:
    parts = [Component("", b"\x01" * length, ""), Component("", b"\x02" * length, "")]
    assert refused(parts, scheme) == ["components.0"]


def test_an_unknown_scheme_is_refused() -> None:
    assert refused([Component("", FIRST, ""), Component("", TDES_BDK, "")], "rot13") == ["scheme"]


@pytest.mark.parametrize("zero", [bytes(16), b"\1" * 16, bytes(15) + b"\1"])
def test_a_zero_component_is_refused_since_the_others_would_be_the_key(zero: bytes) -> None:
    components = [component(FIRST, TDES_DUKPT), component(zero, TDES_DUKPT)]
    assert refused(components) == ["components.1"]


def test_the_same_component_twice_is_refused_whoever_types_it() -> None:
    assert refused([component(FIRST, TDES_DUKPT)] * 2) == ["components.1"]
    other_parity = bytes(byte ^ 1 for byte in FIRST)
    parts = [FIRST, TDES_BDK, other_parity]
    assert refused([component(one, TDES_DUKPT) for one in parts]) == ["components.2"]


def test_components_that_come_to_nothing_together_are_refused() -> None:
    parts = [FIRST, TDES_BDK, xor(FIRST, TDES_BDK)]
    assert refused([component(one, TDES_DUKPT) for one in parts]) == ["components"]
    assert refused([component(one, AES_DUKPT) for one in parts], AES_DUKPT) == ["components"]


def test_two_components_of_a_published_key_give_its_published_initial_key() -> None:
    second = xor(TDES_BDK, FIRST)
    parts = [component(FIRST, TDES_DUKPT), component(second, TDES_DUKPT)]
    made = combined(parts, TDES_DUKPT)
    assert made == TDES_BDK
    assert key_check_value(made, TDES_DUKPT) == "08D7B4"
    ik = dukpt.initial_key(TDES_DUKPT, made, bytes.fromhex("FFFF9876543210E00000"))
    assert ik.hex().upper() == "6AC292FAA1315B4D858AB3A3D7D5933A"


AES_KEYS = st.sampled_from([16, 24, 32]).flatmap(
    lambda length: st.lists(st.binary(min_size=length, max_size=length), min_size=2, max_size=3)
)


@given(
    parts=AES_KEYS.filter(
        lambda parts: all(map(any, parts)) and any(xor(*parts)) and len(set(parts)) == len(parts)
    )
)
def test_an_aes_key_is_the_xor_of_its_components_in_any_order(parts: list[bytes]) -> None:
    components = [component(part, AES_DUKPT) for part in parts]
    assert combined(components, AES_DUKPT) == xor(*parts)
    assert combined(components[::-1], AES_DUKPT) == xor(*parts)


@given(key=st.binary(min_size=16, max_size=16))
def test_odd_parity_changes_lowest_bits_only_and_no_derived_key(key: bytes) -> None:
    normal = odd_parity(key)
    assert all(byte.bit_count() % 2 == 1 for byte in normal)
    assert all((one ^ other) <= 1 for one, other in zip(key, normal, strict=True))
    assert odd_parity(normal) == normal
    assert key_check_value(key, TDES_DUKPT) == key_check_value(normal, TDES_DUKPT)
    ksn = bytes.fromhex("FFFF9876543210E00000")
    assert dukpt.initial_key(TDES_DUKPT, key, ksn) == dukpt.initial_key(TDES_DUKPT, normal, ksn)
