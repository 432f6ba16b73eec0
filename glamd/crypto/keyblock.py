"""Key blocks of TR-31 and X9.143: a base derivation key out of one, under its protection key.

Only what carries a whole base derivation key (BDK), may be used as one and fits the scheme comes
out; the rest is refused by the name of what is wrong. The versions B (TDES) and D (AES) are read.
psec does the unwrapping; making key blocks does not live here, nor does asking for the protection
key (KBPK).

`exportability` says what the one who holds the key may do with it afterwards; glamd gives no key
away, so that every value is taken.
"""

import warnings
from typing import Final, NoReturn

from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC
from cryptography.utils import CryptographyDeprecationWarning
from psec import tr31

from glamd.crypto import kcv
from glamd.crypto.blocks import (
    AES_BLOCK_BYTES,
    TDEA_BLOCK_BYTES,
    encrypt_aes,
    encrypt_tdea,
    tdea,
)
from glamd.crypto.dukpt import AES_DUKPT, TDES_DUKPT
from glamd.errors import FieldError, InputError

HEADER_CHARS: Final = 16
BLOCK_LIMIT_CHARS: Final = 9999
"""The header writes the block's length in four digits."""

FILE_LIMIT_CHARS: Final = 16 * 1024
"""A block with the line ends of a file in it is no longer than this."""

KBPK_LENGTHS_BYTES: Final = {"B": (16, 24), "D": (16, 24, 32)}
"""How long a protection key may be, by the block's version (X9.143, key derivation methods)."""

_OUTDATED: Final = frozenset("AC")
_BDK_USAGE: Final = "B0"
_DERIVES: Final = "X"
_ALGORITHMS: Final = {TDES_DUKPT: "T", AES_DUKPT: "A"}
_COMPONENT: Final = "c"
"""First character of the key version number where the block carries a component of a key."""

_LEGACY: Final = "00"
_CMAC: Final = "01"
_HEX: Final = frozenset("0123456789ABCDEFabcdef")


def protection_scheme(block: str) -> str:
    """The scheme whose check values a protection key has: TDES for version B, AES for D.

    InputError (`key_block`, `key_block.version`) for every other block.
    """
    version = _one_line(block)[0]
    if version in _OUTDATED:
        _refuse("key_block.version", f"version {version} is outdated; have it made as B or D")
    if version not in KBPK_LENGTHS_BYTES:
        _refuse("key_block.version", "it is B (TDES) or D (AES)")
    return TDES_DUKPT if version == "B" else AES_DUKPT


def kbpk_lengths(block: str) -> tuple[int, ...]:
    """How long its protection key may be, in bytes; InputError as `protection_scheme`."""
    protection_scheme(block)
    return KBPK_LENGTHS_BYTES[_one_line(block)[0]]


def check_header(block: str, *, scheme: str) -> None:
    """Refuse, before anybody types a protection key, what is no BDK of this scheme.

    InputError as `unwrap_bdk`.
    """
    text = _one_line(block)
    _check_attributes(text, protection_scheme(block), scheme)
    _check_shape(text)


def unwrap_bdk(block: str, *, kbpk: bytes, scheme: str) -> bytes:
    """The BDK (TDES 16 bytes; AES 16, 24 or 32) that a key block carries for this scheme.

    `kbpk` has 16 or 24 bytes for version B and 16, 24 or 32 for D. InputError names `key_block`,
    `key_block.version`, `.usage`, `.algorithm`, `.mode_of_use`, `.key_version` or `kbpk`; its
    message holds nothing of a key. X9.143: 2022, key block binding by key derivation.
    """
    check_header(block, scheme=scheme)
    protection, text = protection_scheme(block), _one_line(block)
    if len(kbpk) not in KBPK_LENGTHS_BYTES[text[0]]:
        several = ", ".join(str(length) for length in KBPK_LENGTHS_BYTES[text[0]])
        _refuse("kbpk", f"the protection key of version {text[0]} has {several} bytes")
    unwrapping = tr31.KeyBlock(kbpk)
    try:
        with warnings.catch_warnings():
            # psec takes TDEA from where cryptography had it before it was called decrepit.
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            key = unwrapping.unwrap(text)
    except ValueError:
        _refuse("kbpk", "the block does not open under this key, or was changed on its way")
    blocks = unwrapping.header.blocks
    _check_said(blocks.get("KP"), kbpk, protection, "kbpk", "the block names another one (KP)")
    if scheme == AES_DUKPT and len(kbpk) < len(key):
        _refuse("kbpk", "it is weaker than the key that it protects")
    _check_said(blocks.get("KC"), key, scheme, "key_block", "its own check value (KC) differs")
    return key


