"""What can be set of keys, of card data and of its audit: the sections `keys`, `payments`, `audit`.

Who holds the key-encryption key, how long keys and tokens live, where heads of the audit go. What
the settings do is in the rooms that have them.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from glamd import config_sources
from glamd.config_types import Name, Seconds, Section, split
from glamd.keys.providers.interface import ProviderName
from glamd.keys.providers.opening import KEK_LABEL, NEEDED

Paths = Annotated[tuple[Path, ...], BeforeValidator(split)]
Days = Annotated[int, Field(ge=1, le=3_650)]

KmsKeys = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=2_048)], ...], BeforeValidator(split)
]


class Keys(Section):
    """Who holds the key-encryption key, what a first version is called, how long versions live.

    `former_providers` still open what they wrapped, until it is rewrapped.
    """

    provider: ProviderName = "local"
    former_providers: Annotated[tuple[ProviderName, ...], BeforeValidator(split)] = ()
    first_version: Name = "v1"
    reload_s: Seconds = 5.0
    rotate_automatically: bool = False
    payment_tokens_cryptoperiod_days: Days = 365
    platform_tokens_cryptoperiod_days: Days = 365
    audit_cryptoperiod_days: Days = 365
    kek_file: Path | None = None
    former_kek_files: Paths = ()
    kms_key_id: str | None = Field(default=None, min_length=1, max_length=2_048)
    bdk_kms_key_id: str | None = Field(default=None, min_length=1, max_length=2_048)
    former_kms_key_ids: KmsKeys = ()
    kms_region: Name | None = None
    kms_endpoint_url: str | None = Field(default=None, pattern=r"^https?://\S+$")
    pkcs11_module: Path | None = None
    pkcs11_token_label: str | None = Field(default=None, min_length=1, max_length=32)
    pkcs11_pin_file: Path | None = None
    pkcs11_kek_label: str = Field(default=KEK_LABEL, min_length=1, max_length=64)

    def uses(self, provider: ProviderName) -> bool:
        """Whether the provider is named, as the current one or a former one."""
        return provider in {self.provider, *self.former_providers}

    def missing(self) -> list[tuple[str, str]]:
        """The keys that a provider which is named cannot do without, and why."""
        return [
            (key, f"is required by the key provider {name}; in the environment {_variable(key)}")
            for name in sorted({self.provider, *self.former_providers})
            for key in NEEDED[name]
            if not getattr(self, key)
        ]


def _variable(key: str) -> str:
    return config_sources.variable(("keys", key))


class Payments(Section):
    """Payment tokens, the group commits that make them, and how long what is left of them stays."""

    default_token_ttl_h: Annotated[float, Field(gt=0, le=8_760)] = 24.0
    commit_batch_limit: int = Field(default=256, ge=1, le=4_096)
    commit_connections: int = Field(default=2, ge=1, le=32)
    metadata_days: Annotated[int, Field(ge=1, le=36_500)] = 400
    shred_within_h: Annotated[float, Field(ge=1, le=720)] = 24.0


class Audit(Section):
    """Where the signed head of the audit chain goes, so that a cut tail shows against it."""

    head_every_s: Annotated[float, Field(ge=1, le=86_400)] = 600.0
    head_file: Path | None = None
