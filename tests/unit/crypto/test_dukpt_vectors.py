"""The published vectors, the standard's own first, then those that are an implementation's own.

Every set of the file is consumed whole: one of an unknown kind, and a field that nothing looks at,
fails here.
"""

import json
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from math import comb
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.cmac import CMAC

from glamd.crypto import dukpt, dukpt_aes, dukpt_tdes, mac
from glamd.crypto.blocks import encrypt_aes, tdea
from glamd.errors import InputError

type_of = dukpt_aes.KeyType
FILE = Path(__file__).parents[2] / "vectors" / "vectors_public.json"
VECTORS: dict[str, Any] = json.loads(FILE.read_text())
Set = dict[str, Any]

TOLD = {"kind", "source", "claim", "pin", "pan", "mac_algorithm", "data_iv", "data_mode"}
"""What describes a set and is no value to compare with."""

AES_USAGES = {
    "KEK": dukpt_aes.Usage.KEY_ENCRYPTION,
    "PIN": dukpt_aes.Usage.PIN,
    "MAC_GEN": dukpt_aes.Usage.MAC_GENERATION,
    "MAC_VER": dukpt_aes.Usage.MAC_VERIFICATION,
    "MAC_BOTH": dukpt_aes.Usage.MAC_BOTH,
    "DATA_ENC": dukpt_aes.Usage.DATA_ENCRYPT,
    "DATA_DEC": dukpt_aes.Usage.DATA_DECRYPT,
    "DATA_BOTH": dukpt_aes.Usage.DATA_BOTH,
    "KEY_DERIVATION": dukpt_aes.Usage.KEY_DERIVATION,
}
AES_TYPES = {
    "2TDEA": type_of.TDEA_2,
    "3TDEA": type_of.TDEA_3,
    "AES128": type_of.AES_128,
    "AES192": type_of.AES_192,
    "AES256": type_of.AES_256,
}


def _is_the_standards(vectors: Set) -> bool:
    """Whether its origin says X9; the other sets are an implementation's word only."""
    claim = vectors["claim"]
    return "X9.24" in claim and "NOT published by X9" not in claim


STANDARD = [entry for entry in VECTORS["sets"] if _is_the_standards(entry)]
THEIR_OWN = [entry for entry in VECTORS["sets"] if not _is_the_standards(entry)]


class Fields:
    """A part of the file that knows which of its fields were looked at."""

    def __init__(self, values: Set, told: AbstractSet[str] = frozenset()) -> None:
        self._values = values
        self._left = set(values) - told

    def text(self, name: str) -> str:
        """A field as it stands in the file."""
        self._left.discard(name)
        value = self._values[name]
        assert isinstance(value, str)
        return value

    def raw(self, name: str) -> bytes:
        """A field in hex, as bytes."""
        return bytes.fromhex(self.text(name))

    def optional(self, name: str) -> bytes | None:
        """A field in hex that may be missing."""
        return self.raw(name) if name in self._values else None

    def each(self, name: str) -> "list[Fields]":
        """The parts under a field that may be missing."""
        self._left.discard(name)
        return [Fields(part) for part in self._values.get(name, [])]

    def number(self, name: str) -> int:
        """A field that is a number."""
        self._left.discard(name)
        return int(self._values[name])

    def done(self) -> None:
        """Nothing may be left that no check has looked at."""
        assert not self._left, f"nothing looks at {sorted(self._left)}"


def _tdes_dukpt(entry: Fields) -> None:
    scheme, iksn = dukpt.TDES_DUKPT, entry.raw("iksn")
    initial_key = dukpt.initial_key(scheme, entry.raw("bdk"), iksn)
    assert initial_key == entry.raw("ik")
    key_id = dukpt.initial_key_id(scheme, iksn)
    deriver = dukpt_tdes.Deriver(initial_key, key_id)
    data = dukpt.Dukpt(dukpt.Profile(scheme=scheme), initial_key, key_id)
    pin_profile = dukpt.Profile(scheme=scheme, data_usage="pin", padding="none")
    pin = dukpt.Dukpt(pin_profile, initial_key, key_id)
    clear, pin_block = entry.raw("data_clear_padded_hex"), entry.raw("pinblock_clear")
    message = entry.text("mac_data_ascii").encode()
    mac_keys = {
        "request": deriver.working_keys(dukpt_tdes.Usage.MAC_REQUEST),
        "response": deriver.working_keys(dukpt_tdes.Usage.MAC_RESPONSE),
    }
    for case in entry.each("cases"):
        ksn = case.raw("ksn")
        assert dukpt.initial_key_id(scheme, ksn) == key_id
        counter = dukpt.counter_of(scheme, ksn)
        assert dukpt.ksn_with_counter(scheme, key_id, counter) == ksn
        assert dukpt.valid_counter(scheme, counter)
        assert deriver.transaction_key(counter) == case.raw("txn_key")
        assert data.encrypt(counter, clear) == case.raw("data_request_ct")
        assert data.decrypt(counter, case.raw("data_request_ct")) == clear
        assert pin.encrypt(counter, pin_block) == case.raw("pinblock_enc")
        assert pin.decrypt(counter, case.raw("pinblock_enc")) == pin_block
        assert data.mac(counter, message, 4) == case.raw("mac_request")
        assert data.verify_mac(counter, message, case.raw("mac_request"))
        for way, key_at in mac_keys.items():
            key = key_at(counter)
            assert mac.RETAIL_MAC.generate(key, message, length_bytes=4) == case.raw(f"mac_{way}")
            # Openemv's own, not the standard's: it says once more that the MAC keys are right.
            context = CMAC(tdea(key))
            context.update(message)
            assert context.finalize() == case.raw(f"cmac_{way}_nonstd")
        case.done()


