"""What `/api/v1/tokens` takes and answers: the body's fields with their bounds, and the TypedDicts.

Pure. What a refused field held is in no message, and a model that holds a secret does not show it.
"""

import re
from datetime import UTC, datetime
from typing import Annotated, Final, Literal
from uuid import UUID

import orjson
from pydantic import (
    BeforeValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType, TypedDict

from glamd.credentials.model import Health, NewToken, Platform, Secret, TokenType
from glamd.http.bodies import Body
from glamd.http.idempotent import IdempotencyKey
from glamd.http.queries import Query

MAX_SECRET_BYTES: Final = 64 * 1024
"""Of `token_data` as compact JSON; real ones are a few hundred bytes."""

MAX_SECRET_DEPTH: Final = 16
"""Objects and arrays within one another, `token_data` itself counted."""

MAX_SHOP_ID_CHARS: Final = 255
MAX_DOMAIN_CHARS: Final = 253
MAX_SCOPES: Final = 256
MAX_SCOPE_CHARS: Final = 255
MAX_SCOPE_TEXT_CHARS: Final = 16 * 1024

_LEAST: Final = -(2**63)
_MOST: Final = 2**63 - 1

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
# The last label begins with a letter, so that no address passes for a host name.
_DOMAIN = rf"^(?:{_LABEL}\.)+[A-Za-z](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?$"
# Neither what steers a terminal, nor what is invisible or turns the direction of writing.
_SHOP_ID = r"^[^\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]+$"
# RFC 6749, 3.3, without the comma, by which some platforms separate their scopes.
_SCOPE_CHAR = "[!-+.-~-]"
_SCOPE = f"^{_SCOPE_CHAR}+$"
_BETWEEN_SCOPES = ", \t\r\n"
_SCOPE_TEXT = (
    rf"^[, \t\r\n]*(?:{_SCOPE_CHAR}{{1,{MAX_SCOPE_CHARS}}}(?:[, \t\r\n]+|$)){{0,{MAX_SCOPES}}}$"
)
_TIME = re.compile(
    r"\d{4}-\d\d-\d\d[Tt _]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:\d\d)?", re.ASCII
)

JsonTree = TypeAliasType(
    "JsonTree",
    "str | bool | Annotated[float, Field(ge=_LEAST, le=_MOST)] | list[JsonTree]"
    " | dict[str, JsonTree] | None",
)
"""What may stand in `token_data`. It is here for the published document: `_secret` validates, since
an error from inside would name what the merchant's platform calls its secrets."""


def _secret(given: object, _handler: ValidatorFunctionWrapHandler) -> object:
    """Hold `token_data` to its bounds; numbers are those that every JSON library can hold."""
    if not isinstance(given, dict) or not given:
        raise PydanticCustomError("secret_form", "It should be an object that is not empty.")
    containers: list[object] = [given]
    for _ in range(MAX_SECRET_DEPTH):
        inner = [one for container in containers for one in _inside(container)]
        if any(isinstance(one, int | float) and not _LEAST <= one <= _MOST for one in inner):
            raise PydanticCustomError("secret_number", "A number in it is beyond 2^63.")
        containers = [one for one in inner if isinstance(one, dict | list)]
    if containers:
        raise PydanticCustomError(
            "secret_depth", "It is deeper than {depth} levels.", {"depth": MAX_SECRET_DEPTH}
        )
    if len(orjson.dumps(given)) > MAX_SECRET_BYTES:
        raise PydanticCustomError(
            "secret_bytes", "It is larger than {bytes} bytes.", {"bytes": MAX_SECRET_BYTES}
        )
    return given


def _inside(container: object) -> list[object]:
    if isinstance(container, dict):
        return list(container.values())
    assert isinstance(container, list)
    return container


def _scopes(given: object) -> object:
    """A text of scopes as their list; a list as it is."""
    if not isinstance(given, str):
        return given
    if len(given) > MAX_SCOPE_TEXT_CHARS:
        raise PydanticCustomError(
            "scopes_long", "It is longer than {most} characters.", {"most": MAX_SCOPE_TEXT_CHARS}
        )
    text = given.strip(_BETWEEN_SCOPES)
    return re.split(f"[{_BETWEEN_SCOPES}]+", text) if text else []


def _time(given: object) -> object:
    """A time of RFC 3339 in UTC; one without an offset, as older clients send it, is UTC."""
    if given is None:
        return None
    if not isinstance(given, str) or not _TIME.fullmatch(given):
        raise PydanticCustomError("time_form", "It should be a time such as 2030-01-31T12:00:00Z.")
    try:
        parsed = datetime.fromisoformat(given.upper())
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        raise PydanticCustomError("time_range", "There is no such time.") from None


class StoreBody(Body):
    """A platform token to be stored, in place of the merchant's former one of this platform."""

    merchant_id: UUID
    platform_name: Platform
    platform_shop_id: Annotated[
        str, Field(min_length=1, max_length=MAX_SHOP_ID_CHARS, pattern=_SHOP_ID)
    ]
    domain: Annotated[
        str,
        Field(
            max_length=MAX_DOMAIN_CHARS,
            pattern=_DOMAIN,
            description="The shop's host name in any case, as the caller's token has it.",
        ),
    ]
    token_data: Annotated[
        dict[str, JsonTree],
        Field(
            min_length=1,
            repr=False,
            description="What opens the shop, as the platform gave it: at most 64 KiB of JSON, 16 "
            "levels deep. With a `refresh_token` in it, a token of type `oauth` is renewed.",
        ),
        WrapValidator(_secret),
    ]
    token_type: TokenType
    expires_at: Annotated[
        datetime | None,
        BeforeValidator(_time),
        Field(description="It may be past. Without an offset it is in UTC."),
    ] = None
    scopes: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_SCOPE_CHARS, pattern=_SCOPE)]]
        | None,
        Field(
            max_length=MAX_SCOPES,
            description="A list, or a text with commas or blanks between; answered as a list.",
        ),
        BeforeValidator(_scopes),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "maxLength": MAX_SCOPE_TEXT_CHARS, "pattern": _SCOPE_TEXT},
                    {
                        "type": "array",
                        "maxItems": MAX_SCOPES,
                        "items": {
                            "type": "string",
                            "minLength": 1,
                            "maxLength": MAX_SCOPE_CHARS,
                            "pattern": _SCOPE,
                        },
                    },
                    {"type": "null"},
                ]
            }
        ),
    ] = None
    idempotency_key: IdempotencyKey | None = None

    @field_validator("domain")
    @classmethod
    def _lower(cls, domain: str) -> str:
        return domain.lower()

    def new_token(self) -> NewToken:
        """The same in the words of the credentials room; a scope that stands twice is one."""
        return NewToken(
            merchant_id=self.merchant_id,
            platform=self.platform_name,
            platform_shop_id=self.platform_shop_id,
            domain=self.domain,
            token_type=self.token_type,
            secret=Secret(self.token_data),
            scopes=tuple(dict.fromkeys(self.scopes or ())),
            expires_at=self.expires_at,
        )


class ReadQuery(Query):
    """Which of the merchant's tokens; all of them where `platform` is absent."""

    platform: Annotated[
        Platform | None, Field(description="Only this platform's; every platform's without it.")
    ] = None


class TokenStored(TypedDict):
    """That a token is stored, and under which id."""

    token_id: UUID
    status: Literal["stored"]


class TokenDeleted(TypedDict):
    """That there is no token any more, whether or not there was one."""

    status: Literal["deleted"]


class PlatformToken(TypedDict):
    """A merchant's connection with a platform, and what opens it."""

    platform_name: Platform
    platform_shop_id: str
    domain: str
    token_data: dict[str, object]
    token_type: TokenType
    expires_at: datetime | None
    is_expired: bool
    scopes: list[str]
    health: Health


class PlatformTokenList(TypedDict):
    """A merchant's tokens, and the platforms of those that could not be opened."""

    tokens: list[PlatformToken]
    undecryptable: list[Platform]
