"""Bearer tokens: who a JWT says its bearer is, once its signature and times are believed.

`jws` takes a token apart, `signers` says whose it is; here its times, audience, revocation and
claims are judged, and what was believed is remembered for a while. Nothing of a token is logged or
put into a message, and a token is kept only as its digest. What is refused is not remembered: that
would be a store for anybody to fill, and saves microseconds to those who guess.
"""

import hashlib
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Protocol
from uuid import UUID

import structlog
from aiohttp import hdrs, web

from glamd.clock import Clock
from glamd.errors import NotFoundError
from glamd.http.auth_metrics import OUTCOMES
from glamd.http.identity import Client, Identity, Internal
from glamd.http.jwks import PublicKey
from glamd.http.jws import RefusedTokenError, refused, take_apart
from glamd.http.signers import HS256, Signers, TokenKind
from glamd.ids import as_uuid
from glamd.merchants.store import Merchant
from glamd.revocations.service import is_revocable

ALGORITHM: Final = HS256
"""What our own tokens, minted for trying things out, are signed with."""
AUDIENCE: Final = "glamd"
LEEWAY_S: Final = 60
MAX_LIFETIME_S: Final = 24 * 3600
MAX_CACHED: Final = 10_000
# A cached token is looked at anew now and then, so that a shop that moved to another merchant is.
MAX_CACHED_S: Final = 300

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}")

log = structlog.get_logger()

MerchantByDomain = Callable[[str], Awaitable[Merchant]]
"""Raises `NotFoundError` for a domain that is no merchant's."""


class IsRevoked(Protocol):
    """Whether a token with these is not believed any more; from memory, without waiting."""

    def __call__(self, *, jti: str | None, kid: str | None) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Believed:
    """A verified token: its bearer, until when it may be believed, and what revokes it."""

    identity: Client | Internal
    kind: TokenKind
    until: datetime
    jti: str | None = field(repr=False)
    kid: str | None = field(repr=False)


