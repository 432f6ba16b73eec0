"""BER-TLV from hostile terminals: refused with a reason or read exactly, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.errors import InputError
from glamd.payments import tlv
from tests.support.cost import steps

PAN, TRACK2, NAME = 0x5A, 0x57, 0x5F20
WANTED = frozenset({PAN, TRACK2, NAME})


def read(data: bytes | bytearray) -> dict[int, bytes]:
    return {tag: bytes(value) for tag, value in tlv.find(data, WANTED).items()}


def attempt(data: bytes) -> dict[int, bytes] | InputError:
    try:
        return read(data)
    except InputError as error:
        return error


def found(hexed: str) -> dict[int, str]:
    return {tag: value.hex() for tag, value in read(bytes.fromhex(hexed)).items()}


@pytest.mark.parametrize(
    ("hexed", "reason"),
    [
        ("5a", "cut short"),
        ("5a02", "cut short"),
        ("5a0211", "cut short"),
        ("5f", "cut short"),
        ("9f26", "cut short"),
        ("5a81", "cut short"),
        ("5a8201", "cut short"),
        ("7005 5a0411", "cut short"),
        ("7003 5a0411 1111", "cut short"),
        ("7002 5a82 0001 11", "cut short"),
        ("5a8011 0000", "indefinite length"),
        ("7080 5a0111 0000", "indefinite length"),
        ("5a83000001 11", "length that is too long"),
        ("5aff 11", "length that is too long"),
        ("9fffffffff01 0111", "tag that is too long"),
        ("5a0111 5a0111", "tag twice"),
        ("5a0111 7003 5a0112", "tag twice"),
        ("7003 5a0111 7003 5a0112", "tag twice"),
    ],
)
def test_what_is_not_sound_is_refused_with_its_reason(hexed: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as raised:
        found(hexed)
    assert raised.value.code == "DECRYPT_FAILED"


def test_templates_nested_past_the_limit_are_refused() -> None:
    inside = b"\x5a\x01\x11"
    for _ in range(tlv.MAX_DEPTH):
        inside = b"\x70" + bytes([len(inside)]) + inside
    assert read(inside) == {PAN: b"\x11"}
    inside = b"\x70" + bytes([len(inside)]) + inside
    with pytest.raises(InputError, match="nested too deep"):
        tlv.find(inside, WANTED)


def test_more_objects_than_the_limit_are_refused() -> None:
    assert tlv.find(b"\x82\x00" * tlv.MAX_OBJECTS, WANTED) == {}
    with pytest.raises(InputError, match="too many objects"):
        tlv.find(b"\x82\x00" * (tlv.MAX_OBJECTS + 1), WANTED)


def test_more_bytes_than_the_limit_are_refused_unread() -> None:
    assert tlv.find(bytes(tlv.MAX_BYTES), WANTED) == {}
    with pytest.raises(InputError, match="too long"):
        tlv.find(bytes(tlv.MAX_BYTES + 1), WANTED)


@pytest.mark.parametrize(
    "hexed",
    [
        "5a0111",
        "00 00 5a0111",
        "5a0111 00 00 00 00 00",
        "8200 00 5a0111",
        "7005 00 5a0111 00",
        "5a8101 11",
        "5a820001 11",
        "9f26020102 5a0111",
        "5f340100 5a0111",
        "5a0111 5a00",
        "5a00 5a0111",
        "9f2600 9f2600 5a0111",
    ],
)
def test_padding_long_forms_and_foreign_tags_are_read_past(hexed: str) -> None:
    assert found(hexed) == {PAN: "11"}


def test_a_zero_inside_a_value_is_no_padding() -> None:
    assert found("5a03001100 5f2002 0041") == {PAN: "001100", NAME: "0041"}


def test_a_tag_inside_another_value_is_not_found() -> None:
    assert found("9f10035a0111") == {}


def test_the_values_are_views_that_go_with_the_buffer() -> None:
    clear = bytearray.fromhex("5a021122")
    value = tlv.find(clear, WANTED)[PAN]
    clear[:] = bytes(len(clear))
    assert bytes(value) == b"\x00\x00"


@given(st.binary(max_size=512))
def test_hostile_bytes_are_read_or_refused_and_nothing_else(data: bytes) -> None:
    outcome = attempt(data)
    if isinstance(outcome, InputError):
        assert outcome.code == "DECRYPT_FAILED"
    else:
        assert all(value in data for value in outcome.values())


def encoded(tag: str, value: bytes) -> bytes:
    size = len(value)
    length = bytes([size]) if size < 0x80 else b"\x82" + size.to_bytes(2, "big")
    return bytes.fromhex(tag) + length + value


objects = st.recursive(
    st.tuples(st.sampled_from(["9f26", "82", "df8129", "9f06"]), st.binary(max_size=200)).map(
        lambda pair: encoded(*pair)
    ),
    lambda inner: st.tuples(
        st.sampled_from(["70", "77", "bf0c", "ff8105"]), st.lists(inner, max_size=4).map(b"".join)
    ).map(lambda pair: encoded(*pair)),
    max_leaves=12,
)


@given(before=st.lists(objects, max_size=3), after=st.lists(objects, max_size=3), pan=st.binary())
def test_a_tag_is_found_whatever_sound_objects_stand_around_it(
    before: list[bytes], after: list[bytes], pan: bytes
) -> None:
    data = b"\x00".join([*before, encoded("5a", b"\x41" + pan), *after]) + bytes(7)
    outcome = attempt(data)
    if isinstance(outcome, InputError):
        assert "nested too deep" in outcome.message
    else:
        assert outcome == {PAN: b"\x41" + pan}


@given(before=objects, cut=st.integers(min_value=1))
def test_every_cut_of_a_value_is_refused(before: bytes, cut: int) -> None:
    last = encoded("5a", b"\x41" * 9)
    with pytest.raises(InputError):
        tlv.find(before + last[: len(last) - 1 - cut % (len(last) - 1)], WANTED)


@pytest.mark.parametrize(
    "worst",
    [
        bytes(tlv.MAX_BYTES),
        b"\x70\x82\x3f\xfc" + bytes(tlv.MAX_BYTES - 4),
        b"\x5f" + b"\xff" * (tlv.MAX_BYTES - 1),
    ],
    ids=["padding", "padding in a template", "one long tag"],
)
def test_the_longest_input_takes_no_more_than_linear_time(worst: bytes) -> None:
    # The slowest takes 80,000. A quadratic reader needs 16,384² / 2 each time.
    assert steps(lambda: attempt(worst)) < 2_000_000
