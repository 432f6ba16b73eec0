"""Key sets from files (RFC 7517): the public keys that sign JWTs of one kind.

Three kinds of key are believed: EC P-256 (ES256), Ed25519 (EdDSA) and RSA of 2048 to 8192 bits
(RS256). A private or symmetric key in such a file is somebody's mistake and ends the reading; a key
that is for something else (encryption, another algorithm) is left out with a line in the log. Which
tokens a key may verify is for `signers`; nothing here fetches anything.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from glamd.errors import ConfigError, FieldError
from glamd.http.jws import base64url, json_object
from glamd.revocations.service import is_revocable

MAX_FILE_BYTES: Final = 1024 * 1024
MAX_KEYS: Final = 100
MIN_RSA_BITS: Final = 2048
MAX_RSA_BITS: Final = 8192
"""A verification costs with the square of it, and anybody may ask for one."""
MAX_RSA_EXPONENT_BITS: Final = 32
P256_BYTES: Final = 32

Algorithm = Literal["ES256", "EdDSA", "RS256"]
_Key: TypeAlias = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

# RFC 7518, 6.2.2, 6.3.2, 6.4; RFC 8037, 2; `priv` is what later key types call it.
_SECRET_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"})

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """A key that verifies signatures of exactly one algorithm.

    `fingerprint` is the SHA-256 of its SubjectPublicKeyInfo, by which the same key is known again.
    """

    kid: str
    algorithm: Algorithm
    fingerprint: bytes = field(repr=False)
    key: _Key = field(repr=False)

    def verifies(self, signing_input: bytes, signature: bytes) -> bool:
        """Whether this key made the signature, by the key's algorithm and no other."""
        return jwt.get_algorithm_by_name(self.algorithm).verify(signing_input, self.key, signature)


def read_jwks(path: Path, *, setting: str) -> tuple[PublicKey, ...]:
    """The keys of a file that can verify, one or more.

    `setting` is the configuration key that names the file. ConfigError, which names setting, file
    and kid and never a key, for a file that cannot be read, is too large or no key set, and for a
    key that is private, symmetric, weak, broken, without a kid, or of a kid that stands twice.
    """
    try:
        found = _keys(_content(path), setting)
    except _UnusableError as error:
        message = f"{path}: {error}"
        raise ConfigError(
            f"{setting}: {message}.", fields=(FieldError(setting, message),)
        ) from None
    log.info("jwks_read", setting=setting, kids=[key.kid for key in found])
    return found


class _UnusableError(Exception):
    """What is wrong with the file, for the one place that makes a ConfigError of it."""


def _content(path: Path) -> bytes:
    try:
        # Without O_NONBLOCK a named pipe in the file's place would hold the start up for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _UnusableError("is not a regular file")
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _UnusableError(f"cannot be read ({error.strerror})") from None
    if len(content) > MAX_FILE_BYTES:
        raise _UnusableError(f"is longer than {MAX_FILE_BYTES} bytes")
    return content


def _keys(content: bytes, setting: str) -> tuple[PublicKey, ...]:
    try:
        jwks = json_object(content).get("keys")
    except ValueError:
        raise _UnusableError("is not a JSON object with each name once") from None
    if not isinstance(jwks, list) or not all(isinstance(jwk, dict) for jwk in jwks):
        raise _UnusableError('has no list of objects "keys" (RFC 7517, 5)')
    if len(jwks) > MAX_KEYS:
        raise _UnusableError(f"has more than {MAX_KEYS} keys")
    found: dict[str, PublicKey] = {}
    seen: set[str] = set()
    for number, jwk in enumerate(cast("list[Mapping[str, object]]", jwks), 1):
        kid = _kid(jwk, number)
        if kid in seen:
            raise _UnusableError(f"has the kid {kid!r} twice")
        seen.add(kid)
        key = _public_key(jwk, kid, setting)
        if key is not None:
            found[kid] = key
    if not found:
        raise _UnusableError("has no key for ES256, EdDSA or RS256")
    return tuple(found.values())


def _kid(jwk: Mapping[str, object], number: int) -> str:
    kid = jwk.get("kid")
    # Without a name it could be neither rotated nor revoked.
    if not isinstance(kid, str) or not is_revocable(kid):
        raise _UnusableError(f"the key number {number} has no kid of 1 to 256 printable characters")
    return kid


