"""From settings to what each part wants: limits, TLS contexts, keys, authorities, grants.

Translation only. What is built from it, and in which order, stands in `glamd.app`.
"""

import socket
import ssl
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import TypedDict, TypeVar

from cryptography import x509 as cx509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from device_gateway.mqtt.endpoint import EndpointLimits
from device_gateway.registry import DeviceAuthority
from glamd import config, config_money, config_vault
from glamd.billing.model import BillingSettings, Pack
from glamd.billing.money import Money
from glamd.billing.platforms.custom import CustomSettings
from glamd.billing.platforms.shopify import ShopifySettings
from glamd.credentials.refresh.settings import OAuthSettings
from glamd.crypto import x509
from glamd.errors import ConfigError, FieldError, InputError
from glamd.http import tls
from glamd.http.jwks import PublicKey, read_jwks
from glamd.keys.providers.opening import ProviderSettings
from glamd.payments.model import Grant

T = TypeVar("T")


def public_host(mqtt: config.Mqtt) -> str:
    """What a terminal is told to connect to."""
    if mqtt.public_host is not None:
        return mqtt.public_host
    everywhere = mqtt.host in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
    return socket.getfqdn() if everywhere else mqtt.host


def endpoint_limits(mqtt: config.Mqtt) -> EndpointLimits:
    """The endpoint's limits, where a setting names them."""
    return EndpointLimits(
        max_connections=mqtt.max_connections,
        max_opening=mqtt.max_unauthenticated,
        handshake_timeout_s=mqtt.handshake_timeout_s,
        connect_timeout_s=mqtt.connect_timeout_s,
        max_packet_bytes=mqtt.max_packet_bytes,
        receive_maximum=mqtt.receive_maximum,
        session_expiry_max_s=mqtt.session_expiry_max_s,
        downlink_queue_messages=mqtt.downlink_queue_limit,
        max_sessions=max(mqtt.max_connections, EndpointLimits().max_sessions),
    )


def mqtt_tls(mqtt: config.Mqtt) -> ssl.SSLContext:
    """A context for terminals; ConfigError."""
    return tls.mutual_tls(certificate=mqtt.tls_cert, key=mqtt.tls_key, client_cas=(mqtt.client_ca,))


def api_tls(http: config.Http) -> ssl.SSLContext | None:
    """A context for the api listener, None for plain HTTP on loopback; ConfigError."""
    if http.tls_cert is None or http.tls_key is None:
        return None
    return tls.api_tls(certificate=http.tls_cert, key=http.tls_key)


def worker_tls(worker: config.Worker, mqtt: config.Mqtt) -> tls.WorkerTls:
    """What the workers' listener lets in: workers, and the devices that the endpoint would let in.

    ConfigError.
    """
    assert worker.tls_cert is not None
    assert worker.tls_key is not None
    assert worker.client_ca is not None
    return tls.worker_tls(
        certificate=worker.tls_cert,
        key=worker.tls_key,
        worker_ca=worker.client_ca,
        device_ca=mqtt.client_ca,
    )


def authority(devices: config.Devices) -> DeviceAuthority:
    """The devices' authority with its key; ConfigError."""
    try:
        return DeviceAuthority(
            certificate=cx509.load_pem_x509_certificate(devices.ca_cert.read_bytes()),
            key=_signing_key(devices.ca_key),
            server_ca_pem=devices.server_ca.read_text(),
            validity=timedelta(days=devices.certificate_days),
        )
    except (OSError, ValueError) as error:
        raise ConfigError("The devices' CA certificate and key cannot be read.") from error


def _signing_key(path: Path) -> x509.SigningKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey):
        return key
    raise ConfigError(f"The key in {path} is of a kind that cannot sign certificates.")


def grant(grant: config.WorkerGrant) -> Grant:
    """A worker's grant in the words of the payment part."""
    return Grant(
        worker=grant.name,
        purposes=frozenset(grant.purposes),
        fields=frozenset(grant.fields),
        merchants=frozenset(grant.merchants),
        rate_per_s=grant.rate_per_s,
    )


class JwtKeys(TypedDict):
    """What client and internal JWTs are verified with."""

    client_secrets: list[str]
    internal_secrets: list[str]
    client_keys: tuple[PublicKey, ...]
    internal_keys: tuple[PublicKey, ...]


def jwt_keys(auth: config.Auth) -> JwtKeys:
    """Secrets, and the keys of the files that are set; ConfigError."""
    return JwtKeys(
        client_secrets=[secret.get_secret_value() for secret in auth.client_secrets],
        internal_secrets=[secret.get_secret_value() for secret in auth.internal_secrets],
        client_keys=_jwks(auth.client_jwks_file, "auth.client_jwks_file"),
        internal_keys=_jwks(auth.internal_jwks_file, "auth.internal_jwks_file"),
    )


def _jwks(file: Path | None, setting: str) -> tuple[PublicKey, ...]:
    return () if file is None else read_jwks(file, setting=setting)


