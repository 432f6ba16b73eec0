"""What can be set, with its default and its limits: frozen objects, checked once at the start.

Reading the file, the environment and secrets is `glamd.config_sources`', the kinds of values are
`glamd.config_types`', telling mistakes is `glamd.config_mistakes`', the sections of shop platforms
stand in `glamd.config_shops`, those of money and events in `glamd.config_money`, those of keys and
card data in `glamd.config_vault`; opening the files that a setting names belongs to who uses them.
Units are the last part of a name. A rule that spans several keys stands at the last of them, so
that it is told together with every other mistake and not only when all others are mended.
"""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    IPvAnyNetwork,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from glamd import config_mistakes, config_sources
from glamd.config_money import Billing, Checkout, Credits, Events, Ledger
from glamd.config_shops import Credentials, Shopify
from glamd.config_types import (
    Burst,
    Host,
    Level,
    Merchants,
    Name,
    Names,
    Origins,
    Port,
    PostgresUrl,
    Rate,
    Seconds,
    Secrets,
    Section,
    from_json,
    is_loopback,
    split,
    to_level,
)
from glamd.config_vault import Audit, Keys, Payments
from glamd.errors import FieldError
from glamd.payments.model import DecryptField

DEFAULT_CONFIG_FILE = Path("/etc/glamd/glamd.toml")
MIN_HS256_SECRET_BYTES = 32
"""RFC 7518, 3.2: a key of the size of the hash or larger."""
EVERY_INTERFACE = "0.0.0.0"  # noqa: S104  terminals and workers come from outside, with certificates


def _owner_of_cde(before: dict[str, SecretStr]) -> SecretStr:
    """Migrations of card data: as the owner of all where both schemas are on one server."""
    together = before["cde_url"] == before["url"]
    return before["owner_url"] if together else before["cde_url"]


class Database(Section):
    """PostgreSQL: one server for both schemas, or the card data in a server of its own.

    The owner's URLs are for migrations: the daemon's own login should own nothing. `role` is what
    the daemon becomes once it is connected.
    """

    url: PostgresUrl
    cde_url: PostgresUrl = Field(default_factory=lambda before: before["url"])
    owner_url: PostgresUrl = Field(default_factory=lambda before: before["url"])
    cde_owner_url: PostgresUrl = Field(default_factory=_owner_of_cde)
    role: Name | None = None
    pool_size: int = Field(default=8, ge=1, le=200)
    statement_timeout_s: Seconds = 10.0
    connect_timeout_s: Seconds = 5.0


