"""Keys that sign JWTs in tests, their key sets in files, and a door to knock at with tokens."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from multidict import CIMultiDict, CIMultiDictProxy

from glamd.errors import NotFoundError, UnavailableError
from glamd.http.auth import Authenticator
from glamd.http.identity import Identity
from glamd.http.jwks import PublicKey, read_jwks
from glamd.merchants.store import Merchant
from tests.support.http_fakes import (
    CLIENT_SECRET,
    INTERNAL_SECRET,
    MERCHANT,
    ManualClock,
    claims,
    merchant,
)

PREVIOUS_SECRET = "the-secret-before-this-one-32-bytes!"
SETTING = "auth.client_jwks_file"

Private = (
    ec.EllipticCurvePrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
    | rsa.RSAPrivateKey
)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An issuer's key."""

    kid: str
    algorithm: str
    private: Private

    def jwk(self, **changes: object) -> dict[str, Any]:
        """Its public half as an issuer publishes it; None takes a member away."""
        public: Any = self.private.public_key()
        whole: dict[str, Any] = dict(
            jwt.get_algorithm_by_name(self.algorithm).to_jwk(public, as_dict=True)
        )
        whole = whole | {"kid": self.kid, "alg": self.algorithm, "use": "sig"} | changes
        return {name: value for name, value in whole.items() if value is not None}

    def private_jwk(self) -> dict[str, Any]:
        """The whole key, as nobody should hand it out."""
        key: Any = self.private
        found = jwt.get_algorithm_by_name(self.algorithm).to_jwk(key, as_dict=True)
        return dict(found) | {"kid": self.kid}

    def public_bytes(self, encoding: Encoding) -> bytes:
        """Its SubjectPublicKeyInfo."""
        return self.private.public_key().public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)

    def private_pem(self) -> bytes:
        """The whole key as PKCS 8."""
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def token(self, header: Mapping[str, object] | None = None, **changes: object) -> str:
        """A client's token that names this key; None in `header` takes a name away."""
        whole = {"typ": "JWT", "alg": self.algorithm, "kid": self.kid} | dict(header or {})
        kept = {name: value for name, value in whole.items() if value is not None}
        return self.sign(json.dumps(kept).encode(), json.dumps(claims(**changes)).encode())

    def sign(self, header: bytes, payload: bytes, *, algorithm: str | None = None) -> str:
        """Any header over any payload, signed with this key, maybe by another algorithm."""
        signed = f"{b64(header)}.{b64(payload)}"
        signer = jwt.get_algorithm_by_name(algorithm or self.algorithm)
        return f"{signed}.{b64(signer.sign(signed.encode(), self.private))}"


def b64(raw: bytes) -> str:
    """Unpadded base64url."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def hs256(header: bytes, payload: bytes, secret: bytes = CLIENT_SECRET.encode()) -> str:
    """Any header over any payload, signed with HS256 under any bytes at all."""
    signed = f"{b64(header)}.{b64(payload)}"
    # Not by `prepare_key`, which would refuse what an attacker does not.
    signature = jwt.get_algorithm_by_name("HS256").sign(signed.encode(), secret)
    return f"{signed}.{b64(signature)}"


def signed_with(header: Mapping[str, object], payload: bytes | None = None) -> str:
    """Any header over any payload, honestly signed with the clients' secret."""
    body = json.dumps(claims()).encode() if payload is None else payload
    return hs256(json.dumps({"alg": "HS256"} | dict(header)).encode(), body)


@cache
def es256(kid: str = "ec-1") -> SigningKey:
    """The P-256 key of this name, the same throughout the run."""
    return SigningKey(kid, "ES256", ec.generate_private_key(ec.SECP256R1()))


@cache
def eddsa(kid: str = "ed-1") -> SigningKey:
    """The Ed25519 key of this name."""
    return SigningKey(kid, "EdDSA", ed25519.Ed25519PrivateKey.generate())


@cache
def rs256(kid: str = "rsa-1", bits: int = 2048) -> SigningKey:
    """The RSA key of this name and size."""
    return SigningKey(kid, "RS256", rsa.generate_private_key(65537, bits))


ALL = {"ES256": es256(), "EdDSA": eddsa(), "RS256": rs256()}


def write_jwks(path: Path, *jwks: Mapping[str, object]) -> Path:
    """A key set as a file."""
    path.write_text(json.dumps({"keys": jwks}))
    return path


def public_keys(tmp_path: Path, *keys: SigningKey) -> tuple[PublicKey, ...]:
    """The keys as the daemon has them, by way of a file."""
    path = write_jwks(tmp_path / "jwks.json", *(key.jwk() for key in keys))
    return read_jwks(path, setting=SETTING)


class Shops:
    """Which merchant a domain belongs to, and how often that was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.merchants = {"shop.example": MERCHANT}
        self.away = False

    async def __call__(self, domain: str) -> Merchant:
        """Look it up."""
        self.asked.append(domain)
        if self.away:
            raise UnavailableError("The database is away.")
        if domain not in self.merchants:
            raise NotFoundError("There is no such merchant.", code="MERCHANT_NOT_FOUND")
        return merchant(self.merchants[domain], domain)


class Revoked:
    """What is revoked, for a test to add to."""

    def __init__(self) -> None:
        self.jtis: set[str] = set()
        self.kids: set[str] = set()

    def __call__(self, *, jti: str | None, kid: str | None) -> bool:
        """Whether either is."""
        return jti in self.jtis or kid in self.kids


class Door:
    """An authenticator and a way to knock."""

    def __init__(
        self,
        *,
        require_audience: bool = False,
        cached: int = 100,
        client_keys: Sequence[PublicKey] = (),
        internal_keys: Sequence[PublicKey] = (),
        shops: Shops | None = None,
    ) -> None:
        self.clock = ManualClock()
        self.shops = shops or Shops()
        self.revoked = Revoked()
        self.authenticator = Authenticator(
            client_secrets=[CLIENT_SECRET, PREVIOUS_SECRET],
            internal_secrets=[INTERNAL_SECRET],
            client_keys=client_keys,
            internal_keys=internal_keys,
            require_audience=require_audience,
            merchant_by_domain=self.shops,
            clock=self.clock,
            is_revoked=self.revoked,
            cached=cached,
        )

    def replace(
        self, client_keys: Sequence[PublicKey] = (), internal_keys: Sequence[PublicKey] = ()
    ) -> None:
        """Other keys beside the same secrets."""
        self.authenticator.replace_keys(
            client_secrets=[CLIENT_SECRET, PREVIOUS_SECRET],
            internal_secrets=[INTERNAL_SECRET],
            client_keys=client_keys,
            internal_keys=internal_keys,
        )

    async def knock(self, token: str) -> Identity:
        """Who this token's bearer is."""
        return await self.authenticator(request_with(f"Bearer {token}"))

    def cached(self, token: str) -> Identity | None:
        """Who this token's bearer is, if that is remembered."""
        return self.authenticator.cached(request_with(f"Bearer {token}"))


@dataclass(frozen=True, slots=True)
class _Knock:
    """All that an authenticator looks at of a request."""

    headers: CIMultiDictProxy[str]


def request_with(*authorization: str) -> web.BaseRequest:
    """A request with these Authorization headers."""
    pairs = [("Authorization", value) for value in authorization]
    return cast("web.BaseRequest", _Knock(CIMultiDictProxy(CIMultiDict(pairs))))
