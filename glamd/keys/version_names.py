"""What versions of a key are called, and what the one after a version is called. Pure."""

import re
from collections.abc import Collection
from typing import Final

from glamd.errors import ConflictError

VERSION_BYTES: Final = 32
"""How long the name of a version may be."""

_VERSION: Final = re.compile(rf"[A-Za-z0-9_.-]{{1,{VERSION_BYTES}}}", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]+$", re.ASCII)


def is_name(text: str) -> bool:
    """Whether a version may be called so."""
    return _VERSION.fullmatch(text) is not None


def next_name(version: str, used: Collection[str]) -> str:
    """The name of the version after this one, which none before it has: `v1`, `v2`; `a`, `a-2`.

    ConflictError where no name is left, which takes 10^32 rotations.
    """
    name = version
    for _ in range(len(used) + 1):
        name = _incremented(name)
        if name not in used:
            return name
    raise ConflictError("There is no name left for another version.", code="KEY_NAMES_USED_UP")


def _incremented(name: str) -> str:
    number = _NUMBER.search(name)
    if number is None:
        return f"{name[: VERSION_BYTES - 2]}-2"
    digits = str(int(number[0]) + 1).zfill(len(number[0]))
    # Where the name becomes too long, its front gives way.
    return f"{name[: min(number.start(), VERSION_BYTES - len(digits))]}{digits}"[-VERSION_BYTES:]
