"""Putting a base derivation key together out of components that different people hold.

Pure: who types what, and that nothing is echoed or kept, is for the command that asks. Where the
key goes then is for `service`.

Fields are named by position from 0, as in every list of a request: `components.1.kcv` is the check
value of the second component.
"""

import hmac
from collections.abc import Sequence

from glamd.crypto import kcv
from glamd.crypto.dukpt import AES_DUKPT, TDES_DUKPT
from glamd.errors import FieldError, InputError

COMPONENTS_MIN = 2
COMPONENTS_MAX = 3

BDK_LENGTHS_BYTES = {TDES_DUKPT: (16,), AES_DUKPT: (16, 24, 32)}
"""How long a BDK may be: TDES DUKPT knows double length only (ANSI X9.24-1:2009, A.2)."""


def combine(components: Sequence[tuple[bytes, str]], scheme: str) -> bytes:
    """XOR two or three components, each with its KCV (6 hexadecimals), into a BDK.

    A TDES key comes back with odd parity in every byte, since XOR does not keep it. Raises
    InputError that names the field which is wrong.
    """
    if not COMPONENTS_MIN <= len(components) <= COMPONENTS_MAX:
        raise wrong("components", f"{COMPONENTS_MIN} or {COMPONENTS_MAX} of them make a key")
    length = len(components[0][0])
    result = bytearray(length)
    for number, (component, typed) in enumerate(components):
        field = f"components.{number}"
        check_length(component, scheme, field=field)
        if len(component) != length:
            raise wrong(field, f"it must be as long as the first one, {length} bytes")
        if not any(component):
            raise wrong(field, "it is zero: the others alone would be the key")
        check_kcv(component, scheme, typed, field=f"{field}.kcv")
        for index, byte in enumerate(component):
            result[index] ^= byte
    if not any(result):
        raise wrong("components", "together they are zero: one was entered twice")
    return odd_parity(result) if scheme == TDES_DUKPT else bytes(result)


def key_check_value(key: bytes, scheme: str) -> str:
    """A key's KCV in 6 upper-case hexadecimals (ANSI X9.24-1:2017, annex A)."""
    return (kcv.tdes(key) if scheme == TDES_DUKPT else kcv.aes(key)).hex().upper()


def odd_parity(key: bytes | bytearray) -> bytes:
    """The key with the lowest bit of every byte set so that its one bits are odd in number."""
    return bytes(byte & 0xFE | (byte >> 1).bit_count() + 1 & 1 for byte in key)


def check_length(key: bytes, scheme: str, *, field: str) -> None:
    """Raise InputError, which names `field`, unless the scheme has keys of this length."""
    lengths = BDK_LENGTHS_BYTES.get(scheme)
    if lengths is None:
        raise wrong("scheme", f"it is one of {', '.join(BDK_LENGTHS_BYTES)}")
    if len(key) not in lengths:
        several = ", ".join(str(length) for length in lengths)
        raise wrong(field, f"a base derivation key of {scheme} has {several} bytes")


def check_kcv(key: bytes, scheme: str, typed: str, *, field: str) -> None:
    """Raise InputError, which names `field`, unless this KCV was typed; constant-time."""
    expected = key_check_value(key, scheme).encode()
    if not hmac.compare_digest(typed.strip().upper().encode(errors="replace"), expected):
        raise wrong(field, "the check value does not fit: one of the two was mistyped")


def wrong(field: str, message: str) -> InputError:
    """An InputError about one field; the message holds no byte of what was entered."""
    return InputError(f"{field}: {message}", fields=(FieldError(field, message),))
