"""Certificates for listeners under test: a CA, and leaves with any names, in PEM files."""

import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Files:
    """Where a certificate and its key stand."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority whose files stand in one directory."""

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        subject: str | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> None:
        """`subject` is what it calls itself, if that is not the name of its file."""
        self._directory = directory
        self._key = key or ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject or name)])
        builder = _builder(self._name, self._name, self._key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self._certificate = builder.sign(self._key, hashes.SHA256())
        self.path = directory / f"{name}.pem"
        self.path.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def renewed(self) -> "Authority":
        """The same authority with another certificate of its key."""
        return Authority(self._directory, f"{self.path.stem}-renewed", key=self._key)

    def certify(self, other: "Authority", name: str) -> Path:
        """A certificate for another authority, under this one."""
        certificate = (
            _builder(other._name, self._name, other._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        file = self._directory / f"{name}.pem"
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return file

    def issue(
        self, name: str, *uris: str, expired: bool = False, common_names: Sequence[str] = ()
    ) -> Files:
        """A leaf with these URI names, or, without any, for a server on 127.0.0.1.

        Its CN is its name, unless others are given.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, each) for each in common_names or (name,)]
        )
        builder = _builder(subject, self._name, key.public_key(), expired=expired)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(u) for u in uris]
        if not names:
            names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        files = Files(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return files

    def trusting(self, client: Files | None = None) -> ssl.SSLContext:
        """A client's context that trusts this authority, with the client's own certificate."""
        context = ssl.create_default_context(cafile=self.path)
        if client is not None:
            context.load_cert_chain(client.certificate, client.key)
        return context


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, expired: bool = False
) -> x509.CertificateBuilder:
    # TLS reads the machine's own clock, so validity is around now, whenever that is.
    now = datetime.now(UTC) - (2 * DAY if expired else timedelta())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
    )
