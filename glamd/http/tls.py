"""TLS contexts of the HTTP listeners: one rule for versions and client certificates.

Files are read here and nowhere else in this room; what is wrong with one is said by its path,
never by its content. Whose a certificate is that got in is decided in `certificates`.
"""

import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from glamd.errors import ConfigError, FieldError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTls:
    """What the workers' listener speaks TLS with, and by whom workers and devices are certified.

    No authority stands on both sides.
    """

    context: ssl.SSLContext
    workers: tuple[x509.Certificate, ...]
    devices: tuple[x509.Certificate, ...]


def api_tls(*, certificate: Path, key: Path) -> ssl.SSLContext:
    """A server context for the api listener. Raises `ConfigError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The certificate {certificate} and its key {key} cannot be used together."
        ) from error
    return context


def mutual_tls(*, certificate: Path, key: Path, client_cas: Sequence[Path]) -> ssl.SSLContext:
    """A context that lets in only clients with a certificate of one of `client_cas`.

    Raises `ConfigError`.
    """
    context = api_tls(certificate=certificate, key=key)
    for file in client_cas:
        try:
            context.load_verify_locations(cafile=file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"The clients' CA {file} cannot be used.") from error
    context.verify_mode = ssl.CERT_REQUIRED
    # An authority that is itself certified by a house's root need not drag the root in here, which
    # would let in whatever else that root has certified.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # A resumed session would skip the check of the certificate's dates. This does not keep TLS 1.2
    # from resuming one by its id, so `certificates` looks at the dates of who does.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


def worker_tls(*, certificate: Path, key: Path, worker_ca: Path, device_ca: Path) -> WorkerTls:
    """What lets in workers and devices, and tells them apart; each file is one authority or more.

    Raises `ConfigError`, also where the two have an authority's key in common: whoever is certified
    by that one could be either.
    """
    context = mutual_tls(certificate=certificate, key=key, client_cas=(worker_ca, device_ca))
    workers, devices = _authorities(worker_ca), _authorities(device_ca)
    if not _keys(workers).isdisjoint(_keys(devices)):
        raise ConfigError(
            f"{worker_ca} and {device_ca} have an authority in common: workers and devices need "
            "authorities of their own.",
            fields=[FieldError("worker.client_ca", "has an authority of mqtt.client_ca in it")],
        )
    return WorkerTls(context=context, workers=workers, devices=devices)


def _authorities(file: Path) -> tuple[x509.Certificate, ...]:
    try:
        return tuple(x509.load_pem_x509_certificates(file.read_bytes()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The clients' CA {file} cannot be used.") from error


def _keys(authorities: Iterable[x509.Certificate]) -> set[bytes]:
    # The key and not the certificate: the same authority may have been certified anew.
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return {
        each.public_key().public_bytes(serialization.Encoding.DER, form) for each in authorities
    }


def _no_password() -> str:
    # Without this, OpenSSL would ask the terminal for the password of an encrypted key.
    raise ValueError("the key is encrypted")
