"""What a platform's answer to a refresh means: a new secret, or who has to mend what. Pure.

An answer is a stranger's. Nothing of it goes further but the tokens, into the sealed secret, and of
an error one of the codes that the standard registers: no text, no number, no header. A new pair is
not given up for a flaw beside it, such as a lifetime that makes no sense, because the platform may
have withdrawn the old pair when it wrote the answer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final, Literal

import orjson

from glamd.credentials.model import ACCESS_TOKEN, REFRESH_TOKEN, Secret
from glamd.credentials.refresh.settings import LIFETIME_MAX_S
from glamd.errors import GlamError

TOKEN_CHARS: Final = 16 * 1024
SCOPES_LIMIT: Final = 256
SCOPE_CHARS: Final = 256
RETRY_AFTER_MAX_S: Final = 3600.0
"""We wait no longer because a platform says so: what is written there may be a mistake."""

Remedy = Literal["time", "operator", "merchant"]
"""What mends a failure: trying again, our own configuration, or the merchant who connects anew."""

_REFUSALS: Final[Mapping[str, tuple[str, Remedy]]] = {
    "invalid_grant": ("INVALID_GRANT", "merchant"),
    # With this and a 401 Shopify refuses a refresh token that is not active any more.
    "invalid_request": ("INVALID_REQUEST", "merchant"),
    "invalid_client": ("INVALID_CLIENT", "operator"),
    "unauthorized_client": ("UNAUTHORIZED_CLIENT", "operator"),
    "unsupported_grant_type": ("UNSUPPORTED_GRANT_TYPE", "operator"),
    "invalid_scope": ("INVALID_SCOPE", "operator"),
    "temporarily_unavailable": ("TEMPORARILY_UNAVAILABLE", "time"),
    "server_error": ("SERVER_ERROR", "time"),
}
"""The error codes of RFC 6749, 5.2, and those two of 4.1.2.1 that servers send here too."""


class RefreshError(GlamError):
    """A refresh failed; `code` is from a fixed list, `retry_after_s` what the platform asks for."""

    default_code = "UNKNOWN"

    def __init__(
        self, code: str, *, remedy: Remedy = "time", retry_after_s: float | None = None
    ) -> None:
        super().__init__("The platform token was not renewed.", code=code)
        self.remedy = remedy
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """A new secret; `scopes` is None where the answer does not change them."""

    secret: Secret
    expires_at: datetime
    lifetime_s: float
    scopes: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RawAnswer:
    """An answer as it came, its body bounded; the new pair may be in it."""

    status: int
    retry_after: str | None
    body: bytes = field(repr=False)


def judge(
    answer: RawAnswer, old: Secret, *, sent_at: datetime, assumed_lifetime_s: float
) -> Renewed:
    """The new secret in this answer (RFC 6749, 5.1); RefreshError for any other answer.

    Lifetimes count from `sent_at`, so that a slow answer makes a token seem older, never younger.
    """
    retry_after_s = _retry_after_s(answer.retry_after, now=sent_at)
    if answer.status == 429:
        raise RefreshError("RATE_LIMITED", retry_after_s=retry_after_s)
    if answer.status >= 500 or answer.status == 408:
        raise RefreshError("SERVER_ERROR", retry_after_s=retry_after_s)
    if 300 <= answer.status < 400:
        raise RefreshError("REDIRECTED", remedy="operator")
    fields = _object(answer.body)
    if fields is not None and isinstance(fields.get("error"), str):
        code, remedy = _REFUSALS.get(str(fields["error"]), ("UNKNOWN", "operator"))
        raise RefreshError(code, remedy=remedy)
    if not 200 <= answer.status < 300:
        raise RefreshError("UNKNOWN", remedy="operator")
    if fields is None:
        raise RefreshError("NOT_JSON")
    return _renewed(fields, old, sent_at=sent_at, assumed_lifetime_s=assumed_lifetime_s)


def _renewed(
    fields: Mapping[str, object], old: Secret, *, sent_at: datetime, assumed_lifetime_s: float
) -> Renewed:
    access_token = _token(fields.get(ACCESS_TOKEN))
    refresh_token = fields.get(REFRESH_TOKEN)
    # A platform that does not replace refresh tokens leaves the field out, or empty (RFC 6749, 6).
    kept = old.refresh_token if refresh_token in (None, "") else _token(refresh_token)
    token_type = fields.get("token_type")
    # Shopify gives no type. Another one than bearer could not be used by those who read it (7.1).
    if not (token_type is None or (isinstance(token_type, str) and token_type.lower() == "bearer")):
        raise RefreshError("BAD_ANSWER")
    told_s = _seconds(fields.get("expires_in"))
    lifetime_s = assumed_lifetime_s if told_s is None else told_s
    changed: dict[str, object] = {ACCESS_TOKEN: access_token, REFRESH_TOKEN: kept}
    for name in ("expires_in", "refresh_token_expires_in"):
        if _seconds(fields.get(name)) is not None:
            changed[name] = fields[name]
    scopes = _scopes(fields.get("scope"))
    if scopes is not None:
        changed["scope"] = fields["scope"]
    return Renewed(
        secret=Secret({**old.data, **changed}),
        expires_at=sent_at + timedelta(seconds=lifetime_s),
        lifetime_s=lifetime_s,
        scopes=scopes,
    )


def _object(body: bytes) -> Mapping[str, object] | None:
    try:
        found: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _token(value: object) -> str:
    """Printable ASCII (RFC 6749, A.12 and A.17), of bounded length; RefreshError otherwise."""
    if isinstance(value, str) and 0 < len(value) <= TOKEN_CHARS and _is_plain(value):
        return value
    raise RefreshError("BAD_ANSWER")


def _seconds(value: object) -> float | None:
    """A lifetime, also as a numeral in a string; None for what cannot be one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not (value.isascii() and value.isdigit() and len(value) <= 12):
        return None
    seconds = float(value)
    return seconds if math.isfinite(seconds) and 0 < seconds <= LIFETIME_MAX_S else None


def _scopes(value: object) -> tuple[str, ...] | None:
    """The granted scopes, in either separator: the standard's is a space, Shopify's a comma."""
    if not isinstance(value, str) or not _is_plain(value):
        return None
    scopes = tuple(dict.fromkeys(value.replace(",", " ").split()))
    if not scopes or len(scopes) > SCOPES_LIMIT or any(len(one) > SCOPE_CHARS for one in scopes):
        return None
    return scopes


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _retry_after_s(value: str | None, *, now: datetime) -> float | None:
    """Seconds out of a Retry-After header (RFC 9110, 10.2.3), at most RETRY_AFTER_MAX_S."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:12]), RETRY_AFTER_MAX_S)
    try:
        at = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return min(max((at - now).total_seconds(), 0.0), RETRY_AFTER_MAX_S)
