"""AES DUKPT after ANSI X9.24-3:2017, clause 6, as the receiving host does it.

A KSN is 12 bytes: the initial key id (BDK id and derivation id, 4 bytes each) and 4 bytes of
transaction counter. Everything is one function, AES-ECB over derivation data that says what the key
is for. Ciphers and MACs under the working keys do not belong here, nor does the device's own
algorithm with its intermediate key registers, which the tests have to compare with.
"""

from collections.abc import Callable
from enum import Enum, IntEnum
from functools import partial

from glamd.crypto.blocks import AES_BLOCK_BYTES, encrypt_aes
from glamd.crypto.counter_tree import CounterRule, KeyTree
from glamd.errors import FieldError, InputError

KSN_BYTES = 12
KEY_ID_BYTES = 8

COUNTERS = CounterRule(width_bits=32, ones_limit=16)
"""6.1 Algorithm Description: counters with more than sixteen one bits are skipped."""

UPDATE_KEY_COUNTER = 0xFFFFFFFF
"""6.5.3 Calculate DUKPT Update Key: a counter that no transaction ever has."""

_HALF_ID_BYTES = 4
_COUNTER_BYTES = 4


class Usage(IntEnum):
    """6.3.2, tables 2 and 3: the key usage indicators of working keys."""

    KEY_ENCRYPTION = 0x0002
    PIN = 0x1000
    MAC_GENERATION = 0x2000
    MAC_VERIFICATION = 0x2001
    MAC_BOTH = 0x2002
    DATA_ENCRYPT = 0x3000
    DATA_DECRYPT = 0x3001
    DATA_BOTH = 0x3002
    KEY_DERIVATION = 0x8000


_INITIAL_KEY_USAGE = 0x8001


class KeyType(Enum):
    """6.2.2 and 6.3.2: a kind of key by its name, its algorithm indicator and its length."""

    TDEA_2 = ("2tdea", 0x0000, 16)
    TDEA_3 = ("3tdea", 0x0001, 24)
    AES_128 = ("aes-128", 0x0002, 16)
    AES_192 = ("aes-192", 0x0003, 24)
    AES_256 = ("aes-256", 0x0004, 32)

    def __init__(self, label: str, indicator: int, length_bytes: int) -> None:
        self.label = label
        self.indicator = indicator
        self.length_bytes = length_bytes

    @property
    def is_aes(self) -> bool:
        """Whether this is an AES key; else it is a TDEA key of two or three parts."""
        return self.indicator >= KeyType.AES_128.indicator

    @classmethod
    def named(cls, label: str) -> "KeyType | None":
        """The type of this name, `aes-128` for one; None where there is none."""
        return next((kind for kind in cls if kind.label == label), None)

    @classmethod
    def of_derivation_key(cls, key: bytes, field: str) -> "KeyType":
        """The AES type of this length: 6.3.1, only AES keys derive.

        Raises `InputError` naming `field` for another length.
        """
        for kind in (cls.AES_128, cls.AES_192, cls.AES_256):
            if kind.length_bytes == len(key):
                return kind
        raise InputError(
            "the key that others are derived from has the wrong length",
            fields=(FieldError(field, "AES DUKPT wants 16, 24 or 32 bytes"),),
        )


