"""The two MACs that terminals send: ISO 9797-1's retail MAC for TDES, CMAC for AES.

Which key, and over which bytes, is said by the caller. Whether a MAC must be there at all does not
belong here.
"""

import hmac
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC

from glamd.crypto.blocks import TDEA_BLOCK_BYTES, encrypt_tdea, tdea
from glamd.errors import FieldError, InputError

_CBC_DEA = modes.CBC(bytes(TDEA_BLOCK_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class MacAlgorithm:
    """A MAC with the lengths (bytes, leftmost kept) that it may be cut to; no other is taken."""

    name: str
    lengths_bytes: frozenset[int]
    compute: Callable[[bytes, bytes], bytes]

    def generate(self, key: bytes, message: bytes, *, length_bytes: int) -> bytes:
        """The MAC, cut to `length_bytes`; `InputError` for a length that is not one of its own."""
        if length_bytes not in self.lengths_bytes:
            lengths = " or ".join(str(length) for length in sorted(self.lengths_bytes))
            raise InputError(
                "the MAC has the wrong length",
                fields=(FieldError("mac", f"{self.name} has {lengths} bytes"),),
            )
        return self.compute(key, message)[:length_bytes]

    def verify(self, key: bytes, message: bytes, mac: bytes) -> bool:
        """Whether `mac` is this message's, compared in constant time; False for a wrong length."""
        if len(mac) not in self.lengths_bytes:
            return False
        return hmac.compare_digest(self.compute(key, message)[: len(mac)], mac)


def _retail_mac(key: bytes, message: bytes) -> bytes:
    """ISO/IEC 9797-1:2011, 7.4 MAC algorithm 3 (DEA), 6.3.2 padding method 1; key of 16 bytes."""
    # Method 1: zeros up to a whole block, and one block of zeros for an empty message.
    blocks = message + bytes(-len(message) % TDEA_BLOCK_BYTES if message else TDEA_BLOCK_BYTES)
    first, last = blocks[:-TDEA_BLOCK_BYTES], blocks[-TDEA_BLOCK_BYTES:]
    left = key[:TDEA_BLOCK_BYTES]
    if first:
        chained = Cipher(tdea(left), _CBC_DEA).encryptor().update(first)
        chain = int.from_bytes(chained[-TDEA_BLOCK_BYTES:], "big")
        last = (chain ^ int.from_bytes(last, "big")).to_bytes(TDEA_BLOCK_BYTES, "big")
    # The last DEA under K and output transformation 3 (decrypt under K', encrypt under K) are TDEA.
    return encrypt_tdea(key, last)


def _cmac(key: bytes, message: bytes) -> bytes:
    """NIST SP 800-38B with AES; key of 16, 24 or 32 bytes."""
    context = CMAC(AES(key))
    context.update(message)
    return context.finalize()


RETAIL_MAC = MacAlgorithm(
    name="the retail MAC", lengths_bytes=frozenset({4, 8}), compute=_retail_mac
)
"""ISO/IEC 9797-1 algorithm 3, padding method 1 (ANSI X9.19)."""

AES_CMAC = MacAlgorithm(name="AES-CMAC", lengths_bytes=frozenset({8, 16}), compute=_cmac)
"""NIST SP 800-38B."""
