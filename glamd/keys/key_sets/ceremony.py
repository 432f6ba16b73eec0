"""Putting a key together out of components that different people hold.

Pure: that nothing is echoed or kept is for the command that asks, and it checks each component here
as it is typed; where the key goes then is for `service`.

Fields are named by position from 0, as in every list of a request: `components.1.kcv` is the check
value of the second component.
"""

import hmac
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from glamd.crypto.blocks import odd_parity
from glamd.crypto.dukpt import AES_DUKPT, TDES_DUKPT, key_check_value
from glamd.errors import FieldError, InputError

COMPONENTS_MIN: Final = 2
COMPONENTS_MAX: Final = 3
HOLDER_LIMIT_CHARS: Final = 64

BDK_LENGTHS_BYTES: Final = {TDES_DUKPT: (16,), AES_DUKPT: (16, 24, 32)}
"""How long a BDK may be: TDES DUKPT knows double length only (ANSI X9.24-1:2009, A.2)."""


@dataclass(frozen=True, slots=True)
class Component:
    """One component (as long as the key), who typed it, and the check value (6 hexadecimals)."""

    holder: str
    key: bytes = field(repr=False)
    kcv: str


class Ceremony:
    """Takes two or three components of one key, one by one, each from another holder."""

    def __init__(self, scheme: str, *, lengths: Sequence[int], field: str = "components") -> None:
        """`lengths` (bytes) are those that the key may have; `scheme` says what check values are.

        `field` is what the request calls the components.
        """
        self._scheme = scheme
        self._lengths = lengths
        self.field = field
        self._taken: list[Component] = []

    def check_holder(self, name: str) -> None:
        """Raise InputError unless this is a name, and of somebody who has not typed yet."""
        field = f"{self.field}.{len(self._taken)}.holder"
        if not (len(name.strip()) > 0 and len(name) <= HOLDER_LIMIT_CHARS and name.isprintable()):
            raise wrong(field, f"it is 1 to {HOLDER_LIMIT_CHARS} printable characters")
        if _folded(name) in {_folded(one.holder) for one in self._taken}:
            raise wrong(field, "this person has typed a component already; each is another's")

    def take(self, component: Component) -> None:
        """Check one component with its holder and check value; InputError by the field's name."""
        field = f"{self.field}.{len(self._taken)}"
        if len(self._taken) == COMPONENTS_MAX:
            raise self._wrong_number()
        self.check_holder(component.holder)
        check_length(component.key, self._lengths, field=field)
        if self._taken and len(component.key) != len(self._taken[0].key):
            length = len(self._taken[0].key)
            raise wrong(field, f"it must be as long as the first one, {length} bytes")
        bits = self._effective(component.key)
        if bits == self._effective(bytes(len(component.key))):
            raise wrong(field, "it is zero: the others alone would be the key")
        if bits in {self._effective(one.key) for one in self._taken}:
            raise wrong(field, "it is the same as another one: the two take each other away")
        check_kcv(component.key, self._scheme, component.kcv, field=f"{field}.kcv")
        self._taken.append(component)

    def key(self) -> bytes:
        """The XOR of what was taken; a TDES key with odd parity, which XOR does not keep.

        InputError where the components are too few or come to nothing.
        """
        if len(self._taken) < COMPONENTS_MIN:
            raise self._wrong_number()
        result = bytearray(len(self._taken[0].key))
        for component in self._taken:
            for index, byte in enumerate(component.key):
                result[index] ^= byte
        if self._effective(result) == self._effective(bytes(len(result))):
            raise wrong(self.field, "together they are zero, which is no key")
        return self._effective(result)

    def _effective(self, key: bytes | bytearray) -> bytes:
        """The key as its algorithm sees it: TDES does not look at parity bits."""
        return odd_parity(key) if self._scheme == TDES_DUKPT else bytes(key)

    def _wrong_number(self) -> InputError:
        return wrong(self.field, f"{COMPONENTS_MIN} or {COMPONENTS_MAX} of them make a key")


def combine(components: Iterable[Component], ceremony: Ceremony) -> bytes:
    """The key of these components; InputError that names the field which is wrong."""
    for component in components:
        ceremony.take(component)
    return ceremony.key()


def bdk_ceremony(scheme: str) -> Ceremony:
    """A ceremony for a BDK of this scheme; InputError (`scheme`) where there is no such scheme."""
    return Ceremony(scheme, lengths=bdk_lengths(scheme))


def bdk_lengths(scheme: str) -> tuple[int, ...]:
    """How long a BDK may be, in bytes; InputError (`scheme`) where there is no such scheme."""
    lengths = BDK_LENGTHS_BYTES.get(scheme)
    if lengths is None:
        raise wrong("scheme", f"it is one of {', '.join(BDK_LENGTHS_BYTES)}")
    return lengths


def check_length(key: bytes, lengths: Sequence[int], *, field: str) -> None:
    """Raise InputError, which names `field`, unless the key has one of these lengths in bytes."""
    if len(key) not in lengths:
        several = ", ".join(str(length) for length in lengths)
        raise wrong(field, f"such a key has {several} bytes")


def check_kcv(key: bytes, scheme: str, typed: str, *, field: str) -> None:
    """Raise InputError, which names `field`, unless this KCV was typed; constant-time."""
    expected = key_check_value(key, scheme).encode()
    if not hmac.compare_digest(typed.strip().upper().encode(errors="replace"), expected):
        raise wrong(field, "the check value does not fit: one of the two was mistyped")


def wrong(field: str, message: str) -> InputError:
    """An InputError about one field; the message holds no byte of what was entered."""
    return InputError(f"{field}: {message}", fields=(FieldError(field, message),))


def _folded(name: str) -> str:
    """A name as people compare it: case and blanks make nobody another person."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())
