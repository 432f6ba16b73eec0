"""Settings about the merchants' shop platforms: their tokens, renewing those, our apps there.

Sections as in `glamd.config`, which puts all of them together.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationInfo, field_validator

from glamd.billing.platforms.shopify import API_VERSION
from glamd.config_types import Host, Names, Seconds, Secrets, Section, from_json, split
from glamd.credentials.model import DEFAULT_READERS, Platform


class OAuthPlatform(Section):
    """How the tokens of one platform are renewed; `{domain}` in `token_url` is the shop's."""

    platform: Platform
    token_url: Annotated[str, Field(min_length=1, max_length=512)]
    allowed_hosts: Annotated[tuple[Host, ...], BeforeValidator(split)] = ()
    client_id: Annotated[str, Field(min_length=1, max_length=256)]
    client_secret_file: Path
    client_auth: Literal["body", "basic"] = "body"
    refresh_before_s: Seconds = 600.0
    timeout_s: Annotated[float, Field(ge=0.1, le=30)] = 10.0


class Credentials(Section):
    """Platform tokens: who may read them, how they are renewed, what older ones were sealed with.

    `import_key` is the older service's TOKEN_ENCRYPTION_KEY; nothing else uses it.
    """

    readers: Names = DEFAULT_READERS
    oauth: Annotated[tuple[OAuthPlatform, ...], BeforeValidator(from_json)] = ()
    refresh_interval_s: Annotated[float, Field(ge=0.1, le=3600)] = 5.0
    refresh_concurrency: int = Field(default=8, ge=1, le=256)
    import_key: SecretStr | None = None

    @field_validator("oauth")
    @classmethod
    def _one_each(cls, value: tuple[OAuthPlatform, ...]) -> tuple[OAuthPlatform, ...]:
        if len({each.platform for each in value}) < len(value):
            raise ValueError("should name each platform once")
        return value


class Shopify(Section):
    """Our app at Shopify, where packs are sold. Several secrets are valid, the current one first.

    `base_url` takes every shop to a stand-in on loopback, in development only.
    """

    api_key: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    api_secrets: Secrets = ()
    api_version: Annotated[str, Field(min_length=1, max_length=16)] = API_VERSION
    test_charges: bool = False
    timeout_s: Seconds = 10.0
    base_url: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @field_validator("api_secrets")
    @classmethod
    def _with_its_key(
        cls, value: tuple[SecretStr, ...], info: ValidationInfo
    ) -> tuple[SecretStr, ...]:
        if "api_key" in info.data and value and info.data["api_key"] is None:
            raise ValueError("is of no use without shopify.api_key")
        return value
