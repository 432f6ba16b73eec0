"""Reading a request's body: bounded, in time, strictly JSON, into a model that refuses extras.

What was sent is never echoed: an error names the field and the rule, not the value. A name that
the caller made up is shown only when it looks like a name.
"""

import asyncio
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, TypeAlias, TypeVar

import orjson
from aiohttp import HttpVersion11, hdrs, web
from pydantic import BaseModel, ConfigDict, ValidationError

from glamd.errors import FieldError, InputError
from glamd.http.limits import HttpLimits

MAX_ERRORS_SHOWN: Final = 20
MAX_DEPTH: Final = 32
"""Levels of objects and lists, the outermost included."""
MAX_VALUES: Final = 10_000
"""Values in a body, each of them an object's, an array's or itself; our time is theirs too."""
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1

WRONG_BODY: Final = "The body is not as it should be."
_MALFORMED: Final = "MALFORMED_JSON"
_TOO_LARGE: Final = "BODY_TOO_LARGE"

_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_MANY_DIGITS = re.compile(r"\d{8}")

Loc: TypeAlias = tuple[int | str, ...]
"""A place in a body: names and indexes, the outermost first."""

_Model = TypeVar("_Model", bound="Body")


class Body(BaseModel):
    """The base of every request model: no unknown fields, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )


class SlowBodyError(Exception):
    """The body did not come in time; the connection is closed without an answer."""


class ClientGoneError(Exception):
    """The client went away before its body was complete; there is nobody to answer."""


def refuse_early(request: web.BaseRequest, limits: HttpLimits) -> None:
    """Refuse by the headers alone what would be refused after reading.

    Raises `InputError` `UNSUPPORTED_MEDIA_TYPE` for a compressed body, `BODY_TOO_LARGE` for one
    that announces more than the limit, `BAD_REQUEST` for chunks before HTTP/1.1, which does not
    know them (RFC 9112, 6.1).
    """
    if not request.body_exists:
        return
    headers = request.headers
    if request.version < HttpVersion11 and hdrs.TRANSFER_ENCODING in headers:
        raise InputError("HTTP/1.0 has no chunks.", code="BAD_REQUEST")
    codings = {"identity", *_words(headers.getall("Content-Encoding", ()))}
    # What else may stand here (gzip, deflate) nothing of ours would undo.
    transfer = {"chunked", *_words(headers.getall("Transfer-Encoding", ()))}
    if codings != {"identity"} or transfer != {"chunked"}:
        raise InputError("Compressed bodies are not taken.", code="UNSUPPORTED_MEDIA_TYPE")
    length = request.content_length
    if length is not None and length > limits.body_bytes:
        raise _too_large(limits)


def _words(values: Iterable[str]) -> Iterator[str]:
    for value in values:
        yield from filter(None, (word.strip().lower() for word in value.split(",")))


async def read_body(request: web.BaseRequest, limits: HttpLimits) -> bytes:
    """All of the body, at most `limits.body_bytes` of it, within `limits.body_timeout_s`.

    Raises `InputError` (`BODY_TOO_LARGE`, or `BAD_REQUEST` for broken chunks), `SlowBodyError`,
    `ClientGoneError`.
    """
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport:
        # Only now is it known that the body is wanted; before, a refusal needed none of it.
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise _too_large(limits)
    except TimeoutError as error:
        raise SlowBodyError from error
    except ConnectionError as error:
        raise ClientGoneError from error
    except web.RequestPayloadError as error:
        raise InputError("The body is not valid HTTP.", code="BAD_REQUEST") from error
    return bytes(body)


def parse_json(request: web.BaseRequest, raw: bytes, model: type[_Model]) -> _Model:
    """The body as `model`.

    Raises `InputError` as `parse_any` does, or `VALIDATION_ERROR` with the fields.
    """
    parse_any(request, raw)
    try:
        body = model.model_validate_json(raw)
    except ValidationError as error:
        if any(e["type"] == "json_invalid" for e in error.errors(include_url=False)):
            raise _malformed() from None
        # `from None`: the cause would carry the input into a log.
        raise InputError(WRONG_BODY, fields=_fields(error)) from None
    wrong = unfit(body)
    if wrong:
        raise InputError(WRONG_BODY, fields=wrong)
    return body


def parse_any(request: web.BaseRequest, raw: bytes) -> object:
    """The body as whatever JSON it is, for who judges it by rules of their own.

    Raises `InputError`: `UNSUPPORTED_MEDIA_TYPE`, `MALFORMED_JSON` (not JSON, not UTF-8, a
    duplicate name, NaN, too deep), or `BODY_TOO_LARGE` (too many values).
    """
    charset = (request.charset or "utf-8").lower()
    if request.content_type != "application/json" or charset not in ("utf-8", "utf8"):
        raise InputError(
            "The body must be application/json in UTF-8.", code="UNSUPPORTED_MEDIA_TYPE"
        )
    return _tree(raw)


def _tree(raw: bytes) -> object:
    try:
        tree: object = orjson.loads(raw)
        _refuse_excess(tree)
        # orjson is the judge of syntax and silently takes the last of two equal names; the
        # standard library's parser is the one that lets us see both.
        json.loads(raw, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError):
        raise _malformed() from None
    return tree


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice")


def _refuse_excess(tree: object) -> None:
    """Bound the body's depth and the number of its values, level by level and not by recursion."""
    level = [tree] if isinstance(tree, dict | list) else []
    values = 1
    for _ in range(MAX_DEPTH):
        inner = [each for container in level for each in _inside(container)]
        values += len(inner)
        if values > MAX_VALUES:
            raise InputError(f"The body holds more than {MAX_VALUES} values.", code=_TOO_LARGE)
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return
    raise InputError(f"The body is nested deeper than {MAX_DEPTH} levels.", code=_MALFORMED)


