"""What an event looks like on the wire: the body and headers we send, the shapes we take. Pure.

Bytes in, frozen objects out. Nothing here knows NATS, the database or what an event does. An error
names the field and the rule, never the value.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

import orjson
from pydantic import ValidationError

from glamd.card_numbers import holds_one
from glamd.errors import FieldError, InputError
from glamd.events.schemas import EventData

OUR_NAME: Final = "glamd"
"""`source_service` in our bodies and `ce-source` in our headers."""

MSG_ID: Final = "Nats-Msg-Id"
CE_SOURCE: Final = "ce-source"

MAX_BODY_BYTES: Final = 64 * 1024
"""Of a consumed body. The largest that a neighbour has reason to send are a few kilobytes."""

MAX_DEPTH: Final = 32
"""Objects and arrays within one another in a consumed body."""

MAX_ID_CHARS: Final = 200
MAX_FIELDS_NAMED: Final = 10

NO_CORRELATION: Final = "-"
"""Correlation id of an event that brought neither one nor an id of its own."""

D = TypeVar("D", bound=EventData)

_SUBJECT = re.compile(r"(?:evt|cmd)(?:\.[A-Za-z0-9_-]{1,64}){1,12}")
_CLOUDEVENTS: Final = ("0.3", "1.0")

_SENTENCES: Final = {
    "missing": "it is missing",
    "int_type": "it is not an integer",
    "string_type": "it is not a text",
    "greater_than_equal": "it is too small",
    "less_than_equal": "it is too large",
    "string_too_short": "it is empty",
    "string_too_long": "it is too long",
    "string_pattern_mismatch": "it has characters that it must not have",
    "uuid_parsing": "it is not a UUID",
    "uuid_type": "it is not a UUID",
    "moment_form": "it is not a time of RFC 3339",
    "decimal_parsing": "it is not a decimal number",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Generic[D]):
    """A consumed event: `data` is checked, `event_id` is None where the reference has to decide."""

    subject: str
    event_id: str | None
    correlation_id: str
    data: D


def outgoing_body(*, event_id: str, subject: str, correlation_id: str, at: str, data: str) -> bytes:
    """The body as the older services' consumers want it; `data` is JSON already."""
    return orjson.dumps(
        {
            "event_id": event_id,
            "event_type": subject,
            "correlation_id": correlation_id,
            "timestamp": at,
            "source_service": OUR_NAME,
            "data": orjson.Fragment(data),
            "metadata": {},
        }
    )


def outgoing_headers(*, event_id: str, subject: str, merchant_id: str, at: str) -> bytes:
    """The id by which JetStream drops repeats, and the attributes of CloudEvents 1.0 (binary).

    As the block that goes over the wire (NATS ADR-4), to be called with ids, times and subjects
    only, which have no line breaks.
    """
    return (
        f"NATS/1.0\r\n{MSG_ID}: {event_id}\r\nce-specversion: 1.0\r\nce-id: {event_id}\r\n"
        f"ce-type: {subject}\r\n{CE_SOURCE}: {OUR_NAME}\r\nce-time: {at}\r\n"
        f"ce-subject: {merchant_id}\r\n\r\n"
    ).encode()


def is_subject(subject: str) -> bool:
    """Whether this is a subject to publish to: `evt.` or `cmd.`, plain words between the dots."""
    return _SUBJECT.fullmatch(subject) is not None


def read(model: type[D], *, body: bytes, headers: Mapping[str, str]) -> Event[D] | None:
    """The event in any of the shapes of spec 3; None where it is one of our own that came back.

    InputError `EVENT_TOO_LARGE`, `EVENT_MALFORMED` or `VALIDATION_ERROR` with the fields.
    """
    if headers.get(CE_SOURCE) == OUR_NAME:
        return None
    content = _json_object(body)
    found = _opened(content)
    if found.source == OUR_NAME:
        return None
    event_id = _event_id(content, headers)
    given = found.data
    if None in given.values():
        # A field that is there and null is as good as one that is not there.
        given = {name: value for name, value in given.items() if value is not None}
    try:
        data = model.model_validate(given)
    except ValidationError as error:
        # `from None`: the cause would carry the input into a log.
        raise _invalid(_fields(error)) from None
    return Event(
        subject=model.SUBJECT,
        event_id=event_id,
        correlation_id=_harmless(_plain(found.correlation_id) or event_id) or NO_CORRELATION,
        data=data,
    )


