"""DUKPT as the rest of glamd sees it: two schemes behind one face, by a key set's profile.

A KSN is taken apart here, one device's messages are decrypted and their MACs verified, and the
virtual terminal finds the device's half of both. How keys are derived stands in `dukpt_tdes` and
`dukpt_aes`. Whether a counter was used before, and what the clear bytes mean, is not known here.

Padding `zero` is not taken off: the clear data comes back with up to a block less one byte of 00
behind it. Chip data may itself end in 00 (a PAN sequence number, tag 5F34, mostly does), so that
only who knows its form can tell the two apart. `glamd.payments.card` takes trailing 00 as padding.
"""

import hmac
from collections.abc import Callable, Collection
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers import BlockCipherAlgorithm, Cipher, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from glamd.crypto import blocks, dukpt_aes, dukpt_tdes, kcv, mac
from glamd.crypto.counter_tree import CounterRule
from glamd.errors import CryptoError, FieldError, InputError

TDES_DUKPT = "tdes-dukpt"
AES_DUKPT = "aes-dukpt"

MAX_MESSAGE_BYTES = 16 * 1024
"""A whole request of the terminals' contract is not larger than this."""

_TDES_USAGES = {"data": dukpt_tdes.Usage.DATA_REQUEST, "pin": dukpt_tdes.Usage.PIN}
_AES_USAGES = {"encrypt": dukpt_aes.Usage.DATA_ENCRYPT, "both": dukpt_aes.Usage.DATA_BOTH}
_PADDINGS = frozenset({"zero", "pkcs7", "none"})
_MAC_RULES = frozenset({"optional", "required"})


# ---- the parts of a KSN


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """A KSN of one scheme, in bytes: how long it is, how much of it is the id, its counters."""

    ksn_bytes: int
    key_id_bytes: int
    counters: CounterRule

    @property
    def counter_mask(self) -> int:
        return (1 << self.counters.width_bits) - 1


_LAYOUTS = {
    # The TDES counter ends inside a byte, so that the id is the KSN with the counter cleared.
    TDES_DUKPT: _Layout(
        ksn_bytes=dukpt_tdes.KSN_BYTES,
        key_id_bytes=dukpt_tdes.KSN_BYTES,
        counters=dukpt_tdes.COUNTERS,
    ),
    AES_DUKPT: _Layout(
        ksn_bytes=dukpt_aes.KSN_BYTES,
        key_id_bytes=dukpt_aes.KEY_ID_BYTES,
        counters=dukpt_aes.COUNTERS,
    ),
}


def ksn_length_bytes(scheme: str) -> int:
    """How long a KSN of this scheme is: 10 or 12 bytes. `InputError` for an unknown scheme."""
    return _layout(scheme).ksn_bytes


def initial_key_id(scheme: str, ksn: bytes) -> bytes:
    """The id of the device's initial key: TDES the KSN with its counter cleared, AES its 8 first.

    Raises `InputError` for an unknown scheme or a KSN of the wrong length.
    """
    layout = _layout(scheme)
    cleared = _ksn_number(layout, ksn) & ~layout.counter_mask
    return cleared.to_bytes(layout.ksn_bytes, "big")[: layout.key_id_bytes]


def counter_of(scheme: str, ksn: bytes) -> int:
    """The transaction counter in a KSN, valid or not; raises as `initial_key_id`."""
    layout = _layout(scheme)
    return _ksn_number(layout, ksn) & layout.counter_mask


def ksn_with_counter(scheme: str, key_id: bytes, counter: int) -> bytes:
    """The KSN of an initial key id and a counter; `InputError` where either does not fit."""
    layout = _layout(scheme)
    if len(key_id) != layout.key_id_bytes:
        raise _wrong("ksn", f"an id of {scheme} has {layout.key_id_bytes} bytes")
    number = int.from_bytes(key_id.ljust(layout.ksn_bytes, b"\0"), "big")
    if number & layout.counter_mask or not 0 <= counter <= layout.counter_mask:
        raise _wrong("ksn", f"its counter has {layout.counters.width_bits} bits, clear in the id")
    return (number | counter).to_bytes(layout.ksn_bytes, "big")


def valid_counter(scheme: str, counter: int) -> bool:
    """Whether a device may use this counter: not 0, at most ten (AES sixteen) one bits."""
    return _layout(scheme).counters.valid(counter)


def next_counter(scheme: str, counter: int) -> int | None:
    """The counter that a device uses after this one (0 for a new one); None when exhausted."""
    return _layout(scheme).counters.next_after(counter)