class Http(Section):
    """The listener of clients and internal services."""

    host: Host = "127.0.0.1"
    port: Port = 8080
    tls_cert: Path | None = Field(default=None, validate_default=True)
    tls_key: Path | None = Field(default=None, validate_default=True)
    trusted_proxies: Annotated[tuple[IPvAnyNetwork, ...], BeforeValidator(split)] = ()
    cors_origins: Origins = ()
    rate_limit_per_s: Rate = 200.0
    rate_burst: Burst = 400

    @field_validator("tls_cert")
    @classmethod
    def _needed_outside_this_machine(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        host = info.data.get("host")
        if value is None and host is not None and not is_loopback(host):
            raise ValueError("is required, because http.host is not loopback")
        return value

    @field_validator("tls_key")
    @classmethod
    def _both_or_none(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        cert = info.data.get("tls_cert")
        if value is None and cert is not None:
            raise ValueError("is required, because http.tls_cert is set")
        if value is not None and cert is None and "tls_cert" in info.data:
            raise ValueError("is of no use without http.tls_cert")
        return value


class WorkerGrant(Section):
    """What one worker may detokenize. `merchants` empty means every merchant (`"*"`)."""

    name: Name
    purposes: Annotated[Names, Field(min_length=1)]
    fields: Annotated[tuple[DecryptField, ...], BeforeValidator(split), Field(min_length=1)]
    merchants: Merchants
    rate_per_s: Rate = 100.0


class Worker(Section):
    """The listener of workers, and of devices over HTTP: mutual TLS, with a CA for each."""

    enabled: bool = False
    host: Host = EVERY_INTERFACE
    port: Port = 8443
    tls_cert: Path | None = Field(default=None, validate_default=True)
    tls_key: Path | None = Field(default=None, validate_default=True)
    client_ca: Path | None = Field(default=None, validate_default=True)
    trust_domain: Name = "glamd"
    grants: Annotated[tuple[WorkerGrant, ...], BeforeValidator(from_json)] = ()

    @field_validator("tls_cert", "tls_key", "client_ca")
    @classmethod
    def _needed_when_enabled(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is None and info.data.get("enabled"):
            raise ValueError("is required, because worker.enabled is true")
        return value

    @field_validator("grants")
    @classmethod
    def _one_grant_each(cls, value: tuple[WorkerGrant, ...]) -> tuple[WorkerGrant, ...]:
        if len({grant.name for grant in value}) < len(value):
            raise ValueError("should name each worker once")
        return value


class Mqtt(Section):
    """The endpoint of terminals; `rate_limit_per_s` is for each device.

    `public_host` is what `device.json` tells a terminal to connect to; not set, it is `host`, or
    this machine's name where that is every interface.
    """

    host: Host = EVERY_INTERFACE
    port: Port = 8883
    public_host: Host | None = None
    tls_cert: Path
    tls_key: Path
    client_ca: Path
    max_connections: int = Field(default=10_000, ge=1, le=1_000_000)
    max_unauthenticated: int = Field(default=500, ge=1, le=1_000_000)
    handshake_timeout_s: Seconds = 10.0
    connect_timeout_s: Seconds = 10.0
    max_packet_bytes: int = Field(default=65_536 + 1_024, ge=1_024, le=1_048_576)
    receive_maximum: int = Field(default=32, ge=1, le=65_535)
    rate_limit_per_s: Rate = 50.0
    rate_burst: Burst = 100
    session_expiry_max_s: int = Field(default=7 * 86_400, ge=0, le=2**32 - 1)
    downlink_queue_limit: int = Field(default=64, ge=1, le=65_535)


class Devices(Section):
    """The certificate authority of terminals, and how often their state is looked at.

    `server_ca` is what a terminal is given at enrolment to know the endpoint by.
    """

    ca_cert: Path
    ca_key: Path
    server_ca: Path = Field(default_factory=lambda before: before["ca_cert"])
    certificate_days: int = Field(default=825, ge=1, le=3_650)
    status_poll_s: Annotated[float, Field(ge=0.05, le=4.0)] = 1.0


class Admin(Section):
    """The operators' socket: root and the daemon's own user may always use it."""

    socket: Path = Path("/run/glamd/admin.sock")
    group: Name | None = None
    allowed_users: Names = ()


class Auth(Section):
    """JWTs: several secrets and keys of a kind are valid at once, so that they can be rotated."""

    client_secrets: Secrets = ()
    internal_secrets: Secrets = ()
    client_jwks_file: Path | None = None
    internal_jwks_file: Path | None = None
    require_audience: bool = False
    max_lifetime_h: Annotated[float, Field(gt=0, le=24)] = 24.0


class Logging(Section):
    """`auto` is `console` on a terminal and `json` anywhere else."""

    level: Annotated[Level, BeforeValidator(to_level)] = "info"
    format: Literal["json", "console", "auto"] = "auto"


class Settings(Section):
    """Everything that can be set. A section that is not given is made of its defaults."""

    environment: Literal["production", "development"] = "production"
    node_id: Name = Field(default_factory=lambda: socket.gethostname()[:64])
    drain_timeout_s: Annotated[float, Field(gt=0, le=300)] = 20.0
    database: Database
    http: Http
    worker: Worker
    mqtt: Mqtt
    devices: Devices
    admin: Admin
    auth: Auth
    keys: Keys
    payments: Payments
    audit: Audit
    credentials: Credentials
    shopify: Shopify
    credits: Credits
    ledger: Ledger
    billing: Billing
    checkout: Checkout
    events: Events
    logging: Logging

    _warnings: tuple[str, ...] = PrivateAttr(default=())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What works and should be changed, to be logged once logging is set up."""
        return self._warnings

    def model_post_init(self, context: object, /) -> None:
        """Keep the warnings that `load` hands over beside the values."""
        if isinstance(context, tuple):
            self._warnings = context
        if self.keys.bdk_kms_key_id is not None and not self.keys.uses("aws-kms"):
            unused = "keys.bdk_kms_key_id (BDK_KMS_KEY_ID) is not used: no key provider is aws-kms"
            self._warnings += (unused,)

    @field_validator("shopify")
    @classmethod
    def _real_shops(cls, value: Shopify, info: ValidationInfo) -> Shopify:
        if value.base_url is not None and info.data.get("environment") == "production":
            raise config_mistakes.several([("base_url", "is for development only")])
        return value

    @field_validator("keys")
    @classmethod
    def _provided(cls, value: Keys) -> Keys:
        missing = value.missing()
        if missing:
            raise config_mistakes.several(missing)
        return value

    @field_validator("auth")
    @classmethod
    def _strong_secrets(cls, value: Auth, info: ValidationInfo) -> Auth:
        if info.data.get("environment") != "production":
            return value
        wrong = []
        for kind in ("client", "internal"):
            name = f"{kind}_secrets"
            secrets: tuple[SecretStr, ...] = getattr(value, name)
            if not secrets and getattr(value, f"{kind}_jwks_file") is None:
                instead = f"best as auth.{name}_file, or keys in auth.{kind}_jwks_file"
                wrong.append((name, f"needs a secret in production, {instead}"))
            elif any(len(s.get_secret_value().encode()) < MIN_HS256_SECRET_BYTES for s in secrets):
                wrong.append(
                    (name, f"has a secret of less than {MIN_HS256_SECRET_BYTES} bytes (HS256)")
                )
        if wrong:
            raise config_mistakes.several(wrong)
        return value


_MADE_BY_US = frozenset({("admin", "socket"), ("audit", "head_file")})
"""Paths of what the daemon makes itself."""

_SECTIONS = tuple(name for name, field in Settings.model_fields.items() if field.is_required())


def file_of(given: Path | None) -> Path | None:
    """The file that was asked for, else the one in its usual place if there is one."""
    if given is None and DEFAULT_CONFIG_FILE.exists():
        return DEFAULT_CONFIG_FILE
    return given


def load(config_file: Path | None, *, environ: Mapping[str, str]) -> Settings:
    """The settings from the TOML file, then `environ`, then files of secrets and credentials.

    Raises `ConfigError` whose `fields` are all mistakes, and whose message is all of them in one
    line.
    """
    return _build(config_sources.gather(config_file, environ))


def from_values(values: Mapping[str, object]) -> Settings:
    """The settings from nested values that a program made; raises `ConfigError` as `load` does."""
    return _build(config_sources.Gathered(values=dict(values)))


def _build(gathered: config_sources.Gathered) -> Settings:
    sections: dict[str, object] = {name: {} for name in _SECTIONS}
    mistakes = list(gathered.mistakes)
    settings = None
    try:
        settings = Settings.model_validate(
            sections | gathered.values, context=tuple(gathered.warnings)
        )
    except ValidationError as error:
        told = {mistake.field for mistake in mistakes}
        found = config_mistakes.mistakes_of(error, Settings, gathered.origins)
        mistakes += [mistake for mistake in found if mistake.field not in told]
    if mistakes or settings is None:
        raise config_mistakes.config_error(mistakes)
    return settings


def check_files(settings: Settings) -> None:
    """Raise `ConfigError` that names every setting whose file is not there or cannot be read."""
    mistakes = []
    for name, value in _paths(settings):
        if not value.is_file():
            mistakes.append(FieldError(name, "names a file that is not there"))
        elif not os.access(value, os.R_OK):
            mistakes.append(FieldError(name, "names a file that cannot be read"))
    if mistakes:
        raise config_mistakes.config_error(mistakes)


def _paths(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Every file that the settings name, with its dotted key."""
    for name in _SECTIONS:
        for key, value in getattr(settings, name):
            if (name, key) in _MADE_BY_US:
                continue
            if isinstance(value, Path):
                yield f"{name}.{key}", value
            elif isinstance(value, tuple):
                named = enumerate(each for each in value if isinstance(each, Path))
                yield from ((f"{name}.{key}[{number}]", each) for number, each in named)
    for number, platform in enumerate(settings.credentials.oauth):
        yield f"credentials.oauth[{number}].client_secret_file", platform.client_secret_file


def effective(settings: Settings) -> str:
    """All settings as TOML with secrets masked; a key that is not set stands in a comment."""
    lines: list[str] = []
    for name, value in settings.model_dump(mode="json").items():
        if isinstance(value, dict):
            lines += ["", f"[{name}]", *(_line(key, inner) for key, inner in value.items())]
        else:
            lines.append(_line(name, value))
    return "\n".join(lines) + "\n"


def _line(key: str, value: object) -> str:
    return f"# {key} is not set" if value is None else f"{key} = {_toml(value)}"


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(inner)}' for key, inner in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)