def id_of(body: bytes, headers: Mapping[str, str]) -> str | None:
    """The event's id as far as it can be told from a message that may be anything."""
    try:
        return _event_id(_json_object(body), headers)
    except InputError:
        return _plain(headers.get(MSG_ID))


# ---- the three shapes


class _Opened(NamedTuple):
    data: Mapping[str, object]
    source: object
    correlation_id: object


def _opened(content: Mapping[str, object]) -> _Opened:
    if "specversion" in content:
        return _cloudevent(content)
    correlation_id = content.get("correlation_id")
    source = content.get("source_service")
    data = content.get("data")
    if isinstance(data, dict):
        return _Opened(data, source, correlation_id)
    if data is not None or "event_type" in content:
        raise _invalid([FieldError("data", "it is not an object")])
    return _Opened(content, source, correlation_id)


def _cloudevent(content: Mapping[str, object]) -> _Opened:
    """Structured mode of CloudEvents; `correlationid` is an extension, as their names allow it."""
    if content["specversion"] not in _CLOUDEVENTS:
        raise _invalid([FieldError("specversion", f"it is none of {', '.join(_CLOUDEVENTS)}")])
    data = content.get("data")
    if not isinstance(data, dict):
        raise _invalid([FieldError("data", "it is not an object")])
    correlation_id = content.get("correlationid") or content.get("correlation_id")
    return _Opened(data, content.get("source"), correlation_id)


def _event_id(content: Mapping[str, object], headers: Mapping[str, str]) -> str | None:
    for name in ("event_id", "id"):
        if (given := content.get(name)) is not None:
            plain = _plain(given)
            if plain is None:
                reason = f"it is not a text of 1 to {MAX_ID_CHARS} printable characters"
                raise _invalid([FieldError(name, reason)])
            return plain
    return _plain(headers.get(MSG_ID))


def _harmless(correlation_id: str | None) -> str | None:
    """A correlation id that may be published again, or None: it is kept in rows and events."""
    if correlation_id is None or holds_one(correlation_id.encode()):
        return None
    return correlation_id


def _plain(given: object) -> str | None:
    """An id of printable ASCII that is neither empty nor long, or None; numbers are ids too."""
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    if not isinstance(given, str) or not given.isascii() or not given.isprintable():
        return None
    return given if 0 < len(given) <= MAX_ID_CHARS else None


# ---- bounds and errors


def _json_object(body: bytes) -> dict[str, object]:
    if len(body) > MAX_BODY_BYTES:
        raise InputError(
            f"The event is larger than {MAX_BODY_BYTES} bytes.", code="EVENT_TOO_LARGE"
        )
    try:
        content = orjson.loads(body)
    except ValueError:  # of orjson, whose recursion is bounded by itself
        raise _malformed("is not JSON") from None
    if not isinstance(content, dict):
        raise _malformed("is not an object")
    # Most have two or three brackets in all, and need not be walked through.
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and _is_deep(content):
        raise _malformed(f"is deeper than {MAX_DEPTH} levels")
    return content


def _is_deep(content: object) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [one for each in level for one in _inside(each) if isinstance(one, dict | list)]
    return bool(level)


def _inside(container: object) -> list[object]:
    if isinstance(container, dict):
        return list(container.values())
    assert isinstance(container, list)
    return container


def _malformed(why: str) -> InputError:
    return InputError(f"The event {why}.", code="EVENT_MALFORMED")


def _invalid(fields: list[FieldError]) -> InputError:
    return InputError("The event is not as it should be.", fields=fields)


def _fields(error: ValidationError) -> list[FieldError]:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [
        FieldError(
            ".".join(str(part) for part in each["loc"]),
            # pydantic's own sentences may quote a piece of the input.
            _SENTENCES.get(each["type"], f"it is not valid ({each['type']})"),
        )
        for each in found[:MAX_FIELDS_NAMED]
    ]
