"""Query and path parameters of the admin routes, checked and named as bodies are."""

import re
from uuid import UUID

from glamd.errors import FieldError, InputError, NotFoundError
from glamd.http.call import Call
from glamd.ids import as_uuid

DEFAULT_LIMIT = 50
MAX_LIMIT = 200

_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def limit_of(call: Call) -> int:
    """`?limit=`, 1 to 200, 50 where it is absent. Raises `InputError`."""
    text = call.request.query.get("limit", str(DEFAULT_LIMIT))
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_LIMIT:
        raise wrong("limit", f"It is a number from 1 to {MAX_LIMIT}.")
    return int(text)


def uuid_in_query(call: Call, name: str) -> UUID | None:
    """A UUID of the query, None where it is absent. Raises `InputError`."""
    text = call.request.query.get(name)
    if text is None:
        return None
    found = as_uuid(text)
    if found is None:
        raise wrong(name, "It is no UUID.")
    return found


def id_in_query(call: Call, name: str) -> str | None:
    """An id of the query, None where it is absent. Raises `InputError`."""
    text = call.request.query.get(name)
    if text is not None and not _ID.fullmatch(text):
        raise wrong(name, "It is no id.")
    return text


def merchant_in_path(call: Call) -> UUID:
    """The path's merchant id; what is no UUID is nobody's. Raises `NotFoundError`."""
    merchant_id = as_uuid(call.params["merchant_id"])
    if merchant_id is None:
        raise NotFoundError("There is no such merchant.", code="MERCHANT_NOT_FOUND")
    return merchant_id


def device_in_path(call: Call) -> str:
    """The path's device id; what cannot be one is none. Raises `NotFoundError`."""
    text = call.params["device_id"]
    if not _ID.fullmatch(text):
        raise NotFoundError("There is no such device.", code="DEVICE_NOT_FOUND")
    return text


def wrong(field: str, message: str) -> InputError:
    """An `InputError` about one field."""
    return InputError("The request is not as it should be.", fields=[FieldError(field, message)])
