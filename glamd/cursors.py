"""Cursors of lists that are ordered by a moment and an id: how they are given out, and read again.

Opaque to callers, not secret: whoever forges one sees a page of what is his own. Pure.
"""

import base64
import binascii
from datetime import UTC, datetime
from typing import Final

from glamd.errors import FieldError, InputError

LIMIT_CHARS: Final = 128


def encode(at: datetime, row_id: str) -> str:
    """The cursor behind the row of this moment, aware, and this id."""
    return base64.urlsafe_b64encode(f"{at.isoformat()}|{row_id}".encode()).decode()


def decode(cursor: str) -> tuple[datetime, str]:
    """The moment in UTC and the id, of ASCII without NUL; InputError for what is none of ours."""
    if len(cursor) > LIMIT_CHARS:
        raise not_ours()
    try:
        text = base64.b64decode(cursor, altchars=b"-_", validate=True).decode()
        moment, _, row_id = text.partition("|")
        at = datetime.fromisoformat(moment)
        if at.tzinfo is None or not row_id.isascii() or "\0" in row_id:
            raise not_ours()
        # A forged one can name a moment that is before year 1 or after year 9999 in UTC.
        return at.astimezone(UTC), row_id
    except (binascii.Error, ValueError, OverflowError):
        raise not_ours() from None


def not_ours() -> InputError:
    """What is said of a cursor that was not given out here."""
    return InputError(
        "The cursor is not one of ours.", fields=(FieldError("cursor", "is not one of ours"),)
    )
