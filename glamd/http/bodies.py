"""Reading a request's body: bounded, in time, strictly JSON, into a model that refuses extras.

What was sent is never echoed: an error names the field and the rule, not the value. A name that
the caller made up is shown only when it looks like a name.
"""

import asyncio
import json
import re
from typing import TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from glamd.errors import FieldError, InputError
from glamd.http.limits import HttpLimits

MAX_ERRORS_SHOWN = 20

_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_MANY_DIGITS = re.compile(r"\d{8}")

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
    that announces more than the limit.
    """
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise InputError("Compressed bodies are not taken.", code="UNSUPPORTED_MEDIA_TYPE")
    length = request.content_length
    if length is not None and length > limits.body_bytes:
        raise _too_large(limits)


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

    Raises `InputError`: `UNSUPPORTED_MEDIA_TYPE`, `MALFORMED_JSON` (not JSON, not UTF-8, a
    duplicate name, NaN, too deep), or `VALIDATION_ERROR` with the fields.
    """
    charset = (request.charset or "utf-8").lower()
    if request.content_type != "application/json" or charset not in ("utf-8", "utf8"):
        raise InputError(
            "The body must be application/json in UTF-8.", code="UNSUPPORTED_MEDIA_TYPE"
        )
    _refuse_malformed(raw)
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        if any(e["type"] == "json_invalid" for e in error.errors(include_url=False)):
            raise _malformed() from None
        # `from None`: the cause would carry the input into a log.
        raise InputError("The body is not as it should be.", fields=_fields(error)) from None


def _refuse_malformed(raw: bytes) -> None:
    try:
        orjson.loads(raw)
        # orjson is the judge of syntax and silently takes the last of two equal names; the
        # standard library's parser is the one that lets us see both.
        json.loads(raw, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError):
        raise _malformed() from None


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice")


def _malformed() -> InputError:
    return InputError(
        "The body is not well-formed JSON, or a name stands twice in it.", code="MALFORMED_JSON"
    )


def _too_large(limits: HttpLimits) -> InputError:
    return InputError(f"The body is larger than {limits.body_bytes} bytes.", code="BODY_TOO_LARGE")


def _fields(error: ValidationError) -> list[FieldError]:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [
        FieldError(_name(e["loc"]), _sentence(e["type"], e["msg"]))
        for e in found[:MAX_ERRORS_SHOWN]
    ]


def _name(loc: tuple[int | str, ...]) -> str:
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
}


def _sentence(kind: str, message: str) -> str:
    """pydantic's own sentence, but where it would show a regular expression."""
    return _SENTENCES.get(kind, message)