def _tdes_dukpt_keys(entry: Fields) -> None:
    bdk = entry.raw("bdk")
    for case in entry.each("cases"):
        ksn = case.raw("ksn")
        initial_key = dukpt.initial_key(dukpt.TDES_DUKPT, bdk, ksn)
        deriver = dukpt_tdes.Deriver(initial_key, dukpt.initial_key_id(dukpt.TDES_DUKPT, ksn))
        counter = dukpt.counter_of(dukpt.TDES_DUKPT, ksn)
        for name, key in (
            ("txn_key", deriver.transaction_key(counter)),
            ("pin_key", deriver.working_keys(dukpt_tdes.Usage.PIN)(counter)),
            ("mac_request_key", deriver.working_keys(dukpt_tdes.Usage.MAC_REQUEST)(counter)),
            ("mac_response_key", deriver.working_keys(dukpt_tdes.Usage.MAC_RESPONSE)(counter)),
            ("data_request_key", deriver.working_keys(dukpt_tdes.Usage.DATA_REQUEST)(counter)),
        ):
            assert case.optional(name) in {None, key}
        case.done()


def _aes_dukpt(entry: Fields) -> None:
    scheme, bdk, key_id = dukpt.AES_DUKPT, entry.raw("bdk"), entry.raw("ikid")
    assert AES_TYPES[entry.text("bdk_type")].length_bytes == len(bdk)
    initial_key = dukpt.initial_key(scheme, bdk, key_id + bytes(4))
    assert initial_key == entry.raw("ik")
    deriver = dukpt_aes.Deriver(initial_key, key_id)
    pin_field, pan_field = entry.optional("pin_field"), entry.optional("pan_field")
    for case in entry.each("cases"):
        ksn = case.raw("ksn")
        assert dukpt.initial_key_id(scheme, ksn) == key_id
        counter = dukpt.counter_of(scheme, ksn)
        assert dukpt.ksn_with_counter(scheme, key_id, counter) == ksn
        if "device_must_skip" in case._left:
            case.number("device_must_skip")
            assert not dukpt.valid_counter(scheme, counter)
            with pytest.raises(InputError):
                deriver.transaction_key(counter)
        assert _aes_transaction_key(deriver, key_id, counter) == case.raw("txn_key")
        _aes_working_keys(deriver, key_id, counter, case)
        pin_block = case.optional("pinblock4_enc")
        if pin_block is not None:
            assert pin_field is not None
            assert pan_field is not None
            # ISO 9564-1, format 4: enciphered twice, with the PAN field XORed in between.
            key = deriver.working_keys(dukpt_aes.Usage.PIN, deriver.key_type)(counter)
            block = encrypt_aes(key, pin_field)
            mixed = bytes(a ^ b for a, b in zip(block, pan_field, strict=True))
            assert encrypt_aes(key, mixed) == pin_block
        case.done()


def _aes_transaction_key(deriver: dukpt_aes.Deriver, key_id: bytes, counter: int) -> bytes:
    """Also of 0x1FFFF, which the deriver refuses and whose parent it gives."""
    if dukpt_aes.COUNTERS.valid(counter):
        return deriver.transaction_key(counter)
    usage = dukpt_aes.Usage.KEY_DERIVATION
    derivation = dukpt_aes.Derivation(usage, deriver.key_type, key_id[4:])
    return derivation.derive(deriver.transaction_key(counter & counter - 1), counter)