def check(settings: config.Settings) -> None:
    """What a start makes of the settings before it opens anything; ConfigError names the setting.

    Certificates and the key-encryption key are left to the start, which holds them.
    """
    jwt_keys(settings.auth)
    oauth(settings)
    mistakes: list[FieldError] = []
    for read in (billing, shopify, custom):
        try:
            read(settings)
        except ConfigError as error:
            mistakes += error.fields
    if mistakes:
        told = "; ".join(f"{each.field} {each.message}" for each in mistakes)
        raise ConfigError(told, fields=mistakes)
    bus_tls(settings.events)


def billing(settings: config.Settings) -> BillingSettings:
    """What is sold and given; ConfigError."""
    section = settings.billing
    return _of_section(
        "billing",
        lambda: BillingSettings(
            packs={name: _pack(name, pack) for name, pack in section.packs.items()},
            trial_days=section.trial_days,
            trial_credits=section.trial_credits,
            purchase_life=timedelta(hours=section.purchase_life_h),
            return_hosts=frozenset(section.return_hosts),
        ),
    )


def shopify(settings: config.Settings) -> ShopifySettings | None:
    """Checkout at Shopify, None where our app there has no secrets; ConfigError."""
    section = settings.shopify
    if not section.api_secrets:
        return None
    return _of_section(
        "shopify",
        lambda: ShopifySettings(
            api_secrets=tuple(secret.get_secret_value() for secret in section.api_secrets),
            api_version=section.api_version,
            is_test=section.test_charges,
            timeout_s=section.timeout_s,
            base_url=section.base_url,
        ),
    )


def custom(settings: config.Settings) -> CustomSettings | None:
    """Checkout at a page of one's own, None where there is none; ConfigError."""
    section = settings.checkout
    if section.url is None:
        return None
    url = section.url
    return _of_section(
        "checkout",
        lambda: CustomSettings(
            checkout_url=url,
            secrets=tuple(secret.get_secret_value() for secret in section.secrets),
            max_age_s=section.callback_max_age_s,
            is_test=section.test_charges,
        ),
    )


_KEYS = {
    "checkout.checkout_url": "checkout.url",
    "checkout.max_age_s": "checkout.callback_max_age_s",
    "billing.purchase_life": "billing.purchase_life_h",
}
"""Settings that billing has another name for."""


def _of_section(section: str, build: Callable[[], T]) -> T:
    """What is built, or ConfigError with the keys as they stand in the file."""
    try:
        return build()
    except ConfigError as error:
        fields = []
        for each in error.fields:
            name = f"{section}.{each.field}"
            fields.append(replace(each, field=_KEYS.get(name, name)))
        told = "; ".join(f"{each.field} {each.message}" for each in fields)
        raise ConfigError(told, fields=fields) from None


def _pack(name: str, pack: config_money.Pack) -> Pack:
    try:
        return Pack(pack.credits, Money.parse(pack.price, pack.currency))
    except InputError as error:
        key = {"amount": "price"}
        fields = [
            replace(each, field=f"packs.{name}.{key.get(each.field, each.field)}")
            for each in error.fields
        ]
        raise ConfigError("A pack has no price.", fields=fields) from None


def grants(worker: config.Worker) -> list[Grant]:
    """What each worker may detokenize."""
    return [grant(each) for each in worker.grants]


def key_providers(keys: config_vault.Keys) -> ProviderSettings:
    """The settings of `keys` that are about providers."""
    names = (each.name for each in fields(ProviderSettings))
    return ProviderSettings(**{name: getattr(keys, name) for name in names})


def bus_tls(events: config_money.Events) -> ssl.SSLContext | None:
    """A context for NATS, None where the URLs alone say whether there is TLS; ConfigError."""
    if events.tls_ca is None and events.tls_cert is None:
        return None
    try:
        context = ssl.create_default_context(cafile=events.tls_ca)
        if events.tls_cert is not None:
            context.load_cert_chain(events.tls_cert, events.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "The certificates for NATS cannot be read.",
            fields=[FieldError("events.tls_ca", "or events.tls_cert cannot be read")],
        ) from error
    return context


def oauth(settings: config.Settings) -> list[OAuthSettings]:
    """How platform tokens are renewed; Shopify's by our app there, unless said otherwise.

    ConfigError.
    """
    development = settings.environment == "development"
    found = [
        OAuthSettings(
            platform=each.platform,
            token_url=each.token_url,
            client_id=each.client_id,
            client_secret=_one_line(each.client_secret_file),
            allowed_hosts=each.allowed_hosts,
            client_auth=each.client_auth,
            refresh_before_s=each.refresh_before_s,
            timeout_s=each.timeout_s,
            allow_insecure_loopback=development,
        )
        for each in settings.credentials.oauth
    ]
    app, secrets = settings.shopify.api_key, settings.shopify.api_secrets
    is_real = settings.shopify.base_url is None  # the secret of a stand-in is not for the shops
    named = any(each.platform == "shopify" for each in found)
    if app is not None and secrets and is_real and not named:
        found.append(OAuthSettings.shopify(app, secrets[0].get_secret_value()))
    return found


def _one_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"The secret in {path} cannot be read.") from error