class Derivation:
    """6.3.3 Create Derivation Data and 6.3.1 Derive Key for one usage, key type and device.

    Holds no secret: the parts of the derivation data that do not change with the counter.
    """

    __slots__ = ("_heads", "_length_bytes")

    def __init__(self, usage: int, key_type: KeyType, derivation_id: bytes) -> None:
        """`derivation_id` is the right half of the initial key id, 4 bytes."""
        # 6.3.2, table 2: version, block counter, usage, algorithm, length in bits, derivation id.
        rest = (
            usage.to_bytes(2, "big")
            + key_type.indicator.to_bytes(2, "big")
            + (key_type.length_bytes * 8).to_bytes(2, "big")
            + derivation_id
        )
        blocks = -(-key_type.length_bytes // AES_BLOCK_BYTES)
        # The empty part at the end lets `join` put the counter behind the last head as well.
        self._heads = (*(bytes((0x01, block)) + rest for block in range(1, blocks + 1)), b"")
        self._length_bytes = key_type.length_bytes

    def derive(self, key: bytes, counter: int) -> bytes:
        """6.3.1: the derived key, as long as its type says. One AES operation per 16 bytes."""
        return encrypt_aes(key, self.data(counter))[: self._length_bytes]

    def data(self, counter: int) -> bytes:
        """6.3.3: the derivation data itself, a block of 16 bytes for every 16 bytes of the key."""
        return counter.to_bytes(_COUNTER_BYTES, "big").join(self._heads)


def initial_key_data(key_type: KeyType, key_id: bytes) -> bytes:
    """6.3.3: what a BDK of this type encrypts (ECB) to an initial key, for who holds it elsewhere.

    One or two blocks of 16 bytes; the key is the leftmost part of the ciphertext, as long as its
    type says. Raises `InputError` for a `key_id` that is not 8 bytes.
    """
    derivation, counter = _initial_key_derivation(key_type, key_id)
    return derivation.data(counter)


def initial_key(bdk: bytes, key_id: bytes) -> bytes:
    """6.3.3 and 6.3.1: the initial key, as long as its BDK (16, 24 or 32 bytes).

    Raises `InputError` for another length of the BDK or of `key_id` (8 bytes).
    """
    key_type = KeyType.of_derivation_key(bdk, "bdk")
    derivation, counter = _initial_key_derivation(key_type, key_id)
    return derivation.derive(bytes(bdk), counter)


def _initial_key_derivation(key_type: KeyType, key_id: bytes) -> tuple[Derivation, int]:
    _check_key_id(key_id)
    # 6.3.2, table 3: here the whole id stands where later its right half and the counter do.
    derivation = Derivation(_INITIAL_KEY_USAGE, key_type, bytes(key_id[:_HALF_ID_BYTES]))
    return derivation, int.from_bytes(key_id[_HALF_ID_BYTES:], "big")


def update_key(initial_key: bytes, key_id: bytes, key_type: KeyType) -> bytes:
    """6.5.3 Calculate DUKPT Update Key: what the next initial key comes to the device under.

    It hangs below all 32 one bits, further down than any transaction's. Raises `InputError` for a
    key or id of the wrong length, and for a type stronger than the initial key.
    """
    _check_key_id(key_id)
    own_type = KeyType.of_derivation_key(initial_key, "initial_key")
    _check_strength(own_type, key_type)
    derivation_id = bytes(key_id[_HALF_ID_BYTES:])
    step = Derivation(Usage.KEY_DERIVATION, own_type, derivation_id)
    key = bytes(initial_key)
    for bit in reversed(range(COUNTERS.width_bits)):
        key = step.derive(key, UPDATE_KEY_COUNTER >> bit << bit)
    last = Derivation(Usage.KEY_ENCRYPTION, key_type, derivation_id)
    return last.derive(key, UPDATE_KEY_COUNTER)


class Deriver:
    """One device's keys by transaction counter; holds the intermediate keys that counters share."""

    __slots__ = ("_derivation_id", "_key_type", "_tree")

    def __init__(self, initial_key: bytes, key_id: bytes) -> None:
        """An initial key of 16, 24 or 32 bytes and its id of 8.

        Raises `InputError` for another length.
        """
        self._key_type = KeyType.of_derivation_key(initial_key, "initial_key")
        _check_key_id(key_id)
        self._derivation_id = bytes(key_id[_HALF_ID_BYTES:])
        # 6.4: intermediate keys are of the initial key's own type.
        step = Derivation(Usage.KEY_DERIVATION, self._key_type, self._derivation_id)
        self._tree = KeyTree(COUNTERS, bytes(initial_key), step.derive)

    @property
    def key_type(self) -> KeyType:
        """The type of the initial key, and so of every intermediate one."""
        return self._key_type

    def transaction_key(self, counter: int) -> bytes:
        """6.4: the intermediate derivation key at this counter, as long as the initial key.

        Raises `InputError` (`KSN_INVALID`) for a counter that a device must skip.
        """
        return self._tree.key_at(counter)

    def working_keys(self, usage: Usage, key_type: KeyType) -> Callable[[int], bytes]:
        """What gives the key of this usage and type for a counter; raises as `transaction_key`.

        Raises `InputError` at once where the type is stronger than the initial key.
        """
        _check_strength(self._key_type, key_type)
        derivation = Derivation(usage, key_type, self._derivation_id)
        return partial(_working_key, self._tree, derivation)

    @property
    def held_keys(self) -> int:
        """How many intermediate keys are remembered, at most 32."""
        return len(self._tree)

    def forget(self) -> None:
        """Drop all key material; every derivation raises `CryptoError` from now on."""
        self._tree.forget()

    def __repr__(self) -> str:
        return f"<AES DUKPT Deriver of {self._key_type.label}, keys masked>"


def _working_key(tree: KeyTree, derivation: Derivation, counter: int) -> bytes:
    return derivation.derive(tree.key_at(counter), counter)


def _check_strength(parent: KeyType, key_type: KeyType) -> None:
    """6.1.3: no working key is stronger than what it is derived from; any TDEA key is weaker."""
    if key_type.is_aes and key_type.length_bytes > parent.length_bytes:
        raise InputError(
            "a working key cannot be stronger than the initial key",
            fields=(FieldError("key_type", f"it can be {parent.label} at most"),),
        )


def _check_key_id(key_id: bytes) -> None:
    if len(key_id) != KEY_ID_BYTES:
        raise InputError(
            "the initial key id has the wrong length",
            fields=(FieldError("ksn", f"AES DUKPT wants {KEY_ID_BYTES} bytes before the counter"),),
        )
