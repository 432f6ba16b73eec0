"""Card readers as their vendors describe them: what they encrypt, and what they put around it.

The other half of `glamd.payments.readers`, and on purpose without a line of `glamd`: TDES comes
from `cryptography`, the keys from the device's own algorithm in `dukpt_device`, and every envelope
is written out from the vendor's description. TDES only, since that is what these readers do.
"""

from functools import reduce
from operator import xor

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes

from tests.support.dukpt_device import TdesDevice

BDK = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
INITIAL_KSN = bytes.fromhex("FFFF9876543210E00000")


def _ecb(key: bytes, blocks: bytes) -> bytes:
    return Cipher(TripleDES((key * 3)[:24]), modes.ECB()).encryptor().update(blocks)


def _mask(key: bytes, pattern: str) -> bytes:
    return bytes(a ^ b for a, b in zip(key, bytes.fromhex(pattern), strict=True))


def initial_key(ksn: bytes = INITIAL_KSN) -> bytes:
    """X9.24-1:2009, A.6."""
    other = _mask(BDK, "C0C0C0C000000000" * 2)
    return _ecb(BDK, ksn[:8]) + _ecb(other, ksn[:8])


class CardReader:
    """One reader at its next counter; `usage` is `data`, or `pin` as MagTek's older ones have."""

    def __init__(self, usage: str = "data") -> None:
        self._device = TdesDevice(initial_key(), INITIAL_KSN)
        self._usage = usage
        self.counter, self._key = self._device.take()

    def encrypt(self, clear: bytes) -> bytes:
        """CBC under the data key, IV and padding of zeros; each call begins anew."""
        if self._usage == "pin":
            key = _mask(self._key, "00000000000000FF" * 2)
        else:
            key = _mask(self._key, "0000000000FF0000" * 2)
            key = _ecb(key, key[:8]) + _ecb(key, key[8:])
        cbc = Cipher(TripleDES((key * 3)[:24]), modes.CBC(bytes(8))).encryptor()
        return cbc.update(clear + bytes(-len(clear) % 8))

    def mac(self, message: bytes) -> bytes:
        """ISO 9797-1 algorithm 3, 8 bytes: a chain of single DES, at its end under both halves."""
        key = _mask(self._key, "000000000000FF00" * 2)
        chain = bytes(8)
        for at in range(0, len(message), 8):
            chain = _ecb(key[:8], _mask(chain, message[at : at + 8].hex()))
        undone = Cipher(TripleDES(key[8:] * 3), modes.ECB()).decryptor().update(chain)
        return _ecb(key[:8], undone)


# ---- TLV


def tlv(tag: str, value: bytes) -> bytes:
    """One BER-TLV object."""
    size = len(value)
    length = bytes([size]) if size < 0x80 else b"\x82" + size.to_bytes(2, "big")
    return bytes.fromhex(tag) + length + value


def marked(tag: str, value: bytes, mark: int) -> bytes:
    """One object with ID TECH's flags: 0x40 encrypted, 0x20 masked, one byte of length behind."""
    return bytes.fromhex(tag) + bytes([0x81 | mark, len(value)]) + value


# ---- MagTek: what a MagneSafe V5 reader types


def magtek_masked(track: str, pan: str) -> str:
    """Four digits at either end stay, zeros stand for the rest, and for all behind the name."""
    shown = pan[:4] + "0" * (len(pan) - 8) + pan[-4:]
    head, _, tail = track.partition(pan)
    kept = tail[: tail.rindex("^") + 5] if "^" in tail else tail[:5]
    return head + shown + kept + "0" * (len(tail) - len(kept) - 1) + tail[-1:]


def magtek_line(reader: CardReader, *, pan: str, track1: str = "", track2: str = "") -> bytes:
    """Masked tracks, status, three tracks, MagnePrint and the rest, ended by CR."""
    masked = "".join(magtek_masked(track, pan) for track in (track1, track2) if track)
    encrypted = [
        reader.encrypt(track.encode()).hex().upper() if track else "" for track in (track1, track2)
    ]
    ksn = (INITIAL_KSN[:-1] + bytes([reader.counter])).hex().upper()
    fields = [
        masked,
        "0600",
        *encrypted,
        "",
        "A1050000",
        "8628E664C59BBAA2",
        "",
        "21685F158B5C6BE0",
    ]
    return "|".join([*fields, ksn, "B78F", "", "0000"]).encode() + b"\r"


