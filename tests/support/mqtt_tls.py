"""A throw-away certificate authority: real certificates for real TLS in tests and benches.

Keys are P-256, as small terminals have them. Nothing here is fit for anything but a test.
"""

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAY = timedelta(days=1)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


class Authority:
    """One CA in `directory`; every certificate that it signs is written beside it as PEM."""

    def __init__(self, directory: Path, common_name: str = "test devices") -> None:
        self._directory = directory
        self._directory.mkdir(parents=True, exist_ok=True)
        self._name = _name(common_name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._builder(self._name, self._key.public_key(), -_DAY, 365 * _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca_file = self._directory / "ca.pem"
        self.ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _builder(
        self,
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        starts: timedelta,
        ends: timedelta,
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + starts)
            .not_valid_after(now + ends)
        )

    def issue(
        self,
        common_name: str,
        *,
        server: bool = False,
        starts: timedelta = -_DAY,
        ends: timedelta = 30 * _DAY,
    ) -> tuple[Path, Path]:
        """Certificate and key files for `common_name`; a server's is for 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = self._builder(_name(common_name), key.public_key(), starts, ends).add_extension(
            x509.ExtendedKeyUsage([usage]), critical=False
        )
        if server:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(
                    [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
                ),
                critical=False,
            )
        stem = f"{common_name}-{x509.random_serial_number():x}"[:80].replace("/", "_")
        certificate_file = self._directory / f"{stem}.pem"
        key_file = self._directory / f"{stem}.key"
        certificate = builder.sign(self._key, hashes.SHA256())
        certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certificate_file, key_file

    def server_context(self) -> ssl.SSLContext:
        """A server's context that asks for a client certificate of this CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self.issue("127.0.0.1", server=True))
        context.load_verify_locations(self.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(
        self, pair: tuple[Path, Path] | None, *, trusts: "Authority | None" = None
    ) -> ssl.SSLContext:
        """A client's context with `pair` as its certificate, trusting this CA or another."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations((trusts or self).ca_file)
        if pair is not None:
            context.load_cert_chain(*pair)
        return context
