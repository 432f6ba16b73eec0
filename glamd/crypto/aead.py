"""Sealing: AES-256-GCM with a random nonce, and bound to where the ciphertext is kept.

Sealed bytes are nonce (12), ciphertext (as long as the clear), tag (16). Which key version sealed
them, and what the associated data says (a row, a key's name), is decided above; nothing here stores
a key or knows one by name.

A random nonce is safe for 2^32 messages under one key (NIST SP 800-38D, 8.3), which is what the
cryptoperiod of a data key must stay below.
"""

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from glamd.errors import CryptoError

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16


class Sealer:
    """One key, ready to seal and open many times; setting it up costs more than a small message."""

    __slots__ = ("_cipher",)

    def __init__(self, key: bytes | bytearray) -> None:
        """A key of 32 bytes; raises `CryptoError` for another length."""
        if len(key) != KEY_BYTES:
            raise CryptoError(f"a sealing key has {KEY_BYTES} bytes")
        self._cipher = AESGCM(key)

    def seal(self, plaintext: bytes | bytearray, *, associated_data: bytes) -> bytes:
        """12 bytes of nonce, the ciphertext, 16 bytes of tag over it and the associated data."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plaintext, associated_data)

    def open_sealed(self, sealed: bytes, *, associated_data: bytes) -> bytearray:
        """What was sealed, in a buffer for the caller to overwrite.

        Raises `CryptoError` where the key, a byte of it or the associated data is not what it was.
        """
        clear_bytes = len(sealed) - NONCE_BYTES - TAG_BYTES
        if clear_bytes < 0:
            raise CryptoError("the sealed data is too short to be any")
        clear = bytearray(clear_bytes)
        view = memoryview(sealed)
        try:
            self._cipher.decrypt_into(
                view[:NONCE_BYTES], view[NONCE_BYTES:], associated_data, clear
            )
        except InvalidTag:
            raise CryptoError("the sealed data does not verify under this key and place") from None
        return clear

    def __repr__(self) -> str:
        return "<Sealer, key masked>"


def seal(key: bytes | bytearray, plaintext: bytes | bytearray, *, associated_data: bytes) -> bytes:
    """`Sealer.seal` under a key of 32 bytes that is used just once."""
    return Sealer(key).seal(plaintext, associated_data=associated_data)


def open_sealed(key: bytes | bytearray, sealed: bytes, *, associated_data: bytes) -> bytearray:
    """`Sealer.open_sealed` under a key of 32 bytes that is used just once."""
    return Sealer(key).open_sealed(sealed, associated_data=associated_data)
