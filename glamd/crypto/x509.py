"""Certificates: what we issue, to whom, and which public keys we accept for it.

A certificate request gives its public key and nothing else; subject, alternative names and usages
are ours. Pure: no files, no clock, no randomness but that of keys and serial numbers. Who gets a
certificate is decided above (`device_gateway.registry`, `glamd.embedded.certificates`).
"""

import ipaddress
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from glamd.errors import FieldError, InputError

SigningKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

REQUEST_LIMIT_BYTES: Final = 16 * 1024
RSA_MIN_BITS: Final = 2048
RSA_MAX_BITS: Final = 4096
"""Larger keys make each handshake slow, which is a cheap way to keep us busy."""

RSA_MIN_EXPONENT: Final = 65537
CURVES: Final = (ec.SECP256R1, ec.SECP384R1)

BACKDATE: Final = timedelta(minutes=10)
"""How far before `now` a certificate begins, for devices whose clock is behind."""


def generate_key() -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
    """Make a new ECDSA P-256 key and its public half."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key, key.public_key()


def public_key_of(request_pem: bytes) -> PublicKey:
    """The public key of a PEM certificate request, once it is shown to be the requester's.

    InputError when the request cannot be read, is not signed by its own key, or the key is weak:
    RSA of 2048 to 4096 bits, ECDSA on P-256 or P-384, and Ed25519 are accepted.
    """
    if len(request_pem) > REQUEST_LIMIT_BYTES:
        raise _refused(f"is longer than {REQUEST_LIMIT_BYTES} bytes")
    try:
        request = x509.load_pem_x509_csr(request_pem)
        key = request.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise _refused("is not a PEM certificate request with a key of a known kind") from None
    # The key is looked at first: checking a signature by an oversized one is the attack itself.
    accepted = _accepted(key)
    try:
        signed = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        signed = False
    if not signed:
        raise _refused("is not signed by its own key")
    return accepted


def issue_authority(
    name: str, *, key: SigningKey, now: datetime, validity: timedelta
) -> x509.Certificate:
    """Sign a root that issues end entities only (RFC 5280 4.2.1.9, pathLenConstraint 0)."""
    subject = _name(name)
    builder = _builder(subject, subject, key.public_key(), now=now, end=now + validity)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(authority=True), critical=True)
    return builder.sign(key, _digest_for(key))


def issue_device(
    device_id: str,
    *,
    public_key: PublicKey,
    ca_certificate: x509.Certificate,
    ca_key: SigningKey,
    now: datetime,
    validity: timedelta,
) -> x509.Certificate:
    """A client certificate whose CN is the device id (at most 64 characters)."""
    return _issue_leaf(
        device_id,
        public_key=public_key,
        ca_certificate=ca_certificate,
        ca_key=ca_key,
        usage=ExtendedKeyUsageOID.CLIENT_AUTH,
        names=(),
        now=now,
        validity=validity,
    )


def issue_worker(
    uri: str,
    *,
    public_key: PublicKey,
    ca_certificate: x509.Certificate,
    ca_key: SigningKey,
    now: datetime,
    validity: timedelta,
) -> x509.Certificate:
    """A client certificate whose one alternative name is the worker's `spiffe://…` URI."""
    return _issue_leaf(
        uri.rpartition("/")[2],
        public_key=public_key,
        ca_certificate=ca_certificate,
        ca_key=ca_key,
        usage=ExtendedKeyUsageOID.CLIENT_AUTH,
        names=(x509.UniformResourceIdentifier(uri),),
        now=now,
        validity=validity,
    )


def issue_server(
    hosts: Sequence[str],
    *,
    public_key: PublicKey,
    ca_certificate: x509.Certificate,
    ca_key: SigningKey,
    now: datetime,
    validity: timedelta,
) -> x509.Certificate:
    """A server's certificate for host names and IP addresses; the first one is its CN too."""
    return _issue_leaf(
        hosts[0],
        public_key=public_key,
        ca_certificate=ca_certificate,
        ca_key=ca_key,
        usage=ExtendedKeyUsageOID.SERVER_AUTH,
        names=tuple(_host_name(host) for host in hosts),
        now=now,
        validity=validity,
    )


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate's DER form, 64 lower-case hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def certificate_pem(certificate: x509.Certificate) -> str:
    """The certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def private_key_pem(key: SigningKey) -> str:
    """The private key as unencrypted PKCS #8 PEM; for a file that only its owner may read."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode("ascii")


def _issue_leaf(
    common_name: str,
    *,
    public_key: PublicKey,
    ca_certificate: x509.Certificate,
    ca_key: SigningKey,
    usage: x509.ObjectIdentifier,
    names: Sequence[x509.GeneralName],
    now: datetime,
    validity: timedelta,
) -> x509.Certificate:
    # What outlives its authority would only look valid.
    end = min(now + validity, ca_certificate.not_valid_after_utc)
    builder = _builder(
        _name(common_name), ca_certificate.subject, _accepted(public_key), now=now, end=end
    )
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
            critical=False,
        )
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(ca_key, _digest_for(ca_key))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PublicKey, *, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _accepted(key: object) -> PublicKey:
    if isinstance(key, rsa.RSAPublicKey):
        if not RSA_MIN_BITS <= key.key_size <= RSA_MAX_BITS:
            raise _refused(f"has an RSA key that is not of {RSA_MIN_BITS} to {RSA_MAX_BITS} bits")
        if key.public_numbers().e < RSA_MIN_EXPONENT:
            raise _refused("has an RSA key with a small exponent")
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, CURVES):
        return key
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    raise _refused("has a key that is neither RSA, ECDSA on P-256 or P-384, nor Ed25519")


def _digest_for(key: SigningKey) -> hashes.SHA256 | None:
    # Ed25519 has its digest built in (RFC 8410).
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _refused(why: str) -> InputError:
    return InputError("The certificate request is refused.", fields=(FieldError("csr", why),))
