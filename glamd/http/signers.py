"""Whose signature is believed: the secrets and public keys of clients and of internal services.

The key decides the algorithm. The header of a token only says which keys are asked, so that no
header can make a public key into a secret, or a signature of one algorithm count for another.
"""

from collections.abc import Sequence
from typing import Final, Literal

import jwt

from glamd.errors import ConfigError
from glamd.http.jwks import PublicKey
from glamd.http.jws import Jws, refused

HS256: Final = "HS256"
MAX_TRIED: Final = 4
"""Keys that are asked about a token that names none; with more than these it has to name one.

The old and the new one of both kinds: whoever guesses makes us try them all."""

TokenKind = Literal["client", "internal"]

_HMAC = jwt.get_algorithm_by_name(HS256)


class Signers:
    """Every key that may sign, of both kinds; immutable, made anew at a reload."""

    def __init__(
        self,
        *,
        client_secrets: Sequence[str],
        internal_secrets: Sequence[str],
        client_keys: Sequence[PublicKey] = (),
        internal_keys: Sequence[PublicKey] = (),
    ) -> None:
        """ConfigError for a secret that can be none, and for a key that would be of both kinds."""
        self._secrets: tuple[tuple[TokenKind, bytes], ...] = (
            *(("client", _secret("client", text)) for text in client_secrets),
            *(("internal", _secret("internal", text)) for text in internal_secrets),
        )
        if not set(client_secrets).isdisjoint(internal_secrets):
            raise ConfigError("A JWT secret is either the clients' or the internal services'.")
        self._keys: tuple[tuple[TokenKind, PublicKey], ...] = (
            *(("client", key) for key in client_keys),
            *(("internal", key) for key in internal_keys),
        )
        seen: dict[bytes, str] = {}
        for _, key in self._keys:
            # Under a second kid a key would outlive the revocation of the first; in the other file
            # its tokens would be of two kinds.
            if key.fingerprint in seen:
                twin = seen[key.fingerprint]
                raise ConfigError(f"The JWKS keys {twin!r} and {key.kid!r} are one and the same.")
            seen[key.fingerprint] = key.kid

    def whose(self, jws: Jws) -> tuple[TokenKind, str | None]:
        """The kind of bearer whose key signed it, and the kid to revoke it by.

        That is the key's own kid, whether or not the token names it, or for HS256 what the token
        says, since secrets have no names. `RefusedTokenError` where no key of ours signed it.
        """
        if jws.algorithm == HS256:
            return self._by_secret(jws), jws.kid
        return self._by_key(jws)

    def _by_secret(self, jws: Jws) -> TokenKind:
        # All of them are tried, so that the time does not tell which one it was.
        found: TokenKind | None = None
        for kind, secret in self._secrets:
            if _HMAC.verify(jws.signing_input, secret, jws.signature):
                found = kind
        if found is None:
            raise refused("signature", "is signed by nobody known")
        return found

    def _by_key(self, jws: Jws) -> tuple[TokenKind, str]:
        fitting = [pair for pair in self._keys if pair[1].algorithm == jws.algorithm]
        if not fitting:
            raise refused("algorithm", "is signed with an algorithm that is not taken")
        if jws.kid is not None:
            fitting = [pair for pair in fitting if pair[1].kid == jws.kid]
            if not fitting:
                raise refused("unknown_key", "names a key that is not known")
        elif len(fitting) > MAX_TRIED:
            raise refused("unknown_key", "does not name its key")
        for kind, key in fitting:
            if key.verifies(jws.signing_input, jws.signature):
                return kind, key.kid
        raise refused("signature", "is signed by nobody known")


def _secret(kind: TokenKind, text: str) -> bytes:
    try:
        secret: bytes = _HMAC.prepare_key(text)
    except jwt.PyJWTError as error:
        raise ConfigError(f"A {kind} JWT secret cannot be used: {error}") from None
    # RFC 7518, 3.2. PyJWT alone would warn at the first token and go on.
    if _HMAC.check_key_length(secret) is not None:
        raise ConfigError(f"A {kind} JWT secret cannot be used: it is shorter than 32 bytes.")
    return secret