class Authenticator:
    """Recognises the bearer of `Authorization: Bearer <JWT>`."""

    def __init__(
        self,
        *,
        client_secrets: Sequence[str],
        internal_secrets: Sequence[str],
        client_keys: Sequence[PublicKey] = (),
        internal_keys: Sequence[PublicKey] = (),
        require_audience: bool,
        merchant_by_domain: MerchantByDomain,
        clock: Clock,
        is_revoked: IsRevoked,
        max_lifetime_s: float = MAX_LIFETIME_S,
        cached: int = MAX_CACHED,
    ) -> None:
        """Raises `ConfigError` as `Signers` does."""
        self._require_audience = require_audience
        self._merchant_by_domain = merchant_by_domain
        self._clock = clock
        self._is_revoked = is_revoked
        self._max_lifetime_s = min(max_lifetime_s, MAX_LIFETIME_S)
        self._limit = cached
        # By the digest of the whole header's value.
        self._cache: dict[bytes, _Believed] = {}
        self.replace_keys(
            client_secrets=client_secrets,
            internal_secrets=internal_secrets,
            client_keys=client_keys,
            internal_keys=internal_keys,
        )

    def replace_keys(
        self,
        *,
        client_secrets: Sequence[str],
        internal_secrets: Sequence[str],
        client_keys: Sequence[PublicKey] = (),
        internal_keys: Sequence[PublicKey] = (),
    ) -> None:
        """Believe these keys and no others, at once; on `ConfigError` everything is as it was."""
        self._signers = Signers(
            client_secrets=client_secrets,
            internal_secrets=internal_secrets,
            client_keys=client_keys,
            internal_keys=internal_keys,
        )
        self._cache.clear()

    async def __call__(self, request: web.BaseRequest) -> Identity:
        """The bearer. Raises `UnauthenticatedError`, `UnavailableError` (database away)."""
        known = self.cached(request)
        if known is not None:
            return known
        try:
            identity = await self._verified(request)
        except RefusedTokenError as error:
            OUTCOMES.count("unknown", error.reason)
            log.debug("token_refused", reason=error.reason)
            raise
        OUTCOMES.count(identity.kind, "verified")
        return identity

    def cached(self, request: web.BaseRequest) -> Identity | None:
        """The bearer, if the same header was believed lately and still is; never raises.

        None says nothing about the token; `__call__` does.
        """
        values = request.headers.getall(hdrs.AUTHORIZATION, _NONE)
        if len(values) != 1:
            return None
        digest = _digest(values[0])
        known = self._cache.get(digest)
        if known is None:
            return None
        if self._clock.now() >= known.until or self._is_revoked(jti=known.jti, kid=known.kid):
            del self._cache[digest]
            return None
        OUTCOMES.cached[known.kind] += 1
        return known.identity

    async def _verified(self, request: web.BaseRequest) -> Client | Internal:
        header, token = _bearer(request.headers.getall(hdrs.AUTHORIZATION, _NONE))
        jws = take_apart(token)
        signers = self._signers
        kind, kid = signers.whose(jws)
        claims = jws.claims()
        jti = _text(claims, "jti")
        if jti is not None and not is_revocable(jti):
            raise refused("claims", "has a jti that cannot be taken")
        self._refuse_revoked(jti, kid)
        now = self._clock.now()
        expires_at_s = self._check_times(claims, now.timestamp())
        self._check_audience(claims, needed=self._require_audience or jws.algorithm != HS256)
        identity = await self._identity(kind, claims)
        # Looking a shop up takes its time, in which the keys may have been replaced.
        if self._signers is not signers:
            return await self._verified(request)
        self._refuse_revoked(jti, kid)
        # Between `exp` and the end of its leeway a token is verified each time, never cached.
        left_s = min(expires_at_s - now.timestamp(), MAX_CACHED_S)
        if left_s > 0:
            until = now + timedelta(seconds=left_s)
            self._keep(_digest(header), _Believed(identity, kind, until, jti, kid))
        return identity

    def _refuse_revoked(self, jti: str | None, kid: str | None) -> None:
        if self._is_revoked(jti=jti, kid=kid):
            raise refused("revoked", "has been revoked")

    def _check_times(self, claims: Mapping[str, object], now_s: float) -> float:
        """`exp` in epoch seconds, once all times fit."""
        expires_at_s = _number(claims, "exp")
        if expires_at_s is None:
            raise refused("claims", "has no expiry")
        if expires_at_s <= now_s - LEEWAY_S:
            raise refused("expired", "has expired")
        if expires_at_s > now_s + self._max_lifetime_s + LEEWAY_S:
            raise refused("lifetime", "would live for too long")
        for name in ("nbf", "iat"):
            since_s = _number(claims, name)
            if since_s is not None and since_s > now_s + LEEWAY_S:
                raise refused("not_yet_valid", "is not valid yet")
        return float(expires_at_s)

    def _check_audience(self, claims: Mapping[str, object], *, needed: bool) -> None:
        if "aud" not in claims:
            if needed:
                raise refused("audience", "has no audience")
            return
        audience = claims["aud"]
        several = audience if isinstance(audience, list) else [audience]
        if AUDIENCE not in several or not all(isinstance(one, str) for one in several):
            raise refused("audience", "is for another audience")

    async def _identity(self, kind: TokenKind, claims: Mapping[str, object]) -> Client | Internal:
        scopes = frozenset((_text(claims, "scope") or "").split())
        subject = _text(claims, "sub")
        if kind == "internal":
            service = _text(claims, "service") or subject
            if service is None or not _NAME.fullmatch(service):
                raise refused("claims", "names no service")
            return Internal(name=service, scopes=scopes)
        shop = _text(claims, "shop")
        if shop is not None and not shop.isascii():
            raise refused("claims", "has a shop that is no domain")
        # A subject is a shop's domain only where it could be one: what is not ASCII may become
        # another's domain once it is put into lower case, as the Kelvin sign becomes a k.
        if shop is None and subject is not None and subject.isascii():
            shop = subject
        merchant_id = await self._merchant(_text(claims, "merchant_id"), shop)
        return Client(merchant_id=merchant_id, shop=shop, scopes=scopes)

    async def _merchant(self, claimed: str | None, shop: str | None) -> UUID:
        if claimed is not None:
            merchant_id = as_uuid(claimed)
            if merchant_id is None:
                raise refused("claims", "has a merchant id that is no UUID")
            return merchant_id
        if shop is None:
            raise refused("claims", "names no merchant")
        merchant_id = as_uuid(shop)
        if merchant_id is not None:
            return merchant_id
        try:
            return (await self._merchant_by_domain(shop.lower())).merchant_id
        except NotFoundError:
            raise refused("claims", "names no known merchant") from None

    def _keep(self, digest: bytes, believed: _Believed) -> None:
        if len(self._cache) >= self._limit:
            # The oldest goes; a dict keeps the order in which its keys came.
            del self._cache[next(iter(self._cache))]
        self._cache[digest] = believed


_NONE: Sequence[str] = ()


def _digest(header: str) -> bytes:
    # BLAKE2b, 64 bytes: as hard to collide as SHA-512, and of all of them the quickest here.
    # What is not ASCII came as surrogates, and is no token either.
    return hashlib.blake2b(header.encode("utf-8", "surrogateescape")).digest()


def _bearer(headers: Sequence[str]) -> tuple[str, str]:
    """The one header there is, and the token in it."""
    if not headers:
        raise RefusedTokenError("missing", "A bearer token is needed.")
    scheme, _, token = headers[0].partition(" ")
    token = token.strip(" ")
    if len(headers) > 1 or scheme.lower() != "bearer" or not token:
        raise RefusedTokenError(
            "missing", "One Authorization header with a bearer token is needed."
        )
    return headers[0], token


def _number(claims: Mapping[str, object], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    # A bool is an int to Python, and 1e400 an infinity to its JSON parser.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refused("claims", f"has {name} that is no number")
    if isinstance(value, float) and not math.isfinite(value):
        raise refused("claims", f"has {name} that is no number")
    return value


def _text(claims: Mapping[str, object], name: str) -> str | None:
    """A claim that is text; null and the empty text are as good as absent."""
    value = claims.get(name)
    if value is None or value == "":
        return None
    # Control characters and lone surrogates, which no database takes, are nobody's name.
    if not isinstance(value, str) or not value.isprintable():
        raise refused("claims", f"has {name} that is no printable text")
    return value
