"""UUIDs: how ours are made, in the order of their making, and how those of others are read.

What an id is of, and where it is kept, is for whoever asks.
"""

import os
import re
from datetime import datetime
from uuid import UUID

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def uuid7(now: datetime) -> UUID:
    """A UUIDv7 (RFC 9562, 5.7): 48 bits of milliseconds, 74 random ones."""
    milliseconds = int(now.timestamp() * 1000)
    value = milliseconds << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    return UUID(int=value)


def as_uuid(text: str) -> UUID | None:
    """The UUID of a text with its four hyphens (RFC 9562, 4), None for any other text.

    `UUID` by itself also takes braces, `urn:uuid:` and hyphens anywhere.
    """
    return UUID(text) if _UUID.fullmatch(text) else None
