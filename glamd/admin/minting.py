"""JWTs for trying things out, signed with the daemon's own secrets. Development only.

The composition root makes a `Mint` in development and none in production.
"""

from datetime import timedelta

import jwt

from glamd.clock import Clock
from glamd.http.auth import ALGORITHM, AUDIENCE

LIFETIME = timedelta(hours=12)


class Mint:
    """Signs JWTs that the api listener believes for twelve hours."""

    def __init__(self, *, client_secret: str, internal_secret: str, clock: Clock) -> None:
        self._client_secret = client_secret
        self._internal_secret = internal_secret
        self._clock = clock

    def client(self, *, merchant_id: str, shop: str, scope: str | None) -> str:
        """A storefront's token; the merchant need not exist."""
        claims = {"merchant_id": merchant_id, "shop": shop, "sub": shop}
        return self._signed(claims, scope, self._client_secret)

    def internal(self, *, service: str, scope: str | None) -> str:
        """An internal service's token."""
        claims = {"service": service, "sub": service}
        return self._signed(claims, scope, self._internal_secret)

    def _signed(self, claims: dict[str, str], scope: str | None, secret: str) -> str:
        now = int(self._clock.now().timestamp())
        times = {"iat": now, "exp": now + int(LIFETIME.total_seconds())}
        granted = {} if scope is None else {"scope": scope}
        return jwt.encode(
            {**claims, **granted, **times, "aud": AUDIENCE}, secret, algorithm=ALGORITHM
        )
