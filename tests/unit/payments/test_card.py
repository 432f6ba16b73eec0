"""Cards as terminals send them, whole and broken: a `Card`, or a refusal that shows none of it."""

import copy
import dataclasses
import pickle
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.errors import InputError
from glamd.payments import card as cards
from glamd.payments.card import MAX_CLEAR_BYTES, parse
from glamd.payments.model import Format
from tests.support.clear_cards import (
    AMEX,
    FORMATS,
    VISA,
    attempt,
    check_digit,
    chip,
    even,
    expiries,
    fields,
    luhn_ok,
    made,
    paddings,
    pans,
    refused,
)

# ---- refusals


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("clear", [b"", b"\x00" * 16, b"\xff" * 16, b"?", b";", b"null"])
def test_what_holds_no_card_is_refused(form: Format, clear: bytes) -> None:
    assert refused(form, clear)


@pytest.mark.parametrize("form", FORMATS)
def test_more_bytes_than_a_message_has_are_refused(form: Format) -> None:
    assert refused(form, bytes(MAX_CLEAR_BYTES + 1)) == "the decrypted data is too long"


@pytest.mark.parametrize(
    ("form", "clear"),
    [
        ("track2", b";4111111111111112=25121010000?"),
        ("track1", b"%B4111111111111112^DOE/JANE^25121010000?"),
        ("pan", b"4111111111111112"),
        ("json", b'{"pan":"4111111111111112","exp":"2512"}'),
        ("emv-tlv", chip("5A:4111111111111112")),
    ],
)
def test_a_wrong_check_digit_is_refused_in_every_form(form: Format, clear: bytes) -> None:
    assert refused(form, clear) == "the card number fails its check digit"


@pytest.mark.parametrize(
    ("form", "clear"),
    [
        ("track2", b";4111111111111111=25131010000?"),
        ("track2", b";4111111111111111=2500?"),
        ("track1", b"%B4111111111111111^DOE/JANE^25991010000?"),
        ("pan", b"4111111111111111|1325"),
        ("json", b'{"pan":"4111111111111111","exp":"12/25"}'),
        ("json", '{"pan":"4111111111111111","exp":"٢٥١٢"}'.encode()),
        ("emv-tlv", chip(f"5A:{VISA}", "5F24:251331")),
        ("emv-tlv", chip(f"5A:{VISA}", "5F24:ABCDEF")),
    ],
)
def test_an_expiry_that_is_no_month_is_refused(form: Format, clear: bytes) -> None:
    assert refused(form, clear) == "the expiry is not a YYMM"


@pytest.mark.parametrize(
    "track",
    [
        b";79927398713=2512101?",  # 11 digits, a good check digit
        b";41111111111111111111=2512101?",  # 20 digits
        b";4111111111111111?",
        b";4111111111111111=?",
        b";4111111111111111=25?",
        b";;4111111111111111=2512101?",
        b"x;4111111111111111=2512101?",
        b";4111111111111111=2512101?xy",
        b";4111111111111111=2512101?x\x00y",
        b";4111111111111111=2512101x",
        b";4111 1111 1111 1111=2512101?",
        b";4111111111111111=2512101\n",
        b";4111111111111111=2512101" + b"0" * 65,
        ";٤١١١١١١١١١١١١١١١=2512101?".encode(),
    ],
)
def test_what_is_not_quite_a_track_2_is_refused(track: bytes) -> None:
    assert refused("track2", track) == "the decrypted data is not a track 2"


@pytest.mark.parametrize(
    "track",
    [
        b"%4111111111111111^DOE/JANE^2512101?",
        b"%C4111111111111111^DOE/JANE^2512101?",
        b"%B4111111111111111^DOE/JANE2512101?",
        b"%B4111111111111111^" + b"A" * 46 + b"^2512101?",
        b"%B4111111111111111^DOE\x1b[2J^2512101?",
        b"%B4111111111111111^DOE/JANE^251?",
    ],
)
def test_what_is_not_quite_a_track_1_is_refused(track: bytes) -> None:
    assert refused("track1", track) == "the decrypted data is not a track 1"


