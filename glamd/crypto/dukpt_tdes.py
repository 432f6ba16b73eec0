"""TDES DUKPT after ANSI X9.24-1:2009, annex A, as the receiving host does it.

A KSN is 10 bytes: the id of the device's initial key, then 21 bits of transaction counter. Keys are
double length (16 bytes). Ciphers and MACs under the working keys do not belong here, nor does the
device's own algorithm with its future key registers, which the tests have to compare with. The same
text is annex C of ANSI X9.24-3:2017.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial

from glamd.crypto.blocks import TDEA_BLOCK_BYTES, encrypt_tdea
from glamd.crypto.counter_tree import CounterRule, KeyTree
from glamd.errors import FieldError, InputError

KEY_BYTES = 16
KSN_BYTES = 10

COUNTERS = CounterRule(width_bits=21, ones_limit=10)
"""A.3 Key Management Technique: counters with more than ten one bits are skipped."""

_C0_HALF = 0xC0C0C0C000000000
_C0_KEY = _C0_HALF << 64 | _C0_HALF
"""What makes the variant that the left half of a new key is generated under (A.2 and A.6)."""


class Usage(Enum):
    """A.4.1, table A-1: what is XORed into each half of the key, and whether figure A-2 follows."""

    PIN = (0x00000000000000FF, False)
    MAC_REQUEST = (0x000000000000FF00, False)
    MAC_RESPONSE = (0x00000000FF000000, False)
    DATA_REQUEST = (0x0000000000FF0000, True)
    DATA_RESPONSE = (0x000000FF00000000, True)

    def __init__(self, half_mask: int, one_way: bool) -> None:
        self.mask = half_mask << 64 | half_mask
        self.one_way = one_way


def initial_key(bdk: bytes, key_id: bytes) -> bytes:
    """A.6 Derivation of the Initial Key: 16 bytes from a BDK of 16 and an id of 10 bytes.

    `key_id` is the KSN with its 21 counter bits zero. Raises `InputError` for another length.
    """
    if len(bdk) != KEY_BYTES:
        raise InputError(
            "the base derivation key has the wrong length",
            fields=(FieldError("bdk", f"TDES DUKPT wants {KEY_BYTES} bytes"),),
        )
    _check_key_id(key_id)
    serial = bytes(key_id[:TDEA_BLOCK_BYTES])  # A.6: the eight leftmost bytes of what was cleared
    variant = (int.from_bytes(bdk, "big") ^ _C0_KEY).to_bytes(KEY_BYTES, "big")
    return encrypt_tdea(bytes(bdk), serial) + encrypt_tdea(variant, serial)


class Deriver:
    """One device's keys by transaction counter; holds the intermediate keys that counters share."""

    __slots__ = ("_tree",)

    def __init__(self, initial_key: bytes, key_id: bytes) -> None:
        """An initial key of 16 bytes and the KSN that it was loaded with (10, counter cleared).

        Raises `InputError` for another length.
        """
        if len(initial_key) != KEY_BYTES:
            raise InputError(
                "the initial key has the wrong length",
                fields=(FieldError("initial_key", f"TDES DUKPT wants {KEY_BYTES} bytes"),),
            )
        _check_key_id(key_id)
        # A.2: of the KSN only its 64 rightmost bits go into Crypto Register-1.
        register = int.from_bytes(key_id[-TDEA_BLOCK_BYTES:], "big")
        self._tree = KeyTree(COUNTERS, bytes(initial_key), partial(_generate_key, register))

    def transaction_key(self, counter: int) -> bytes:
        """A.3: the current key at this counter, 16 bytes. No device uses it as it is.

        Raises `InputError` (`KSN_INVALID`) for a counter that a device must skip.
        """
        return self._tree.key_at(counter)

    def working_keys(self, usage: Usage) -> Callable[[int], bytes]:
        """What gives this usage's key, 16 bytes, for a counter; raises as `transaction_key`."""
        return partial(_working_key, self._tree, usage.mask, usage.one_way)

    @property
    def held_keys(self) -> int:
        """How many intermediate keys are remembered, at most 21."""
        return len(self._tree)

    def forget(self) -> None:
        """Drop all key material; every derivation raises `CryptoError` from now on."""
        self._tree.forget()

    def __repr__(self) -> str:
        return "<TDES DUKPT Deriver, keys masked>"


def _generate_key(register: int, key: bytes, counter: int) -> bytes:
    """A.2, "Non-reversible Key Generation Process": the key of `counter` from its parent's.

    `register` is the KSN's 64 rightmost bits without the counter. Two DEA operations.
    """
    crypto_register = register | counter
    left, right = key[:TDEA_BLOCK_BYTES], int.from_bytes(key[TDEA_BLOCK_BYTES:], "big")
    new_right = _dea(left, crypto_register ^ right) ^ right
    # The key register is XORed with C0C0C0C000000000 in both halves, then the same once more.
    left = (int.from_bytes(left, "big") ^ _C0_HALF).to_bytes(TDEA_BLOCK_BYTES, "big")
    right ^= _C0_HALF
    new_left = _dea(left, crypto_register ^ right) ^ right
    return (new_left << 64 | new_right).to_bytes(KEY_BYTES, "big")


def _working_key(tree: KeyTree, mask: int, one_way: bool, counter: int) -> bytes:
    """A.4.1: the variant of the current key, for data encrypted once more under itself."""
    variant = (int.from_bytes(tree.key_at(counter), "big") ^ mask).to_bytes(KEY_BYTES, "big")
    # Figure A-2: each half of the variant under the whole variant, which is two blocks of ECB.
    return encrypt_tdea(variant, variant) if one_way else variant


def _dea(half_key: bytes, block: int) -> int:
    """Single DEA of one block, as numbers, because everything around it is XOR."""
    return int.from_bytes(encrypt_tdea(half_key, block.to_bytes(TDEA_BLOCK_BYTES, "big")), "big")


def _check_key_id(key_id: bytes) -> None:
    if len(key_id) != KSN_BYTES:
        raise InputError(
            "the key serial number has the wrong length",
            fields=(FieldError("ksn", f"TDES DUKPT wants {KSN_BYTES} bytes"),),
        )
    if int.from_bytes(key_id[-4:], "big") & (1 << COUNTERS.width_bits) - 1:
        raise InputError(
            "the id of an initial key has its counter bits cleared",
            fields=(FieldError("ksn", "its counter must be 0 here"),),
        )