def _aes_working_keys(
    deriver: dukpt_aes.Deriver, key_id: bytes, counter: int, case: Fields
) -> None:
    for expected in case.each("working_keys"):
        usage = AES_USAGES[expected.text("usage")]
        key_type = AES_TYPES[expected.text("key_type")]
        derivation = dukpt_aes.Derivation(usage, key_type, key_id[4:])
        transaction_key = _aes_transaction_key(deriver, key_id, counter)
        assert derivation.derive(transaction_key, counter) == expected.raw("key")
        if dukpt_aes.COUNTERS.valid(counter):
            assert deriver.working_keys(usage, key_type)(counter) == expected.raw("key")
        expected.done()


def _aes_dukpt_working(entry: Fields) -> None:
    bdk, key_id = entry.raw("bdk"), entry.raw("ikid")
    assert AES_TYPES[entry.text("bdk_type")].length_bytes == len(bdk)
    initial_key = dukpt.initial_key(dukpt.AES_DUKPT, bdk, key_id + bytes(4))
    deriver = dukpt_aes.Deriver(initial_key, key_id)
    for case in entry.each("cases"):
        _aes_working_keys(deriver, key_id, int(case.text("counter"), 16), case)
        case.done()


def _aes_dukpt_update_key(entry: Fields) -> None:
    initial_key, key_id = entry.raw("ik"), entry.raw("ikid")
    for case in entry.each("cases"):
        assert case.text("usage") == "KEK"
        assert int(case.text("counter"), 16) == dukpt_aes.UPDATE_KEY_COUNTER
        key_type = AES_TYPES[case.text("key_type")]
        assert dukpt_aes.update_key(initial_key, key_id, key_type) == case.raw("key")
        case.done()


def _tdes_dukpt_counter_walk(entry: Fields) -> None:
    """Walked whole: a million steps are half a second."""
    taken, last = 0, 0
    counter = dukpt.next_counter(dukpt.TDES_DUKPT, 0)
    while counter is not None:
        taken, last = taken + 1, counter
        counter = dukpt.next_counter(dukpt.TDES_DUKPT, counter)
    assert taken == entry.number("total_transactions")
    assert last == int(entry.text("last_counter"), 16)


def _aes_dukpt_counter_walk(entry: Fields) -> None:
    """Counted: the walk itself is compared with all counters at smaller widths elsewhere."""
    width, limit = dukpt_aes.COUNTERS.width_bits, dukpt_aes.COUNTERS.ones_limit
    total = sum(comb(width, ones) for ones in range(1, limit + 1))
    assert total == entry.number("total_transactions")
    last = int(entry.text("last_counter"), 16)
    assert dukpt.valid_counter(dukpt.AES_DUKPT, last)
    assert dukpt.next_counter(dukpt.AES_DUKPT, last) is None


CHECKS: dict[str, Callable[[Fields], None]] = {
    "tdes_dukpt": _tdes_dukpt,
    "tdes_dukpt_keys": _tdes_dukpt_keys,
    "aes_dukpt": _aes_dukpt,
    "aes_dukpt_working": _aes_dukpt_working,
    "aes_dukpt_update_key": _aes_dukpt_update_key,
    "tdes_dukpt_counter_walk": _tdes_dukpt_counter_walk,
    "aes_dukpt_counter_walk": _aes_dukpt_counter_walk,
}


def _named(entry: Set) -> str:
    return f"{VECTORS['sets'].index(entry)}-{entry['kind']}"


def _check(entry: Set) -> None:
    fields = Fields(entry, TOLD)
    CHECKS[entry["kind"]](fields)
    fields.done()


@pytest.mark.parametrize("entry", STANDARD, ids=_named)
def test_a_set_of_the_standard_comes_out_as_published(entry: Set) -> None:
    _check(entry)


@pytest.mark.parametrize("entry", THEIR_OWN, ids=_named)
def test_a_set_that_is_an_implementations_own_comes_out_the_same(entry: Set) -> None:
    _check(entry)


def test_every_kind_of_set_in_the_file_has_a_check() -> None:
    assert {entry["kind"] for entry in VECTORS["sets"]} == set(CHECKS)
    assert set(VECTORS) == {"note", "sets", "self_check"}


def test_a_field_that_nothing_looks_at_fails() -> None:
    entry = dict(STANDARD[0], surprise="00")
    with pytest.raises(AssertionError, match="surprise"):
        _check(entry)


def test_a_single_wrong_digit_fails() -> None:
    case = dict(STANDARD[0]["cases"][0], txn_key="142666B49184CFA368DE9628D0397BC9")
    with pytest.raises(AssertionError):
        _check(dict(STANDARD[0], cases=[case]))
