"""The kinds of values that settings are of: how each is read, held to its limits, and shown.

Which settings there are is `glamd.config`'s. A wrong value is told without being repeated.
"""

import ipaddress
import json
import re
from typing import Annotated, Literal
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
)

from glamd.origins import MAX_ORIGINS, is_origin

MASK = "**********"


def _origin(value: str) -> str:
    if not is_origin(value):
        raise ValueError("should be origins such as https://admin.example.com")
    return value


def split(value: object) -> object:
    """A list out of one environment variable: JSON, or words between commas."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return from_json(value)
    return [part.strip() for part in value.split(",") if part.strip()]


def _secrets(value: object) -> object:
    """As `_split`, but a plain text is one secret, whatever characters it has."""
    if not isinstance(value, str):
        return value
    return from_json(value) if value.lstrip().startswith("[") else [value]


def from_json(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise ValueError("should be a list, as JSON") from None


def _merchants(value: object) -> object:
    """`"*"` is every merchant, which is the empty tuple from here on; an empty list is a slip."""
    if value == "*":
        return ()
    if not value:
        raise ValueError('should be "*" for every merchant, or a list of merchant ids')
    return split(value)


def _postgres_url(value: SecretStr) -> SecretStr:
    """A URL that asyncpg understands; a driver that SQLAlchemy puts into the scheme is dropped."""
    url, replaced = re.subn(
        r"\Apostgres(?:ql)?(?:\+[a-z0-9]+)?://", "postgresql://", value.get_secret_value()
    )
    if not replaced:
        raise ValueError("should be a URL that begins with postgresql://")
    return SecretStr(url)


def _masked(url: SecretStr) -> str:
    """The URL without its password and parameters, so that an operator sees which server it is."""
    secret = url.get_secret_value()
    parts = re.fullmatch(r"(postgresql://)(?:([^:@/?#]*)(?::[^@/?#]*)?@)?([^@?#]*)([?].*)?", secret)
    if parts is None:
        return MASK
    user = "" if parts[2] is None else f"{parts[2]}:{MASK}@"
    return f"{parts[1]}{user}{parts[3]}{'?' + MASK if parts[4] else ''}"


def to_level(value: object) -> object:
    name = value.strip().lower() if isinstance(value, str) else value
    return (
        {"warn": "warning", "fatal": "critical"}.get(name, name) if isinstance(name, str) else name
    )


Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Rate = Annotated[float, Field(gt=0, le=1_000_000)]
Burst = Annotated[int, Field(ge=1, le=1_000_000)]
Name = Annotated[str, Field(pattern=r"\A[A-Za-z0-9._-]{1,64}\z")]
Names = Annotated[tuple[Name, ...], BeforeValidator(split)]
PostgresUrl = Annotated[SecretStr, AfterValidator(_postgres_url), PlainSerializer(_masked)]
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(_secrets)]
Merchants = Annotated[
    tuple[UUID, ...],
    BeforeValidator(_merchants),
    PlainSerializer(lambda ids: [str(merchant) for merchant in ids] or "*"),
]
Origins = Annotated[
    tuple[Annotated[str, AfterValidator(_origin)], ...],
    BeforeValidator(split),
    Field(max_length=MAX_ORIGINS),
]
Host = Annotated[str, Field(min_length=1, max_length=255)]
Level = Literal["debug", "info", "warning", "error", "critical"]


def is_loopback(host: str) -> bool:
    """Whether a listener on `host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Section(BaseModel):
    """A table of settings: nothing in it can be changed, and nothing unknown may stand in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