@pytest.mark.parametrize(
    ("clear", "reason"),
    [
        (b"[]", "not a JSON object"),
        (b'{"pan":"4111111111111111"', "not a JSON object"),
        (b"[" * 2000, "not a JSON object"),
        (b"{}", "no card number"),
        (b'{"pan":4111111111111111,"exp":"2512"}', "no card number"),
        (b'{"pan":"79927398713","exp":"2512"}', "no card number"),
        ('{"pan":"٤١١١١١١١١١١١١١١١","exp":"2512"}'.encode(), "no card number"),
        (b'{"pan":"4111111111111111"}', "no expiry"),
        (b'{"pan":"4111111111111111","exp":2512}', "no expiry"),
        (b'{"pan":"4111111111111111","exp":"2512","name":7}', "not text"),
        (b'{"pan":"4111111111111111","exp":"2512","name":"a\\u0007b"}', "not printable"),
        (b'{"pan":"4111111111111111","exp":"2512","name":"' + b"n" * 65 + b'"}', "too long"),
    ],
)
def test_json_with_anything_missing_or_wrong_is_refused(clear: bytes, reason: str) -> None:
    assert reason in refused("json", clear)


@pytest.mark.parametrize(
    ("clear", "reason"),
    [
        (chip("9F26:0102030405060708"), "no card number"),
        (chip("57:4111111111111111D2512101", f"5A:{even(AMEX)}"), "differ"),
        (chip("57:4111111111111111"), "tag 57 is not a track 2"),
        (chip("57:4111A11111111111D2512101"), "tag 57 is not a track 2"),
        (chip("5A:411111111111AAAA"), "tag 5A is not a card number"),
        (chip("5A:7992739871"), "tag 5A is not a card number"),
        (chip(f"5A:{VISA}", "5F30:02"), "service code"),
        (chip(f"5A:{VISA}", "5F30:0A0B"), "service code"),
        (chip(f"5A:{VISA}", f"5A:{VISA}"), "tag twice"),
        (chip(f"5A:{VISA}")[:-1], "cut short"),
    ],
)
def test_chip_data_that_misleads_is_refused(clear: bytearray, reason: str) -> None:
    assert reason in refused("emv-tlv", clear)


@given(form=st.sampled_from(FORMATS), clear=st.binary(max_size=200))
def test_hostile_bytes_give_a_refusal_and_never_another_error(form: Format, clear: bytes) -> None:
    buffer = bytearray(clear)
    outcome = attempt(form, buffer)
    if isinstance(outcome, InputError):
        assert outcome.code == "DECRYPT_FAILED"
    else:
        assert cards.luhn_ok(outcome.pan)
    assert buffer == clear


@given(pan=pans, expiry=expiries, at=st.integers(0, 30), byte=st.integers(0, 255))
def test_no_refusal_shows_a_byte_of_the_card(pan: str, expiry: str, at: int, byte: int) -> None:
    track = bytearray(f";{pan}={expiry}101?".encode())
    track[at % len(track)] = byte
    outcome = attempt("track2", track)
    if isinstance(outcome, InputError):
        assert pan not in "".join(traceback.format_exception(outcome)) + repr(outcome)
        assert not any(character.isdigit() for character in outcome.message.replace("track 2", ""))


# ---- what is read


@given(pan=pans, expiry=expiries, padding=paddings)
def test_every_form_of_the_same_card_reads_the_same(pan: str, expiry: str, padding: bytes) -> None:
    track2 = f";{pan}={expiry}2011234567890?"
    chip_track2 = even(f"{pan}D{expiry}2011234567890")
    json = f'{{"pan":"{pan}","exp":"{expiry}","name":"DOE/JANE"}}'
    track1 = f"%B{pan}^DOE/JANE^{expiry}2011234567890?"
    plain, named = (pan, expiry, None, "201"), (pan, expiry, "DOE/JANE", "201")
    assert fields(parse("track2", bytearray(track2.encode() + padding))) == plain
    assert fields(parse("track1", bytearray(track1.encode() + padding))) == named
    assert fields(parse("emv-tlv", chip(f"57:{chip_track2}") + padding)) == plain
    no_code = (pan, expiry, "DOE/JANE", None)
    assert fields(parse("json", bytearray(json.encode() + padding))) == no_code
    no_name = (pan, expiry, None, None)
    assert fields(parse("pan", bytearray(f"{pan}|{expiry}".encode() + padding))) == no_name


