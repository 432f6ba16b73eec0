"""A JWT's text taken apart, strictly, before anything in it is believed.

A token has one spelling: three parts of canonical base64url without padding, each name of each
object once. What JWS allows beyond that (keys in the header, critical extensions, detached or
compressed or nested payloads) is refused, whoever signed it. No key, clock or rule of ours lives
here; keys are for `jwks` and `signers`, what the claims mean is for `auth`.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NoReturn

from glamd.errors import UnauthenticatedError
from glamd.revocations.service import is_revocable

MAX_TOKEN_CHARS: Final = 4096

Reason = Literal[
    "missing",
    "malformed",
    "algorithm",
    "unknown_key",
    "signature",
    "revoked",
    "expired",
    "not_yet_valid",
    "lifetime",
    "audience",
    "claims",
]
"""Why a bearer was refused; the `outcome` of the metrics."""

_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")

# A token brings no key of its own (jwk, jku, x5c, x5u), is not encrypted, compressed, detached or
# nested (enc, zip, b64, cty), and asks for no extension (crit), of which we know none.
_REFUSED_HEADERS = frozenset({"jwk", "jku", "x5c", "x5u", "enc", "zip", "b64", "cty", "crit"})

# RFC 8725, 3.11: what the same key signed for another use (a logout, a proof of possession) is no
# access token. RFC 7515, 4.1.9: a media type, in any case, its `application/` mostly left out.
_TYPES = frozenset({"jwt", "at+jwt"})


_JSON_SPACE = " \t\r\n"


class RefusedTokenError(UnauthenticatedError):
    """A bearer that is not believed; `reason` is for metrics, the message for the caller."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def refused(reason: Reason, what: str) -> RefusedTokenError:
    """The error for a token that is, or has, `what`."""
    return RefusedTokenError(reason, f"The token {what}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Jws:
    """A token's parts; nothing of it is verified. `claims` reads the payload."""

    algorithm: str
    kid: str | None = field(repr=False)
    signing_input: bytes = field(repr=False)
    payload: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    def claims(self) -> Mapping[str, object]:
        """The payload as an object; `RefusedTokenError` where it is none."""
        try:
            return json_object(self.payload)
        except ValueError:
            raise refused("malformed", "has claims that cannot be read") from None


def take_apart(token: str) -> Jws:
    """The parts of a compact JWS; `RefusedTokenError` for anything that is spelled otherwise."""
    parts = _COMPACT.fullmatch(token) if len(token) <= MAX_TOKEN_CHARS else None
    if parts is None:
        raise refused("malformed", "is not a JWT")
    try:
        header = json_object(base64url(parts[1]))
        payload, signature = base64url(parts[2]), base64url(parts[3])
    except ValueError:
        raise refused("malformed", "is not a JWT") from None
    if not _REFUSED_HEADERS.isdisjoint(header):
        raise refused("malformed", "has a header that is not taken")
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.lower().removeprefix("application/") not in _TYPES:
        raise refused("malformed", "is of a type that is not taken")
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str):
        raise refused("malformed", "names no algorithm")
    # Whatever is believed must be such that it can be revoked.
    if "kid" in header and not (isinstance(kid, str) and is_revocable(kid)):
        raise refused("malformed", "names its key by what is no name")
    return Jws(
        algorithm=algorithm,
        kid=kid if isinstance(kid, str) else None,
        signing_input=token[: parts.end(2)].encode("ascii"),
        payload=payload,
        signature=signature,
    )


def base64url(text: str) -> bytes:
    """The bytes of unpadded base64url (RFC 7515, 2); ValueError unless it is their one spelling."""
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise ValueError("not base64url") from None
    # The last character may carry bits that do not count, and the decoder skips what is none.
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii") != text:
        raise ValueError("not the canonical spelling")
    return raw


def json_object(raw: bytes) -> dict[str, object]:
    """A JSON object in UTF-8, each name once in each object, no NaN; ValueError otherwise."""
    # Given bytes, the parser would take UTF-16 and UTF-32 too.
    text = raw.decode("utf-8")
    # What is no object at all gets no further than the parser, so that there is one kind of error.
    if not text.lstrip(_JSON_SPACE).startswith("{"):
        raise ValueError("not an object")
    try:
        found: dict[str, object] = json.loads(
            text, object_pairs_hook=_each_once, parse_constant=_no_number
        )
    except RecursionError:
        raise ValueError("nested too deep") from None
    return found


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
