"""TLS contexts of the HTTP listeners: one rule for versions and client certificates.

Files are read here and nowhere else in this room; what is wrong with one is said by its path,
never by its content.
"""

import ssl
from pathlib import Path

from glamd.errors import ConfigError


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


def worker_tls(*, certificate: Path, key: Path, worker_ca: Path) -> ssl.SSLContext:
    """A context that lets in only clients with a certificate of `worker_ca`.

    Raises `ConfigError`.
    """
    context = api_tls(certificate=certificate, key=key)
    try:
        context.load_verify_locations(cafile=worker_ca)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The workers' CA {worker_ca} cannot be used.") from error
    context.verify_mode = ssl.CERT_REQUIRED
    # A resumed session would skip the check of the certificate's dates.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


def _no_password() -> str:
    # Without this, OpenSSL would ask the terminal for the password of an encrypted key.
    raise ValueError("the key is encrypted")
