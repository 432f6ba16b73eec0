"""Platform tokens in words: what is stored, read and shown, and who is asking. Pure.

A secret is only ever in `Secret`, which never shows itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal, get_args
from uuid import UUID

Platform = Literal["shopify", "woocommerce", "bigcommerce", "magento", "squarespace", "custom"]
TokenType = Literal["oauth", "api_key", "basic_auth", "bearer"]
Action = Literal["store", "read", "delete", "refresh", "import"]
Health = Literal["valid", "expired", "refresh-failing"]

PLATFORMS: Final[tuple[Platform, ...]] = get_args(Platform)
TOKEN_TYPES: Final[tuple[TokenType, ...]] = get_args(TokenType)

DEFAULT_READERS: Final = (
    "platform-connector",
    "webhook-service",
    "merchant-service",
    "catalog-service",
    "analytics-service",
)
"""The services that may read, where the configuration names no others."""

ACCESS_TOKEN: Final = "access_token"
REFRESH_TOKEN: Final = "refresh_token"


@dataclass(frozen=True, slots=True)
class Secret:
    """What a platform token opens a shop with: the `token_data` object as it was given."""

    data: Mapping[str, object] = field(repr=False)

    @property
    def refresh_token(self) -> str | None:
        """The refresh token in it, where there is one that could be one."""
        found = self.data.get(REFRESH_TOKEN)
        return found if isinstance(found, str) and found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accessor:
    """Who is at it, for the access log; `kind` is an identity's kind, or `glamd` for our own jobs.

    `ip` is `-` where there is none.
    """

    kind: str
    name: str
    ip: str
    request_id: str
    correlation_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """A platform token to be stored; it replaces the merchant's former one of this platform."""

    merchant_id: UUID
    platform: Platform
    platform_shop_id: str
    domain: str
    token_type: TokenType
    secret: Secret
    scopes: tuple[str, ...]
    expires_at: datetime | None

    @property
    def refreshable(self) -> bool:
        """Whether it can be renewed, as far as the token itself is concerned."""
        return self.token_type == "oauth" and self.secret.refresh_token is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShopConnection:
    """A merchant's connection with its platform: all that is known of a token but its secret."""

    token_id: UUID
    merchant_id: UUID
    platform: Platform
    platform_shop_id: str
    domain: str
    token_type: TokenType
    scopes: tuple[str, ...]
    key_version: str
    expires_at: datetime | None
    refreshable: bool
    generation: int
    refresh_failures: int
    refresh_error: str | None
    refresh_not_before: datetime | None
    refreshed_at: datetime | None
    created_at: datetime
    updated_at: datetime
    last_accessed_by: str | None
    last_accessed_at: datetime | None
    access_count: int

    def is_expired(self, now: datetime) -> bool:
        """Whether the platform does not take it any more."""
        return self.expires_at is not None and self.expires_at <= now

    def health(self, now: datetime) -> Health:
        """`refresh-failing` says that the last attempt to renew it failed, expired or not yet."""
        if self.refresh_failures:
            return "refresh-failing"
        return "expired" if self.is_expired(now) else "valid"


@dataclass(frozen=True, slots=True)
class OpenToken:
    """A connection with its secret, on its way to a service that may have it."""

    connection: ShopConnection
    secret: Secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a reader gets: the tokens that opened, and the platforms of those that did not."""

    tokens: tuple[OpenToken, ...]
    undecryptable: tuple[Platform, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """One row of the access log: who did what to which token, and how it ended."""

    access_id: int
    at: datetime
    merchant_id: UUID
    platform: Platform | None
    """None: every platform of the merchant, and there was no token."""

    token_id: UUID | None
    action: Action
    accessor: Accessor
    error: str | None
    """A stable code; None is success."""
