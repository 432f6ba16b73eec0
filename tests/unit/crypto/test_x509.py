"""Certificates: which requests are refused, and that nothing but the key is taken from the rest."""

import base64
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509 as cx509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store

from glamd.crypto import x509
from glamd.errors import InputError

NOW = datetime(2030, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)
CA_KEY, _ = x509.generate_key()
CA = x509.issue_authority("Test", key=CA_KEY, now=NOW, validity=365 * DAY)

RequestKey = (
    ec.EllipticCurvePrivateKey
    | rsa.RSAPrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
)


def request(key: RequestKey) -> cx509.CertificateSigningRequest:
    """A request that asks for far more than its key."""
    builder = cx509.CertificateSigningRequestBuilder()
    builder = builder.subject_name(
        cx509.Name([cx509.NameAttribute(NameOID.COMMON_NAME, "somebody-else")])
    )
    builder = builder.add_extension(cx509.BasicConstraints(ca=True, path_length=None), True)
    builder = builder.add_extension(
        cx509.SubjectAlternativeName([cx509.DNSName("bank.example")]), False
    )
    own_digest = isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    return builder.sign(key, None if own_digest else hashes.SHA256())


def pem(made: cx509.CertificateSigningRequest) -> bytes:
    """The request as PEM."""
    return made.public_bytes(serialization.Encoding.PEM)


def device(public_key: x509.PublicKey, *, validity: timedelta = 30 * DAY) -> cx509.Certificate:
    """A certificate for the device `dev_1`."""
    return x509.issue_device(
        "dev_1",
        public_key=public_key,
        ca_certificate=CA,
        ca_key=CA_KEY,
        now=NOW,
        validity=validity,
    )


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 1024),
        rsa.generate_private_key(3, 2048),
        ec.generate_private_key(ec.SECP256K1()),
        ec.generate_private_key(ec.SECP521R1()),
        ed448.Ed448PrivateKey.generate(),
    ],
    ids=["rsa 1024", "rsa exponent 3", "secp256k1", "P-521", "Ed448"],
)
def test_a_weak_or_unusual_key_is_refused(key: RequestKey) -> None:
    with pytest.raises(InputError) as caught:
        x509.public_key_of(pem(request(key)))
    assert caught.value.fields[0].field == "csr"


def test_an_oversized_rsa_key_is_refused_before_anything_is_computed_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(x509, "RSA_MAX_BITS", 2048)
    with pytest.raises(InputError, match="refused"):
        x509.public_key_of(pem(request(rsa.generate_private_key(65537, 3072))))


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["rsa 2048", "P-256", "P-384", "Ed25519"],
)
def test_a_request_gives_its_key_and_nothing_else(key: x509.SigningKey) -> None:
    public_key = x509.public_key_of(pem(request(key)))
    assert public_key == key.public_key()
    certificate = device(public_key)
    assert [name.value for name in certificate.subject] == ["dev_1"]
    constraints = certificate.extensions.get_extension_for_class(cx509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca) == (True, False)
    with pytest.raises(cx509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(cx509.SubjectAlternativeName)


def test_a_request_that_its_key_did_not_sign_is_refused() -> None:
    key, _ = x509.generate_key()
    made = request(key).public_bytes(serialization.Encoding.DER)
    forged = made[:-4] + bytes(4)
    text = b"-----BEGIN CERTIFICATE REQUEST-----\n%b-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(InputError) as caught:
        x509.public_key_of(text % base64.encodebytes(forged))
    assert "signed" in caught.value.fields[0].message


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00\xff" * 50,
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        x509.certificate_pem(CA).encode(),
        b"-" * (x509.REQUEST_LIMIT_BYTES + 1),
    ],
    ids=["nothing", "noise", "empty pem", "a certificate", "too long"],
)
def test_what_is_no_request_is_refused(garbage: bytes) -> None:
    with pytest.raises(InputError):
        x509.public_key_of(garbage)


def test_a_key_that_would_be_refused_in_a_request_is_never_signed() -> None:
    weak = rsa.generate_private_key(65537, 1024).public_key()
    with pytest.raises(InputError):
        device(weak)


def test_nothing_outlives_its_authority() -> None:
    _, key = x509.generate_key()
    assert device(key, validity=9999 * DAY).not_valid_after_utc == CA.not_valid_after_utc
    assert device(key).not_valid_after_utc == NOW + 30 * DAY


def test_a_device_whose_clock_is_a_little_behind_can_use_its_certificate_at_once() -> None:
    _, key = x509.generate_key()
    assert device(key).not_valid_before_utc == NOW - x509.BACKDATE


def test_what_is_issued_verifies_for_its_own_use_only() -> None:
    _, key = x509.generate_key()
    worker = x509.issue_worker(
        "spiffe://glamd/worker/settler",
        public_key=key,
        ca_certificate=CA,
        ca_key=CA_KEY,
        now=NOW,
        validity=DAY,
    )
    server = x509.issue_server(
        ("pay.example", "127.0.0.1"),
        public_key=key,
        ca_certificate=CA,
        ca_key=CA_KEY,
        now=NOW,
        validity=DAY,
    )
    policy = PolicyBuilder().store(Store([CA])).time(NOW)
    as_client = policy.build_client_verifier()
    as_server = policy.build_server_verifier(cx509.DNSName("pay.example"))
    assert as_client.verify(worker, []).subjects == [
        cx509.UniformResourceIdentifier("spiffe://glamd/worker/settler")
    ]
    assert as_server.verify(server, [])[0] == server
    for certificate, usage in (
        (worker, ExtendedKeyUsageOID.CLIENT_AUTH),
        (server, ExtendedKeyUsageOID.SERVER_AUTH),
        (device(key), ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        certificate.verify_directly_issued_by(CA)
        usages = certificate.extensions.get_extension_for_class(cx509.ExtendedKeyUsage).value
        assert list(usages) == [usage]


def test_a_fingerprint_is_that_of_the_whole_certificate() -> None:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(CA.public_bytes(serialization.Encoding.DER))
    assert x509.fingerprint(CA) == digest.finalize().hex()
