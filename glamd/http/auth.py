"""Bearer tokens: who a JWT says its bearer is, once its signature and times are believed.

HS256 under one of several secrets, for clients and for internal services. Key sets from a file
and revocation are not here yet. Nothing of a token is logged or put into a message, and a token is
kept only as its SHA-256.
"""

import hashlib
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal
from uuid import UUID

import jwt
from aiohttp import web

from glamd.clock import Clock
from glamd.errors import ConfigError, NotFoundError, UnauthenticatedError
from glamd.http.identity import Client, Identity, Internal
from glamd.merchants.store import Merchant

ALGORITHM = "HS256"
AUDIENCE = "glamd"
LEEWAY_S = 60
MAX_LIFETIME_S = 24 * 3600
MAX_TOKEN_CHARS = 4096
MAX_CACHED = 10_000
# A cached token is looked at anew now and then, so that a shop that moved to another merchant is.
MAX_CACHED_S = 300

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}")
# Headers by which a token would bring its own key, or ask for what we do not know.
_REFUSED_HEADERS = ("jwk", "jku", "x5c", "x5u", "crit")

MerchantByDomain = Callable[[str], Awaitable[Merchant]]
"""Raises `NotFoundError` for a domain that is no merchant's."""

TokenKind = Literal["client", "internal"]


class Authenticator:
    """Recognises the bearer of `Authorization: Bearer <JWT>`."""

    def __init__(
        self,
        *,
        client_secrets: Sequence[str],
        internal_secrets: Sequence[str],
        require_audience: bool,
        merchant_by_domain: MerchantByDomain,
        clock: Clock,
        max_lifetime_s: float = MAX_LIFETIME_S,
        cached: int = MAX_CACHED,
    ) -> None:
        """Raises `ConfigError` for a secret that cannot be one, such as a PEM key."""
        self._secrets: tuple[tuple[TokenKind, str], ...] = (
            *(("client", s) for s in client_secrets),
            *(("internal", s) for s in internal_secrets),
        )
        for kind, secret in self._secrets:
            _refuse_bad_secret(kind, secret)
        self._require_audience = require_audience
        self._merchant_by_domain = merchant_by_domain
        self._clock = clock
        self._max_lifetime_s = min(max_lifetime_s, MAX_LIFETIME_S)
        self._limit = cached
        # SHA-256 of a verified token to its bearer and the epoch second it is believed until.
        self._cache: dict[bytes, tuple[Identity, float]] = {}

    async def __call__(self, request: web.BaseRequest) -> Identity:
        """The bearer. Raises `UnauthenticatedError`, `UnavailableError` (database away)."""
        token = _bearer(request.headers.getall("Authorization", []))
        digest = hashlib.sha256(token.encode("ascii")).digest()
        now = self._clock.now().timestamp()
        known = self._cache.get(digest)
        if known is not None:
            if now < known[1]:
                return known[0]
            del self._cache[digest]
        kind, claims = self._verify(token)
        expires_at = self._check_times(claims, now)
        self._check_audience(claims)
        identity = await self._identity(kind, claims)
        # Between `exp` and the end of its leeway a token is verified each time, never cached.
        if expires_at > now:
            self._keep(digest, identity, min(expires_at, now + MAX_CACHED_S))
        return identity

    def _verify(self, token: str) -> tuple[TokenKind, Mapping[str, object]]:
        for kind, secret in self._secrets:
            try:
                found = jwt.decode_complete(
                    token,
                    secret,
                    algorithms=[ALGORITHM],
                    # Times and audience are checked here, by the injected clock and our rules.
                    options={
                        "verify_exp": False,
                        "verify_nbf": False,
                        "verify_iat": False,
                        "verify_aud": False,
                        "verify_sub": False,
                        "verify_jti": False,
                    },
                )
            except jwt.InvalidSignatureError:
                continue
            except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
                raise _refused("is not a JWT signed with HS256") from None
            if any(name in found["header"] for name in _REFUSED_HEADERS):
                raise _refused("has a header that is not taken")
            return kind, found["payload"]
        raise _refused("is signed by nobody known")

    def _check_times(self, claims: Mapping[str, object], now: float) -> float:
        """`exp` in epoch seconds, once all times fit."""
        expires_at = _number(claims, "exp")
        if expires_at is None:
            raise _refused("has no expiry")
        if expires_at <= now - LEEWAY_S:
            raise _refused("has expired")
        if expires_at > now + self._max_lifetime_s + LEEWAY_S:
            raise _refused("would live for too long")
        for name in ("nbf", "iat"):
            since = _number(claims, name)
            if since is not None and since > now + LEEWAY_S:
                raise _refused("is not valid yet")
        return float(expires_at)

    def _check_audience(self, claims: Mapping[str, object]) -> None:
        if "aud" not in claims:
            if self._require_audience:
                raise _refused("has no audience")
            return
        audience = claims["aud"]
        if audience != AUDIENCE and not (isinstance(audience, list) and AUDIENCE in audience):
            raise _refused("is for another audience")

    async def _identity(self, kind: TokenKind, claims: Mapping[str, object]) -> Identity:
        scopes = frozenset((_text(claims, "scope") or "").split())
        subject = _text(claims, "sub")
        if kind == "internal":
            service = _text(claims, "service") or subject
            if service is None or not _NAME.fullmatch(service):
                raise _refused("names no service")
            return Internal(name=service, scopes=scopes)
        shop = _text(claims, "shop") or subject
        merchant_id = await self._merchant(_text(claims, "merchant_id"), shop)
        return Client(merchant_id=merchant_id, shop=shop, scopes=scopes)

    async def _merchant(self, claimed: str | None, shop: str | None) -> UUID:
        if claimed is not None:
            if not _UUID.fullmatch(claimed):
                raise _refused("has a merchant id that is no UUID")
            return UUID(claimed)
        if shop is None:
            raise _refused("names no merchant")
        if _UUID.fullmatch(shop):
            return UUID(shop)
        try:
            return (await self._merchant_by_domain(shop.lower())).merchant_id
        except NotFoundError:
            raise _refused("names no known merchant") from None

    def _keep(self, digest: bytes, identity: Identity, until: float) -> None:
        if len(self._cache) >= self._limit:
            # The oldest goes; a dict keeps the order in which its keys came.
            del self._cache[next(iter(self._cache))]
        self._cache[digest] = (identity, until)


