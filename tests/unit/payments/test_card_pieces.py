"""More than one buffer of one card, keyed-in cards, what is kept and what is left in memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.errors import InputError
from glamd.payments.card import Masked, Piece, parse, read
from glamd.payments.card_forms import Form
from glamd.payments.model import Format
from tests.support.clear_cards import (
    AMEX,
    FORMATS,
    VISA,
    attempt,
    chip,
    fields,
    pans,
    refused,
)

TRACK1 = "%B4111111111111111^DOE/JANE^25122010000012345?"
TRACK2 = ";4111111111111111=25122010000012345?"


@pytest.mark.parametrize("form", ["track1", "track2"])
@pytest.mark.parametrize("check", ["", "!", ";", "?"])
def test_two_tracks_in_one_block_are_one_card(form: Format, check: str) -> None:
    clear = bytearray((TRACK1 + check + TRACK2 + check).encode() + bytes(5))
    assert fields(parse(form, clear)) == (VISA, "2512", "DOE/JANE", "201")


@pytest.mark.parametrize(
    ("track1", "track2", "reason"),
    [
        (TRACK1, TRACK2.replace("4111111111111111", "4012888888881881"), "two card numbers"),
        (TRACK1, TRACK2.replace("=2512", "=2612"), "expiries that differ"),
    ],
)
def test_two_tracks_that_differ_are_refused_in_one_block_or_two(
    track1: str, track2: str, reason: str
) -> None:
    assert reason in refused("track1", (track1 + track2).encode())
    pieces = [
        Piece("track1", bytearray(track1.encode())),
        Piece("track2", bytearray(track2.encode())),
    ]
    with pytest.raises(InputError, match=reason):
        read(pieces)


@pytest.mark.parametrize(
    ("form", "clear"),
    [
        ("track1", b"%M4111111111111111^MANUAL ENTRY/^2512000000737000000?"),
        ("track1", b"%M4111111111111111^MANUAL ENTRY/^2512000737?;4111111111111111=2512000737?"),
        ("pan", b"4111111111111111|2512|737"),
        ("pan", b"4111111111111111|2512|"),
        ("json", b'{"pan":"4111111111111111","exp":"2512","cvv":"737","cvc":737}'),
    ],
)
def test_of_a_keyed_in_card_nothing_sensitive_is_kept_even_where_it_may_be(
    form: Format, clear: bytes
) -> None:
    card = parse(form, bytearray(clear), keep_sensitive=True)
    assert (card.pan.decode(), card.expiry, card.cardholder_name) == (VISA, "2512", None)
    assert card.track2 is None
    assert card.emv is None


def test_a_track_2_that_a_reader_made_of_a_keyed_in_card_is_not_kept() -> None:
    card = parse("track2", bytearray(b";4111111111111111=2512000000737?"), keep_sensitive=True)
    assert card.track2 is None


KEYED_57 = bytes(chip(f"57:{VISA}D4912000123456", "9F26:0102030405060708"))
KEYED_M = b"%M4111111111111111^MANUAL ENTRY/^2512000000737000000?"
CHIP_DATA = bytes(chip("9F26:0102030405060708"))


@pytest.mark.parametrize(
    ("pieces", "beside"),
    [
        ([("emv-tlv", KEYED_57)], b""),
        ([("tag-57", bytes.fromhex(f"{VISA}D4912000123456"))], CHIP_DATA),
        ([("track2", b";4111111111111111=2512000000737?")], CHIP_DATA),
        ([("track2", TRACK2.encode()), ("track1", KEYED_M)], b""),
        ([("emv-tlv", bytes(chip(f"5A:{VISA}"))), ("track1", KEYED_M)], CHIP_DATA),
        ([("emv-tlv", bytes(chip(f"5A:{VISA}", "5F30:0000")))], CHIP_DATA),
        ([("emv-tlv", bytes(chip(f"57:{VISA}D25122010F", "5F30:0000")))], CHIP_DATA),
    ],
)
def test_whatever_shows_that_a_card_was_keyed_in_nothing_of_it_is_kept(
    pieces: list[tuple[Form, bytes]], beside: bytes
) -> None:
    card = read(
        [Piece(form, bytearray(clear)) for form, clear in pieces],
        beside=beside,
        keep_sensitive=True,
    )
    assert card.pan.decode() == VISA
    assert (card.track2, card.emv) == (None, None)


@pytest.mark.parametrize(
    ("form", "clear"),
    [
        ("track2", TRACK2.encode()),
        ("track2", TRACK2.replace("=", "D").encode() + bytes(3)),
        ("track1", (TRACK1 + "!" + TRACK2 + "!").encode()),
        ("emv-tlv", chip("57:4111111111111111D25122010000012345")),
        ("emv-tlv", chip("57:4111111111111111D25122010000012345") + bytes(6)),
    ],
)
def test_track_2_is_kept_as_on_a_stripe_where_it_may_be(form: Format, clear: bytes) -> None:
    track = bytearray(b"4111111111111111=25122010000012345")
    assert parse(form, bytearray(clear), keep_sensitive=True).track2 == track
    assert parse(form, bytearray(clear)).track2 is None


def test_chip_data_is_kept_out_of_its_templates_and_without_a_pin_block() -> None:
    inner = chip(f"5A:{VISA}", "9F26:0102030405060708", "99:1122334455667788", "9F36:0001")
    clear = bytearray(b"\x00\x77") + bytes([len(inner)]) + inner + bytes(5)
    card = parse("emv-tlv", clear, keep_sensitive=True)
    assert card.emv == chip(f"5A:{VISA}", "9F26:0102030405060708", "9F36:0001")
    assert card.track2 is None


def test_what_is_clear_beside_gives_what_is_missing_and_never_the_number() -> None:
    beside = bytes(chip("5A:5555555555554444", "5F24:261130", "5F20:" + b"DOE/JANE".hex()))
    sealed = Piece("emv-tlv", chip("57:4111111111111111D25122010F"))
    assert fields(read([sealed], beside=beside)) == (VISA, "2512", "DOE/JANE", "201")
    with pytest.raises(InputError, match="no card number"):
        read([Piece("emv-tlv", chip("5F34:01"))], beside=beside)


@pytest.mark.parametrize(
    ("masked", "edges", "agrees"),
    [
        (b"4111********1111", None, True),
        (b"4111000000001111", 4, True),
        (b"411111**********", None, True),
        (b"4111000000001111", None, False),
        (b"4112********1111", None, False),
        (b"4111000000001112", 4, False),
        (b"4111*********1111", None, False),
    ],
)
def test_a_masked_number_must_be_the_card_s(masked: bytes, edges: int | None, agrees: bool) -> None:
    piece, shown = Piece("track2", bytearray(TRACK2.encode())), (Masked(masked, edges),)
    if agrees:
        assert read([piece], masked=shown).last4 == "1111"
    else:
        with pytest.raises(InputError, match="another card's"):
            read([piece], masked=shown)


@pytest.mark.parametrize(
    ("hexed", "pan"),
    [
        ("4111111111111111", VISA),
        ("4111111111111111FFFF", VISA),
        ("378282246310005F", AMEX),
        ("378282246310005F" + "00" * 8, AMEX),
        ("4111111111111111" + "00" * 8, None),
        ("30569309025904" + "00", None),
    ],
)
def test_the_bare_value_of_tag_5a_is_refused_where_its_end_cannot_be_told(
    hexed: str, pan: str | None
) -> None:
    clear = bytearray.fromhex(hexed)
    if pan is None:
        with pytest.raises(InputError, match="tag 5A"):
            parse("tag-5a", clear)
    else:
        assert parse("tag-5a", clear).pan == pan.encode()


def test_beside_tag_57_the_end_of_a_bare_tag_5a_is_known() -> None:
    pieces = [
        Piece("tag-57", bytearray.fromhex("4111111111111111D2512201000012345F01") + bytes(5)),
        Piece("tag-5a", bytearray.fromhex("4111111111111111") + bytes(8)),
    ]
    with pytest.raises(InputError, match="tag 57"):
        read(pieces)
    pieces[0] = Piece("tag-57", bytearray.fromhex("4111111111111111D25122010000012345") + bytes(6))
    assert fields(read(pieces)) == (VISA, "2512", None, "201")


# ---- what is left in memory


def test_a_wiped_card_has_nothing_left_of_its_number_track_or_chip() -> None:
    clear = chip("57:4111111111111111D25122010000012345", "9F26:0102030405060708")
    card = parse("emv-tlv", clear, keep_sensitive=True)
    assert card.track2
    assert card.emv
    card.wipe()
    assert not any(card.pan + card.track2 + card.emv)


@given(form=st.sampled_from(FORMATS), pan=pans, cut=st.integers(0, 60))
def test_whatever_becomes_of_a_piece_its_buffer_is_as_it_was(
    form: Format, pan: str, cut: int
) -> None:
    clear = bytearray(f";{pan}=2512201?".encode())[: cut or None]
    before = bytes(clear)
    attempt(form, clear)
    assert clear == before
    clear.clear()  # refused with BufferError while anything holds a view