def initial_key(scheme: str, bdk: bytes, ksn: bytes) -> bytes:
    """The initial key of the device with this KSN (any counter), as long as its BDK.

    Raises `InputError` for an unknown scheme, or a BDK or KSN of the wrong length.
    """
    key_id = initial_key_id(scheme, ksn)
    derive = dukpt_tdes.initial_key if scheme == TDES_DUKPT else dukpt_aes.initial_key
    return derive(bdk, key_id)


def key_check_value(key: bytes, scheme: str) -> str:
    """The KCV of a key of this scheme in 6 upper-case hexadecimals; raises as those of `kcv`."""
    return (kcv.tdes(key) if scheme == TDES_DUKPT else kcv.aes(key)).hex().upper()


def _layout(scheme: str) -> _Layout:
    layout = _LAYOUTS.get(scheme)
    if layout is None:
        raise _wrong("scheme", f"it is {TDES_DUKPT} or {AES_DUKPT}")
    return layout


def _ksn_number(layout: _Layout, ksn: bytes) -> int:
    if len(ksn) != layout.ksn_bytes:
        raise _wrong("ksn", f"a KSN of this scheme has {layout.ksn_bytes} bytes")
    return int.from_bytes(ksn, "big")


def _wrong(field: str, message: str) -> InputError:
    return InputError(f"{field}: {message}", fields=(FieldError(field, message),))


