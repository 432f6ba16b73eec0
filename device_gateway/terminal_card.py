"""Test cards in a virtual terminal: their clear forms, and the encrypted request made of one.

The opposite of `glamd.payments.card`, for development and tests: no real card belongs in here. It
does not check a card, because a test wants to send bad ones. A key set with its default profile is
taken for granted (spec 4), as `device.json` says nothing about another.
"""

import base64
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import orjson

from device_gateway.terminal_device import Counters, Device
from glamd.crypto.dukpt import Dukpt, Profile
from glamd.payments.model import EntryMode, Format, Scheme

_TRACK2_LIMIT_CHARS: Final = 40
_DISCRETIONARY: Final = "0000123400000"
_MAC_BYTES: Final[dict[Scheme, int]] = {"tdes-dukpt": 8, "aes-dukpt": 16}
ENTRY_MODES: Final[dict[Format, EntryMode]] = {
    "track1": "magstripe",
    "track2": "magstripe",
    "emv-tlv": "chip",
    "pan": "manual",
    "json": "manual",
}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class DemoCard:
    """A card as a terminal reads it: PAN in digits, expiry `YYMM`, name as on track 1."""

    pan: str
    expiry: str = "4912"
    name: str = "TESTER/TERRY"
    service_code: str = "201"

    def __repr__(self) -> str:
        return f"<DemoCard …{self.pan[-4:]}>"


# Published test numbers of the schemes; none of them can be charged.
TEST_CARDS: Final = tuple(
    DemoCard(pan=pan)
    for pan in (
        "4242424242424242",
        "4111111111111111",
        "5555555555554444",
        "2223003122003222",
        "378282246310005",
        "6011111111111117",
        "3566002020360505",
        "30569309025904",
    )
)


def clear_form(card: DemoCard, form: Format) -> bytes:
    """The bytes that a terminal would encrypt for `card` in `form`, without padding."""
    if form == "track2":
        return _track2(card).encode()
    if form == "track1":
        track = f"%B{card.pan}^{card.name}^{card.expiry}{card.service_code}{_DISCRETIONARY}?"
        return track.encode()
    if form == "pan":
        return f"{card.pan}|{card.expiry}".encode()
    if form == "json":
        return orjson.dumps({"pan": card.pan, "exp": card.expiry, "name": card.name})
    return _emv(card)


class CardReader:
    """The secure part of one terminal: takes a counter, encrypts, and says it as a request."""

    def __init__(self, device: Device, counters: Counters) -> None:
        """Raises InputError when the initial key does not fit the scheme."""
        self._device = device
        self._counters = counters
        profile = Profile(scheme=device.scheme)
        self._dukpt = Dukpt(profile, device.initial_key, device.key_id)

    def request(
        self,
        request_id: str,
        clear: bytes,
        form: Format,
        *,
        mac: bool = False,
        at: datetime | None = None,
    ) -> bytes:
        """The request (JSON, spec 2) that carries `clear` encrypted under the next counter.

        Raises ConflictError when no counter is left.
        """
        device = self._device
        counter = self._counters.take()
        data = self._dukpt.encrypt(counter, clear)
        message: dict[str, object] = {
            "v": 1,
            "id": request_id,
            "type": "tokenize",
            "ksn": device.ksn_at(counter).hex(),
            "data": base64.b64encode(data).decode("ascii"),
            "scheme": device.scheme,
            "format": form,
            "entry_mode": ENTRY_MODES[form],
        }
        if mac:
            message["mac"] = self._dukpt.mac(counter, data, _MAC_BYTES[device.scheme]).hex()
        if at is not None:
            message["at"] = at
        return orjson.dumps(message, option=orjson.OPT_UTC_Z)


def _track2(card: DemoCard) -> str:
    head = f";{card.pan}={card.expiry}{card.service_code}"
    return (head + _DISCRETIONARY)[: _TRACK2_LIMIT_CHARS - 1] + "?"


def _emv(card: DemoCard) -> bytes:
    """Tags 57, 5A, 5F20, 5F24, 5F34, 9F06 and 9F26: what a chip's reader hands over."""
    equivalent = _track2(card)[1:-1].replace("=", "D")
    return b"".join(
        (
            _tlv("57", _packed(equivalent)),
            _tlv("5A", _packed(card.pan)),
            _tlv("5F20", card.name.encode()),
            _tlv("5F24", _packed(card.expiry + "28")),
            _tlv("5F34", b"\x01"),
            _tlv("9F06", bytes.fromhex("A0000000031010")),
            _tlv("9F26", bytes.fromhex("0123456789ABCDEF")),
        )
    )


def _packed(digits: str) -> bytes:
    """Two digits a byte, an odd one filled up with F (EMV Book 3, 4.3)."""
    return bytes.fromhex(digits if len(digits) % 2 == 0 else digits + "F")


def _tlv(tag: str, value: bytes) -> bytes:
    # Every value here is shorter than 128 bytes, so its length is one byte.
    return bytes.fromhex(tag) + bytes((len(value),)) + value