def _bearer(headers: list[str]) -> str:
    if not headers:
        raise UnauthenticatedError("A bearer token is needed.")
    scheme, _, token = headers[0].partition(" ")
    token = token.strip()
    if len(headers) > 1 or scheme.lower() != "bearer" or not token:
        raise UnauthenticatedError("One Authorization header with a bearer token is needed.")
    if len(token) > MAX_TOKEN_CHARS or not token.isascii():
        raise _refused("is not a JWT")
    return token


def _number(claims: Mapping[str, object], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    # A bool is an int to Python; NaN and infinity are floats to its JSON parser.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused(f"has {name} that is no number")
    if isinstance(value, float) and not math.isfinite(value):
        raise _refused(f"has {name} that is no number")
    return value


def _text(claims: Mapping[str, object], name: str) -> str | None:
    """A claim that is text; null and the empty text are as good as absent."""
    value = claims.get(name)
    if value is not None and not isinstance(value, str):
        raise _refused(f"has {name} that is no text")
    return value or None


def _refused(what: str) -> UnauthenticatedError:
    return UnauthenticatedError(f"The token {what}.")


def _refuse_bad_secret(kind: TokenKind, secret: str) -> None:
    try:
        jwt.get_algorithm_by_name(ALGORITHM).prepare_key(secret)
    except jwt.PyJWTError as error:
        raise ConfigError(f"A {kind} JWT secret cannot be used: {error}") from None
