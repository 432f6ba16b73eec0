"""Settings about money and events: credits, trials and packs, our own payment page, the bus.

Sections as in `glamd.config`, which puts all of them together. What is sold is checked by billing
itself (`glamd.wiring` asks it), so that no rule of it stands twice.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BeforeValidator,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationInfo,
    field_validator,
)

from glamd.config_types import MASK, Host, Name, Seconds, Secrets, Section, from_json, split

MAX_SERVERS: Final = 32

_NATS_URL: Final = re.compile(r"((?:nats|tls)://)(?:[^/@?#]*@)?([^/@?#\s]+)")


def _nats_url(value: SecretStr) -> SecretStr:
    if _NATS_URL.fullmatch(value.get_secret_value()) is None:
        raise ValueError("should be URLs like nats://host:port or tls://host:port")
    return value


def _masked(value: SecretStr) -> str:
    """The URL without its login, so that an operator sees which server it is."""
    found = _NATS_URL.fullmatch(value.get_secret_value())
    assert found is not None
    return (
        "".join(found.groups())
        if "@" not in value.get_secret_value()
        else (f"{found[1]}{MASK}@{found[2]}")
    )


NatsUrl = Annotated[SecretStr, AfterValidator(_nats_url), PlainSerializer(_masked)]


class Credits(Section):
    """Merchants' credits; `low_balance_threshold` 0 means that nobody is warned."""

    low_balance_threshold: int = Field(default=100, ge=0, le=2**53 - 1)


class Ledger(Section):
    """The group commits of the ledger."""

    commit_batch_limit: int = Field(default=256, ge=1, le=4_096)
    commit_connections: int = Field(default=2, ge=1, le=32)


class Pack(Section):
    """So many credits for that price, a decimal text such as `39.99`."""

    credits: int
    price: str
    currency: str = "USD"


class Billing(Section):
    """Trials and what is sold. Packs that stand here are all that there are."""

    trial_days: int = 14
    trial_credits: int = 500
    packs: Annotated[Mapping[str, Pack], BeforeValidator(from_json)] = Field(
        default={
            "small": Pack(credits=100, price="9.99"),
            "medium": Pack(credits=500, price="39.99"),
            "large": Pack(credits=1000, price="69.99"),
        }
    )
    purchase_life_h: Annotated[float, Field(gt=0, le=720)] = 24.0
    return_hosts: Annotated[tuple[Host, ...], BeforeValidator(split)] = ()
    webhook_retention_days: int = Field(default=90, ge=1, le=3_650)


class Checkout(Section):
    """A payment page of one's own, the platform `custom`; without `url` it is not configured.

    Several secrets are valid at once, the one that signs first.
    """

    url: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    secrets: Secrets = Field(default=(), validate_default=True)
    callback_max_age_s: Seconds = 300.0
    test_charges: bool = False

    @field_validator("secrets")
    @classmethod
    def _with_its_page(
        cls, value: tuple[SecretStr, ...], info: ValidationInfo
    ) -> tuple[SecretStr, ...]:
        if "url" in info.data:
            if value and info.data["url"] is None:
                raise ValueError("is of no use without checkout.url")
            if not value and info.data["url"] is not None:
                raise ValueError("is required, because checkout.url is set")
        return value


class Events(Section):
    """NATS JetStream; while it is away everything else goes on.

    Without `consume` events go out and none come in, as it has to be while older services' rows are
    imported. `stream_…` are of a stream that glamd has to make. `start_at` is where a consumer
    begins that JetStream does not know yet.
    """

    servers: Annotated[
        tuple[NatsUrl, ...], BeforeValidator(split), Field(min_length=1, max_length=MAX_SERVERS)
    ] = (SecretStr("nats://127.0.0.1:4222"),)
    user: Name | None = None
    password: SecretStr | None = Field(default=None, validate_default=True)
    token: SecretStr | None = Field(default=None, validate_default=True)
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = Field(default=None, validate_default=True)
    stream_max_age_h: Annotated[float, Field(ge=1, le=87_600)] = 168.0
    stream_replicas: int = Field(default=1, ge=1, le=5)
    replay_window_h: Annotated[float, Field(ge=1, le=8_760)] = 72.0
    poll_s: Annotated[float, Field(ge=0.01, le=60)] = 0.2
    consume: bool = True
    in_flight: int = Field(default=1_024, ge=1, le=1_024)
    start_at: AwareDatetime | None = None

    @field_validator("password")
    @classmethod
    def _with_its_user(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if "user" in info.data and (value is None) != (info.data["user"] is None):
            raise ValueError("and events.user stand together, or not at all")
        return value

    @field_validator("token")
    @classmethod
    def _one_login(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is not None and info.data.get("user") is not None:
            raise ValueError("is one login, events.user another: set one of them")
        return value

    @field_validator("tls_key")
    @classmethod
    def _with_its_certificate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if "tls_cert" in info.data and (value is None) != (info.data["tls_cert"] is None):
            raise ValueError("and events.tls_cert stand together, or not at all")
        return value