def _inside(container: dict[str, object] | list[object]) -> Iterable[object]:
    return container.values() if isinstance(container, dict) else container


def unfit(model: BaseModel) -> list[FieldError]:
    """What no column of ours can hold, in the fields that a model declares, whatever it says.

    It would come as far as the database and fail there. A field that is a free object is its own
    judge: what it holds may never get into a column.
    """
    return list(islice(_unfit(model, ()), MAX_ERRORS_SHOWN))


def _unfit(value: object, loc: Loc) -> Iterator[FieldError]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _unfit(getattr(value, name), (*loc, name))
    elif isinstance(value, list | tuple | frozenset):
        for at, item in enumerate(value):
            yield from _unfit(item, (*loc, at))
    elif isinstance(value, str):
        if "\x00" in value:
            yield FieldError(_name(loc), "A text may not hold a NUL.")
    elif isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
        yield FieldError(_name(loc), "This number is beyond 64 bits.")


def _malformed() -> InputError:
    return InputError(
        "The body is not well-formed JSON, or a name stands twice in it, or it is nested too deep.",
        code=_MALFORMED,
    )


def _too_large(limits: HttpLimits) -> InputError:
    return InputError(f"The body is larger than {limits.body_bytes} bytes.", code=_TOO_LARGE)


def _fields(error: ValidationError) -> list[FieldError]:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [
        FieldError(_name(e["loc"]), sentence(e["type"], e["msg"])) for e in found[:MAX_ERRORS_SHOWN]
    ]


def _name(loc: Loc) -> str:
    """The dotted name of a place in the body; a part that looks like data becomes `?`."""
    parts = []
    for part in loc:
        text = str(part)
        known = isinstance(part, int) or (
            _FIELD_NAME.fullmatch(text) and not _MANY_DIGITS.search(text)
        )
        parts.append(text if known else "?")
    return ".".join(parts) or "body"


_SENTENCES = {
    "extra_forbidden": "This field is not known.",
    "string_pattern_mismatch": "It does not have the right form.",
    "uuid_parsing": "It should be a UUID.",
}


def sentence(kind: str, message: str) -> str:
    """pydantic's own sentence, but where it would show a regular expression or a piece of input."""
    return _SENTENCES.get(kind, message)
