"""Certificate authorities and certificates for `glamd dev`, kept in its state directory.

    certificates/server-ca.{pem,key}   what terminals and workers trust
    certificates/device-ca.{pem,key}   whose certificates may connect as a terminal
    certificates/worker-ca.{pem,key}   whose certificates may call the worker listener
    certificates/server.{pem,key}      for localhost, 127.0.0.1 and ::1
    certificates/workers/NAME.{pem,key}, certificates/devices/ID.{pem,key}

Everything is made when it is missing and renewed before it ends; an authority's renewal renews what
it had issued. An operator brings certificates of his own and never runs this. What a certificate
says is decided in `glamd.crypto.x509`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, TypedDict

from cryptography import x509 as cx509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from glamd.clock import Clock
from glamd.crypto import x509
from glamd.embedded.files import write_private

HOSTS: Final = ("localhost", "127.0.0.1", "::1")

AUTHORITY_VALIDITY: Final = timedelta(days=3650)
AUTHORITY_RENEWAL: Final = timedelta(days=365)
LEAF_VALIDITY: Final = timedelta(days=90)
LEAF_RENEWAL: Final = timedelta(days=30)
"""What is left when a certificate is renewed; more than any demo runs without a start."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its key, and the PEM files (the key's mode is 0600) that hold them."""

    certificate: cx509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate_file: Path
    key_file: Path


class DevelopmentCertificates:
    """The three authorities and what they issue; each call returns what stands, or makes it."""

    def __init__(self, state_dir: Path, clock: Clock) -> None:
        self._directory = state_dir.absolute() / "certificates"
        self._clock = clock
        self.server_ca = self._authority("server-ca", "glamd development servers")
        self.device_ca = self._authority("device-ca", "glamd development terminals")
        self.worker_ca = self._authority("worker-ca", "glamd development workers")

    def server(self) -> KeyPair:
        """The listeners' certificate, issued by `server_ca` for this machine's loopback names."""

        def issue(key: x509.PublicKey) -> cx509.Certificate:
            return x509.issue_server(HOSTS, public_key=key, **self._by(self.server_ca))

        return self._leaf("server", self.server_ca, issue)

    def worker(self, uri: str) -> KeyPair:
        """The client certificate of the worker `spiffe://…/NAME`, issued by `worker_ca`."""

        def issue(key: x509.PublicKey) -> cx509.Certificate:
            return x509.issue_worker(uri, public_key=key, **self._by(self.worker_ca))

        return self._leaf(f"workers/{uri.rpartition('/')[2]}", self.worker_ca, issue)

    def device(self, device_id: str) -> KeyPair:
        """A terminal's client certificate, issued by `device_ca`; its CN is the device id."""

        def issue(key: x509.PublicKey) -> cx509.Certificate:
            return x509.issue_device(device_id, public_key=key, **self._by(self.device_ca))

        return self._leaf(f"devices/{device_id}", self.device_ca, issue)

    def _by(self, authority: KeyPair) -> "_Signing":
        return {
            "ca_certificate": authority.certificate,
            "ca_key": authority.key,
            "now": self._clock.now(),
            "validity": LEAF_VALIDITY,
        }

    def _authority(self, file_name: str, common_name: str) -> KeyPair:
        standing = self._read(file_name)
        if standing is not None and self._lasts(standing, AUTHORITY_RENEWAL):
            return standing
        key, _ = x509.generate_key()
        certificate = x509.issue_authority(
            common_name, key=key, now=self._clock.now(), validity=AUTHORITY_VALIDITY
        )
        return self._write(file_name, certificate, key)

    def _leaf(
        self,
        file_name: str,
        authority: KeyPair,
        issue: Callable[[x509.PublicKey], cx509.Certificate],
    ) -> KeyPair:
        standing = self._read(file_name)
        if (
            standing is not None
            and self._lasts(standing, LEAF_RENEWAL)
            and _is_issued_by(standing.certificate, authority.certificate)
        ):
            return standing
        key, public_key = x509.generate_key()
        return self._write(file_name, issue(public_key), key)

    def _lasts(self, pair: KeyPair, renewal: timedelta) -> bool:
        return pair.certificate.not_valid_after_utc - self._clock.now() > renewal

    def _paths(self, file_name: str) -> tuple[Path, Path]:
        return self._directory / f"{file_name}.pem", self._directory / f"{file_name}.key"

    def _read(self, file_name: str) -> KeyPair | None:
        """What stands in the two files, or None when it is missing or not a pair."""
        certificate_file, key_file = self._paths(file_name)
        try:
            certificate = cx509.load_pem_x509_certificate(certificate_file.read_bytes())
            key = load_pem_private_key(key_file.read_bytes(), password=None)
        except (OSError, ValueError, UnsupportedAlgorithm):
            return None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            return None
        if key.public_key() != certificate.public_key():
            return None  # a kill between the two writes
        return KeyPair(certificate, key, certificate_file, key_file)

    def _write(
        self, file_name: str, certificate: cx509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> KeyPair:
        certificate_file, key_file = self._paths(file_name)
        for directory in (self._directory.parent, self._directory, key_file.parent):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(key_file, x509.private_key_pem(key).encode())
        write_private(certificate_file, x509.certificate_pem(certificate).encode())
        return KeyPair(certificate, key, certificate_file, key_file)


def _is_issued_by(certificate: cx509.Certificate, authority: cx509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


class _Signing(TypedDict):
    ca_certificate: cx509.Certificate
    ca_key: ec.EllipticCurvePrivateKey
    now: datetime
    validity: timedelta
