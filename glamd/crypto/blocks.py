"""Bare blocks under AES and TDEA, which is what DUKPT, MACs and check values are built of.

The one place with ECB in it, and the one that knows in what form `cryptography` wants a TDEA key
(it keeps TDEA among what is decrepit). Nothing but key material should be encrypted through here:
for messages there are CBC in `dukpt` and GCM in `aead`.
"""

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES

TDEA_BLOCK_BYTES = 8
AES_BLOCK_BYTES = 16

# X9.24 derives keys with single blocks under ECB, and no other mode gives two that do not depend on
# one another in one call.
_ECB = modes.ECB()  # noqa: S305


def tdea(key: bytes) -> TripleDES:
    """TDEA under a key of 8 bytes (K K K, which is single DEA), 16 (K1 K2 K1) or 24."""
    return TripleDES((key * 3)[:24])


def odd_parity(key: bytes | bytearray) -> bytes:
    """The key with the lowest bit of every byte set so that its one bits are odd in number.

    As DES keys have it (FIPS 46-3); DES itself takes no notice.
    """
    return bytes(byte & 0xFE | (byte >> 1).bit_count() + 1 & 1 for byte in key)


def encrypt_tdea(key: bytes, blocks: bytes) -> bytes:
    """Each block of 8 bytes by itself, under a key of 8 (single DEA), 16 or 24 bytes."""
    return Cipher(tdea(key), _ECB).encryptor().update(blocks)


def encrypt_aes(key: bytes, blocks: bytes) -> bytes:
    """Each block of 16 bytes by itself, under a key of 16, 24 or 32 bytes."""
    return Cipher(AES(key), _ECB).encryptor().update(blocks)