def magtek_chip(reader: CardReader, clear: bytes, *, masked: str, details: bytes = b"") -> bytes:
    """SRED ARQC: F9 with FA, and in it the encrypted F8 beside what is shown."""
    inner = tlv("FC", clear)
    encrypted = reader.encrypt(inner)
    ksn = INITIAL_KSN[:-1] + bytes([reader.counter])
    sealed = tlv("DFDF59", encrypted) + tlv("DFDF56", ksn) + tlv("DFDF57", b"\x80")
    sealed += tlv("DFDF58", bytes([-len(inner) % 8]))
    shown = details + tlv("DFDF4D", masked.encode()) + tlv("DFDF52", b"\x05")
    arqc = tlv("70", shown + tlv("F8", sealed))
    head = tlv("DFDF54", ksn) + tlv("DFDF55", b"\x82") + tlv("DFDF25", b"12345678")
    return tlv("F9", head + tlv("FA", arqc))


# ---- ID TECH: 80000502-001


def idtech_masked(track: str, pan: str) -> str:
    """Stars for what is hidden; track 1 hides its format code too."""
    shown = pan[:4] + "*" * (len(pan) - 8) + pan[-4:]
    head, _, tail = track.replace("%B", "%*", 1).partition(pan)
    name_end = tail.rindex("^") + 1 if "^" in tail else 1
    return head + shown + tail[:name_end] + "*" * (len(tail) - name_end - 1) + "?"


def _frame(card: bytes) -> bytes:
    check = bytes([reduce(xor, card), sum(card) & 0xFF])
    return b"\x02" + len(card).to_bytes(2, "little") + card + check + b"\x03"


def idtech_frame(
    reader: CardReader, *, pan: str, track1: str = "", track2: str = "", optional: str = ""
) -> bytes:
    """The enhanced format: each track encrypted by itself, dummy hashes, serial number, KSN."""
    tracks = (track1, track2)
    present = sum(1 << bit for bit, track in enumerate(tracks) if track)
    card = bytes([0x80, 0x1F | (0x40 if optional else 0), len(track1), len(track2), 0])
    card += bytes([present | 0x80, present | present << 3 | 0x80])
    card += bytes([len(optional)]) + optional.encode() if optional else b""
    card += b"".join(idtech_masked(track, pan).encode() for track in tracks if track)
    card += b"".join(reader.encrypt(track.encode()) for track in tracks if track)
    card += bytes(20 * sum(1 for track in tracks if track))
    return _frame(card + b"310T406104" + INITIAL_KSN[:-1] + bytes([reader.counter]))


def idtech_original(reader: CardReader, *, pan: str, track1: str, track2: str) -> bytes:
    """The original format: both tracks, each with its check character, encrypted in one go."""
    card = bytes([0x00, 0x1B, len(track1) + 1, len(track2) + 1, 0])
    card += (idtech_masked(track1, pan) + "*" + idtech_masked(track2, pan) + "*").encode()
    card += reader.encrypt((track1 + "!" + track2 + "0").encode())
    return _frame(card + bytes(40) + INITIAL_KSN[:-1] + bytes([reader.counter]))


def idtech_chip(reader: CardReader, *, track2: bytes, pan: bytes, rest: bytes) -> bytes:
    """Tags 57 and 5A masked and encrypted: what is encrypted is the whole object, then zeros."""
    hidden = pan[:2] + b"\xcc" * 4 + pan[-2:]
    masked = hidden + b"\xd2\x51" + b"\xcc" * (len(track2) - len(hidden) - 2)
    return (
        marked("57", masked, 0x20)
        + marked("57", reader.encrypt(tlv("57", track2)), 0x40)
        + marked("5A", hidden, 0x20)
        + marked("5A", reader.encrypt(tlv("5A", pan)), 0x40)
        + rest
    )
