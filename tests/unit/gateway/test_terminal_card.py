"""The terminal's half of a card: what it encrypts, glamd's own crypto and parser can read."""

from pathlib import Path

import pytest

from device_gateway import wire
from device_gateway.terminal_card import TEST_CARDS, CardReader, DemoCard, clear_form
from device_gateway.terminal_device import Counters, device_from
from glamd.crypto.dukpt import Dukpt, Profile, counter_of
from glamd.errors import InputError
from glamd.payments import card as glamd_card
from glamd.payments.model import Format, Scheme

FORMS: tuple[Format, ...] = ("track1", "track2", "emv-tlv", "pan", "json")
KSNS: dict[Scheme, str] = {
    "tdes-dukpt": "FFFF9876543210E00000",
    "aes-dukpt": "123456789012345600000000",
}


def reader_for(scheme: Scheme, directory: Path, key: str = "AA" * 16) -> tuple[CardReader, Dukpt]:
    raw = {
        "device_id": scheme,
        "merchant_id": "m",
        "scheme": scheme,
        "key_set": "k",
        "ksn": KSNS[scheme],
        "initial_key": key,
        "cert": "c",
        "key": "k",
        "ca": "a",
        "mqtt": {"host": "h", "port": 1},
    }
    device = device_from(raw, directory)
    host = Dukpt(Profile(scheme=scheme), device.initial_key, device.key_id)
    return CardReader(device, Counters(device, block=64)), host


def test_an_initial_key_of_the_wrong_length_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        reader_for("tdes-dukpt", tmp_path, key="AA" * 5)


@pytest.mark.parametrize("scheme", list(KSNS))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_every_test_card_is_read_back(
    scheme: Scheme, form: Format, tmp_path: Path
) -> None:
    reader, host = reader_for(scheme, tmp_path)
    for number, card in enumerate(TEST_CARDS):
        payload = reader.request(f"r{number}", clear_form(card, form), form, mac=True)
        assert card.pan.encode() not in payload
        request = wire.decode_request(payload)
        assert isinstance(request, wire.Tokenize)
        counter = counter_of(scheme, request.ksn)
        assert request.mac is not None
        assert host.verify_mac(counter, request.data, request.mac)
        read = glamd_card.parse(form, host.decrypt(counter, request.data))
        assert (read.pan.decode(), read.expiry) == (card.pan, "4912")


def test_each_request_has_a_counter_of_its_own(tmp_path: Path) -> None:
    reader, _ = reader_for("aes-dukpt", tmp_path)
    payloads = [reader.request("same", b"4242424242424242", "pan") for _ in range(5)]
    ksns = {
        request.ksn
        for request in map(wire.decode_request, payloads)
        if isinstance(request, wire.Tokenize)
    }
    assert len(ksns) == len(set(payloads)) == 5


def test_a_card_shows_only_its_last_digits() -> None:
    assert repr(DemoCard(pan="4242424242424242")) == "<DemoCard …4242>"


@pytest.mark.parametrize("pan", ["4242424242424241", "1", "9" * 32])
def test_a_card_that_cannot_be_is_sent_as_it_is(pan: str) -> None:
    for form in FORMS:
        assert clear_form(DemoCard(pan=pan), form)