def _public_key(jwk: Mapping[str, object], kid: str, setting: str) -> PublicKey | None:
    """The key, or None where it is for something else than signing JWTs that we take."""
    if jwk.get("kty") == "oct" or not _SECRET_MEMBERS.isdisjoint(jwk):
        raise _UnusableError(
            f"the key {kid!r} is private or symmetric; only public keys belong here, and whoever "
            "could read this file may have it now"
        )
    family = _FAMILIES.get((_text(jwk, "kty", kid), _text(jwk, "crv", kid)))
    unfit = "kty" if family is None else _unfit(jwk, kid, family.algorithm)
    if family is None or unfit is not None:
        log.warning("jwks_key_unused", setting=setting, kid=kid, because_of=unfit)
        return None
    try:
        key = family.load(jwk)
    except ValueError as error:
        raise _UnusableError(f"the key {kid!r} is broken or weak: {error}") from None
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(
        kid=kid,
        algorithm=family.algorithm,
        fingerprint=hashlib.sha256(spki).digest(),
        key=key,
    )


def _unfit(jwk: Mapping[str, object], kid: str, ours: Algorithm) -> str | None:
    """The member by which the key says that it is for something else (RFC 7517, 4.2 to 4.4)."""
    algorithm = _text(jwk, "alg", kid)
    if algorithm not in (None, ours):
        # One of ours on a key of another family, or HS256 with a public key, is no other use.
        if algorithm in _ALGORITHMS or str(algorithm).startswith("HS"):
            raise _UnusableError(f"the key {kid!r} is of a type that does not fit its alg")
        return "alg"
    if _text(jwk, "use", kid) not in (None, "sig"):
        return "use"
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        return "key_ops"
    return None


def _text(jwk: Mapping[str, object], name: str, kid: str) -> str | None:
    value = jwk.get(name)
    if value is not None and not isinstance(value, str):
        raise _UnusableError(f"the key {kid!r} has {name} that is no text")
    return value


def _bytes(jwk: Mapping[str, object], name: str) -> bytes:
    value = jwk.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is missing")  # noqa: TRY004 - one kind of error for a broken key
    try:
        return base64url(value)
    except ValueError:
        raise ValueError(f"{name} is not base64url") from None


def _p256(jwk: Mapping[str, object]) -> ec.EllipticCurvePublicKey:
    x, y = _bytes(jwk, "x"), _bytes(jwk, "y")
    if (len(x), len(y)) != (P256_BYTES, P256_BYTES):
        raise ValueError(f"x and y are {P256_BYTES} bytes each")
    point = ec.EllipticCurvePublicNumbers(
        int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP256R1()
    )
    try:
        return point.public_key()
    except ValueError:
        raise ValueError("it is not a point of the curve") from None


def _ed25519(jwk: Mapping[str, object]) -> ed25519.Ed25519PublicKey:
    try:
        return ed25519.Ed25519PublicKey.from_public_bytes(_bytes(jwk, "x"))
    except ValueError:
        raise ValueError("x is no Ed25519 key of 32 bytes") from None


def _rsa(jwk: Mapping[str, object]) -> rsa.RSAPublicKey:
    modulus = int.from_bytes(_bytes(jwk, "n"), "big")
    exponent = int.from_bytes(_bytes(jwk, "e"), "big")
    if not MIN_RSA_BITS <= modulus.bit_length() <= MAX_RSA_BITS:
        raise ValueError(f"n has {modulus.bit_length()} bits, not {MIN_RSA_BITS} to {MAX_RSA_BITS}")
    if exponent.bit_length() > MAX_RSA_EXPONENT_BITS:
        raise ValueError(f"e has more than {MAX_RSA_EXPONENT_BITS} bits")
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError:
        raise ValueError("n and e make no key") from None


@dataclass(frozen=True, slots=True)
class _Family:
    algorithm: Algorithm
    load: Callable[[Mapping[str, object]], _Key]


_FAMILIES: Mapping[tuple[str | None, str | None], _Family] = {
    ("EC", "P-256"): _Family("ES256", _p256),
    ("OKP", "Ed25519"): _Family("EdDSA", _ed25519),
    ("RSA", None): _Family("RS256", _rsa),
}
_ALGORITHMS = frozenset(family.algorithm for family in _FAMILIES.values())