@pytest.mark.parametrize(
    "track",
    [
        ";4111111111111111=25122010000012345?",
        "4111111111111111=25122010000012345",
        ";4111111111111111D25122010000012345?",
        "4111111111111111d25122010000012345F",
        ";4111111111111111=25122010000012345?;",
        ";4111111111111111=25122010000012345?\x00",
        ";4111111111111111=25122010000012345?\x07\x00\x00\x00",
        ";4111111111111111=2512201?",
        "4111111111111111=2512201" + "\x00" * 8,
    ],
)
def test_a_track_2_is_read_with_and_without_its_sentinels_check_and_padding(track: str) -> None:
    assert parse("track2", bytearray(track.encode())) == made(VISA, "2512", None, "201")


@pytest.mark.parametrize(
    ("track", "expiry", "service_code"),
    [
        (";4111111111111111==201123?", None, "201"),
        (";4111111111111111=2512=123?", "2512", None),
        (";4111111111111111===123?", None, None),
        (";4111111111111111=2512?", "2512", None),
        (";4111111111111111=251220?", "2512", None),
    ],
)
def test_a_track_2_may_leave_expiry_and_service_code_out(
    track: str, expiry: str | None, service_code: str | None
) -> None:
    assert parse("track2", bytearray(track.encode())) == made(VISA, expiry, None, service_code)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("DOE/JANE", "DOE/JANE"),
        ("DOE/JANE.DR", "DOE/JANE.DR"),
        ("DOE/JANE              ", "DOE/JANE"),
        ("O'NEILL-LEE/J & K", "O'NEILL-LEE/J & K"),
        (" /", None),
        ("", None),
        ("                          ", None),
    ],
)
def test_a_name_loses_its_padding_and_an_empty_one_is_none(name: str, read: str | None) -> None:
    track = f"%B{VISA}^{name}^2512201ABC 123?x"
    assert parse("track1", bytearray(track.encode())).cardholder_name == read
    hexed = name.encode().hex()
    assert parse("emv-tlv", chip(f"5A:{VISA}", f"5F20:{hexed}")).cardholder_name == read


def test_a_track_1_may_come_without_sentinels_and_with_empty_fields() -> None:
    assert parse("track1", bytearray(b"B4111111111111111^DOE/JANE^^^x")) == made(
        VISA, None, "DOE/JANE", None
    )


def test_a_chip_without_track_2_is_read_from_its_single_tags_at_any_depth() -> None:
    inner = chip(
        "9F06:A0000000031010", f"5A:{even(AMEX)}", "5F24:251231", "5F34:01", "5F30:0201",
        "5F20:" + b"DOE/JANE".hex(), "9F26:0102030405060708",
    )  # fmt: skip
    clear = bytearray(b"\x00\x77") + bytes([len(inner)]) + inner + bytes(5)
    assert parse("emv-tlv", clear) == made(AMEX, "2512", "DOE/JANE", "201")


def test_tag_57_and_5a_that_agree_are_one_card_and_57_says_the_expiry() -> None:
    clear = chip("57:4111111111111111D25122010F", f"5A:{VISA}", "5F24:261130")
    assert parse("emv-tlv", clear) == made(VISA, "2512", None, "201")


@pytest.mark.parametrize(
    ("form", "clear"),
    [
        ("pan", b"4111111111111111|2512|737"),
        ("json", b'{"pan":"4111111111111111","exp":"2512","cvv":"737","cvc":737}'),
    ],
)
def test_a_security_code_typed_in_by_hand_is_dropped(form: Format, clear: bytes) -> None:
    assert parse(form, bytearray(clear)) == made(VISA, "2512", None, None)


