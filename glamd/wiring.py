"""From settings to what each part wants: limits, TLS contexts, keys, authorities, grants.

Translation only. What is built from it, and in which order, stands in `glamd.app`.
"""

import socket
import ssl
from datetime import timedelta
from pathlib import Path
from typing import TypedDict

from cryptography import x509 as cx509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from device_gateway.mqtt.endpoint import EndpointLimits
from device_gateway.registry import DeviceAuthority
from glamd import config
from glamd.credentials.refresh.settings import OAuthSettings
from glamd.crypto import x509
from glamd.errors import ConfigError
from glamd.http import tls
from glamd.http.jwks import PublicKey, read_jwks
from glamd.payments.model import Grant


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
    return tls.worker_tls(certificate=mqtt.tls_cert, key=mqtt.tls_key, worker_ca=mqtt.client_ca)


def api_tls(http: config.Http) -> ssl.SSLContext | None:
    """A context for the api listener, None for plain HTTP on loopback; ConfigError."""
    if http.tls_cert is None or http.tls_key is None:
        return None
    return tls.api_tls(certificate=http.tls_cert, key=http.tls_key)


def worker_tls(worker: config.Worker) -> ssl.SSLContext:
    """A context for workers; ConfigError."""
    assert worker.tls_cert is not None
    assert worker.tls_key is not None
    assert worker.client_ca is not None
    return tls.worker_tls(
        certificate=worker.tls_cert, key=worker.tls_key, worker_ca=worker.client_ca
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
    if app is not None and secrets and all(each.platform != "shopify" for each in found):
        found.append(OAuthSettings.shopify(app, secrets[0].get_secret_value()))
    return found


def _one_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"The secret in {path} cannot be read.") from error