def _one_line(block: str) -> str:
    """The block without the line ends that a file has; printable ASCII, as long as it says."""
    text = "".join(block.split("\n")).replace("\r", "").strip(" \t")
    if not (text.isascii() and text.isprintable()):
        _refuse("key_block", "it is printable ASCII, and nothing else")
    if not HEADER_CHARS <= len(text) <= BLOCK_LIMIT_CHARS:
        _refuse("key_block", f"it has {HEADER_CHARS} to {BLOCK_LIMIT_CHARS} characters")
    if text[1:5] != f"{len(text):04}":
        _refuse("key_block", "its header gives another length: it is damaged, or cut")
    return text


def _check_attributes(text: str, protection: str, scheme: str) -> None:
    """Refuse by the header alone, before a key is touched: it is in the clear."""
    if text[5:7] != _BDK_USAGE:
        _refuse("key_block.usage", f"it must be {_BDK_USAGE}, a base derivation key")
    if scheme not in _ALGORITHMS:
        _refuse("scheme", f"it is one of {', '.join(_ALGORITHMS)}")
    if text[7] != _ALGORITHMS[scheme]:
        _refuse("key_block.algorithm", f"it must be {_ALGORITHMS[scheme]} for {scheme}")
    if text[8] != _DERIVES:
        _refuse("key_block.mode_of_use", f"it must be {_DERIVES}, for deriving keys")
    if text[9] == _COMPONENT:
        _refuse("key_block.key_version", "it carries a component and not a whole key")
    if scheme == AES_DUKPT and protection != AES_DUKPT:
        _refuse("key_block.version", "an AES key is protected by AES, which is version D")


def _check_shape(text: str) -> None:
    """Refuse what cannot be a block whatever its key is, so that the key is not blamed for it."""
    header = tr31.Header()
    try:
        length = header.load(text)
    except ValueError:
        _refuse("key_block", "its header is damaged")
    # Python reads hexadecimals with blanks between them as well; a key block has none.
    if not _HEX.issuperset(text[length:]):
        _refuse("key_block", "behind its header are hexadecimals, and nothing else")


def _check_said(said: str | None, key: bytes, scheme: str, field: str, message: str) -> None:
    """Compare a check value that the block gives itself; one of an unknown kind is passed over."""
    if said is None or len(said) < 2 + 2 * kcv.KCV_BYTES:
        return
    expected = _check_value(key, scheme, said[:2])
    if expected is not None and said[2 : 2 + len(expected)].upper() != expected:
        _refuse(field, message)


def _check_value(key: bytes, scheme: str, method: str) -> str | None:
    zeros = bytes(TDEA_BLOCK_BYTES if scheme == TDES_DUKPT else AES_BLOCK_BYTES)
    if method == _LEGACY:
        value = (encrypt_tdea if scheme == TDES_DUKPT else encrypt_aes)(key, zeros)
    elif method == _CMAC:
        context = CMAC(tdea(key) if scheme == TDES_DUKPT else AES(key))
        context.update(zeros)
        value = context.finalize()
    else:
        return None
    return value[: kcv.KCV_BYTES].hex().upper()


def _refuse(field: str, message: str) -> NoReturn:
    raise InputError(f"{field}: {message}", fields=(FieldError(field, message),)) from None