def test_a_bare_number_has_no_expiry() -> None:
    card = parse("pan", bytearray(VISA.encode()))
    assert (card.expiry, card.exp_month, card.exp_year) == (None, None, None)


def test_the_buffer_can_be_overwritten_in_place_after_every_outcome() -> None:
    for form in FORMATS:
        for clear in (b'{"pan":"x"}', b"5Z", b";4111111111111111=2512101?", chip(f"5A:{VISA}")):
            buffer = bytearray(clear)
            outcome = attempt(form, buffer)
            buffer[:] = bytes(len(buffer))
            assert outcome is not None
            assert not any(buffer)


# ---- what a card tells


def test_a_card_never_shows_its_number() -> None:
    card = parse("track1", bytearray(b"%B4111111111111111^DOE/JANE^2512201123?"))
    for shown in (repr(card), str(card), f"{card}", f"{card!r:>40}", repr([card])):
        assert "…1111>" in shown
        assert VISA not in shown
        assert VISA[:6] not in shown
        assert "DOE" not in shown
        assert "2512" not in shown


def test_a_card_refuses_to_be_pickled_or_copied() -> None:
    card = made(VISA, "2512", None, None)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            pickle.dumps(card, protocol)
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        copy.copy(card)
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        copy.deepcopy([card])


def test_a_card_cannot_be_changed() -> None:
    card = made(VISA, None, None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.__setattr__("pan", AMEX)


@pytest.mark.parametrize(
    ("pan", "shown"),
    [
        (VISA, "41111111"),
        (AMEX, "378282"),
        ("4000000000006", "400000"),
        ("6304000000000000000", "63040000"),
        ("501800000009", "501800"),
    ],
)
def test_the_bin_has_eight_digits_only_of_sixteen_or_more(pan: str, shown: str) -> None:
    assert made(pan, None, None, None).bin == shown


@pytest.mark.parametrize(
    ("prefix", "brand"),
    [
        ("4", "visa"),
        ("51", "mastercard"),
        ("55", "mastercard"),
        ("2221", "mastercard"),
        ("2720", "mastercard"),
        ("2220", "unknown"),
        ("2721", "unknown"),
        ("34", "amex"),
        ("37", "amex"),
        ("35", "unknown"),
        ("3528", "jcb"),
        ("3589", "jcb"),
        ("300", "diners"),
        ("305", "diners"),
        ("306", "unknown"),
        ("3095", "diners"),
        ("36", "diners"),
        ("38", "diners"),
        ("39", "diners"),
        ("6011", "discover"),
        ("644", "discover"),
        ("65", "discover"),
        ("643", "unknown"),
        ("62", "unionpay"),
        ("81", "unionpay"),
        ("5018", "maestro"),
        ("5612", "maestro"),
        ("6304", "maestro"),
        ("6759", "maestro"),
        ("59", "unknown"),
        ("1", "unknown"),
        ("0000", "unknown"),
        ("9999", "unknown"),
    ],
)
def test_the_brand_follows_the_number_range(prefix: str, brand: str) -> None:
    body = prefix.ljust(15, "0")
    assert parse("pan", bytearray((body + check_digit(body)).encode())).brand == brand


@pytest.mark.parametrize(
    ("expiry", "month", "year"), [("2512", 12, 2025), ("0001", 1, 2000), ("5003", 3, 2050)]
)
def test_every_year_is_of_this_century(expiry: str, month: int, year: int) -> None:
    card = made(VISA, expiry, None, None)
    assert (card.exp_month, card.exp_year) == (month, year)


@pytest.mark.parametrize(
    "pan",
    [VISA, AMEX, "5555555555554444", "2223003122003222", "6011111111111117", "3530111333300000"],
)
def test_published_test_cards_pass_and_every_single_digit_error_fails(pan: str) -> None:
    assert luhn_ok(pan)
    for at, digit in enumerate(pan):
        for wrong in set("0123456789") - {digit}:
            assert not luhn_ok(pan[:at] + wrong + pan[at + 1 :])