# ---- how the devices of a key set encrypt


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How the devices of one key set encrypt. A `data_usage` left empty becomes the default.

    | field | values, default first |
    | --- | --- |
    | `scheme` | `tdes-dukpt`, `aes-dukpt`; no default |
    | `data_usage` | TDES `data`, `pin`; AES `encrypt` (0x3000), `both` (0x3002) |
    | `key_type` | None (TDES; AES: the BDK's), `aes-128`, `aes-192`, `aes-256`, `2tdea`, `3tdea` |
    | `padding` | `zero`, `pkcs7`, `none` |
    | `mac` | `optional`, `required`; upheld by who receives the message |

    Raises `InputError` that names every field with a value that is none of its own.
    """

    scheme: str
    data_usage: str = ""
    key_type: str | None = None
    padding: str = "zero"
    mac: str = "optional"

    def __post_init__(self) -> None:
        tdes = self.scheme == TDES_DUKPT
        usages = tuple(_TDES_USAGES if tdes else _AES_USAGES)
        types = () if tdes else tuple(kind.label for kind in dukpt_aes.KeyType)
        if not self.data_usage:
            object.__setattr__(self, "data_usage", usages[0])
        chosen: list[tuple[str, str, Collection[str]]] = [
            ("scheme", self.scheme, _LAYOUTS),
            ("data_usage", self.data_usage, usages),
            ("padding", self.padding, _PADDINGS),
            ("mac", self.mac, _MAC_RULES),
        ]
        if self.key_type is not None:
            chosen.append(("key_type", self.key_type, types))
        wrong = [
            FieldError(field, f"it is one of: {', '.join(sorted(values)) or 'nothing here'}")
            for field, value, values in chosen
            if value not in values
        ]
        if wrong:
            names = ", ".join(error.field for error in wrong)
            raise InputError(f"the key set's profile is wrong in: {names}", fields=wrong)


# ---- one device


class Dukpt:
    """One device's messages under its initial key, as host and, for a terminal, as device.

    It remembers at most 21 (AES 32) intermediate keys. One object is for one thread at a time.
    """

    __slots__ = (
        "_block_bytes",
        "_cbc",
        "_cipher",
        "_data_key",
        "_deriver",
        "_key_id",
        "_mac",
        "_mac_key",
        "_profile",
    )

    def __init__(self, profile: Profile, initial_key: bytes, key_id: bytes) -> None:
        """`key_id` as `initial_key_id` gives it, the key as `initial_key` does.

        Raises `InputError` for either of the wrong length, and where the profile's key type is
        stronger than the initial key (X9.24-3, 6.1.3).
        """
        self._profile = profile
        self._key_id = bytes(key_id)
        self._cipher: Callable[[bytes], BlockCipherAlgorithm] = blocks.tdea
        self._block_bytes = blocks.TDEA_BLOCK_BYTES
        self._data_key: Callable[[int], bytes]
        self._mac_key: Callable[[int], bytes]
        self._deriver: dukpt_tdes.Deriver | dukpt_aes.Deriver
        if profile.scheme == TDES_DUKPT:
            self._set_up_tdes(dukpt_tdes.Deriver(initial_key, key_id))
        else:
            self._set_up_aes(dukpt_aes.Deriver(initial_key, key_id))
        self._cbc = modes.CBC(bytes(self._block_bytes))

    def _set_up_tdes(self, deriver: dukpt_tdes.Deriver) -> None:
        self._deriver = deriver
        self._data_key = deriver.working_keys(_TDES_USAGES[self._profile.data_usage])
        self._mac_key = deriver.working_keys(dukpt_tdes.Usage.MAC_REQUEST)
        self._mac = mac.RETAIL_MAC

    def _set_up_aes(self, deriver: dukpt_aes.Deriver) -> None:
        self._deriver = deriver
        named = self._profile.key_type and dukpt_aes.KeyType.named(self._profile.key_type)
        data_type = named or deriver.key_type
        # The MAC is an AES-CMAC whatever the data is under, so a TDEA type is not for its key.
        mac_type = data_type if data_type.is_aes else deriver.key_type
        usage = _AES_USAGES[self._profile.data_usage]
        self._data_key = deriver.working_keys(usage, data_type)
        self._mac_key = deriver.working_keys(dukpt_aes.Usage.MAC_GENERATION, mac_type)
        self._mac = mac.AES_CMAC
        if data_type.is_aes:
            self._cipher = AES
            self._block_bytes = blocks.AES_BLOCK_BYTES

    def decrypt(self, counter: int, ciphertext: bytes) -> bytearray:
        """The clear data of one message, in a buffer for the caller to overwrite.

        CBC with an IV of zeros; what is said of `zero` padding at the top of this file holds.
        Raises `CryptoError` for a length or padding that cannot be, and `InputError`
        (`KSN_INVALID`) for a counter that a device must skip.
        """
        size = len(ciphertext)
        block_bytes = self._block_bytes
        if not 0 < size <= MAX_MESSAGE_BYTES or size % block_bytes:
            raise CryptoError("the ciphertext has a length that it cannot have")
        algorithm = self._cipher(self._data_key(counter))
        clear = bytearray(size + block_bytes - 1)  # the room that `update_into` asks for
        Cipher(algorithm, self._cbc).decryptor().update_into(ciphertext, clear)
        del clear[size:]
        if self._profile.padding == "pkcs7":
            self._strip_pkcs7(clear)
        return clear

    def encrypt(self, counter: int, clear: bytes | bytearray) -> bytes:
        """What a device sends for this clear data.

        Raises `InputError` where there is none, too much, or padding is `none` and does not fit.
        """
        short = -len(clear) % self._block_bytes
        if self._profile.padding == "pkcs7":
            short = short or self._block_bytes
            padded = clear + bytes((short,)) * short
        elif short and self._profile.padding == "none":
            raise _wrong("data", f"without padding it is a multiple of {self._block_bytes} bytes")
        else:
            padded = clear + bytes(short)
        if not 0 < len(padded) <= MAX_MESSAGE_BYTES:
            raise _wrong("data", f"it is 1 to {MAX_MESSAGE_BYTES} bytes with its padding")
        algorithm = self._cipher(self._data_key(counter))
        return Cipher(algorithm, self._cbc).encryptor().update(padded)

    def verify_mac(self, counter: int, ciphertext: bytes, mac: bytes) -> bool:
        """Whether this MAC (TDES 4 or 8 bytes, AES 8 or 16) is the ciphertext's, in constant time.

        False for any other length; `InputError` (`KSN_INVALID`) as in `decrypt`.
        """
        return self._mac.verify(self._mac_key(counter), ciphertext, mac)

    def mac(self, counter: int, ciphertext: bytes, length_bytes: int) -> bytes:
        """The MAC that a device sends with this ciphertext; `InputError` for another length."""
        key = self._mac_key(counter)
        return self._mac.generate(key, ciphertext, length_bytes=length_bytes)

    @property
    def held_keys(self) -> int:
        """How many intermediate keys are remembered, at most 21 (AES 32)."""
        return self._deriver.held_keys

    def forget(self) -> None:
        """Drop all key material; whatever needs a key raises `CryptoError` from now on."""
        self._deriver.forget()

    def _strip_pkcs7(self, clear: bytearray) -> None:
        """RFC 5652, 6.3; overwrites the buffer and raises `CryptoError` where it is not that."""
        count = clear[-1]
        whole = 0 < count <= self._block_bytes
        if not whole or not hmac.compare_digest(clear[-count:], bytes((count,)) * count):
            clear[:] = bytes(len(clear))
            raise CryptoError("the decrypted data has no valid padding")
        del clear[-count:]

    def __repr__(self) -> str:
        return f"<Dukpt {self._profile.scheme} id {self._key_id.hex().upper()}, keys masked>"
