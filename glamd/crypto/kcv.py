"""Key check values: three bytes that tell keys apart and tell nothing else about them.

They may be shown wherever a key is named. Comparing one that was typed in, and saying what is wrong
when it differs, does not belong here.
"""

from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC

from glamd.crypto.blocks import AES_BLOCK_BYTES, TDEA_BLOCK_BYTES, encrypt_tdea
from glamd.errors import FieldError, InputError

KCV_BYTES = 3


def tdes(key: bytes) -> bytes:
    """The KCV of a TDES key of 16 or 24 bytes: a block of zeros under ECB, its first 3 bytes.

    ANSI X9.24-1:2017, annex A (its legacy method). Raises `InputError` for another length.
    """
    if len(key) not in {16, 24}:
        raise _wrong_length("a TDES key has 16 or 24 bytes")
    return encrypt_tdea(key, bytes(TDEA_BLOCK_BYTES))[:KCV_BYTES]


def aes(key: bytes) -> bytes:
    """The KCV of an AES key of 16, 24 or 32 bytes: the CMAC of a block of zeros, its first 3 bytes.

    ANSI X9.24-1:2017, annex A (its CMAC method). Raises `InputError` for another length.
    """
    if len(key) not in {16, 24, 32}:
        raise _wrong_length("an AES key has 16, 24 or 32 bytes")
    context = CMAC(AES(key))
    context.update(bytes(AES_BLOCK_BYTES))
    return context.finalize()[:KCV_BYTES]


def _wrong_length(message: str) -> InputError:
    return InputError("the key has the wrong length", fields=(FieldError("key", message),))
