"""Listeners on real sockets with in-memory capabilities behind, for a test to change."""

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import cast

from glamd.billing.service import Billing
from glamd.billing.webhooks.service import Webhooks
from glamd.errors import NotFoundError, UnauthenticatedError, UnavailableError
from glamd.http.auth import Authenticator
from glamd.http.health import Health, Part
from glamd.http.limits import HttpLimits, RateLimiter
from glamd.http.server import ApiServer
from glamd.http.services import PlatformVault
from glamd.http.tls import WorkerTls
from glamd.http.worker import WorkerServer
from glamd.idempotency import IdempotencyKeys
from glamd.ledger.service import Ledger
from glamd.merchants.store import Merchant
from tests.support.http_fakes import (
    CLIENT_SECRET,
    INTERNAL_SECRET,
    FakeDetokenizer,
    FakeSubmissions,
    FakeTokens,
    ManualClock,
    merchant,
)

TRUST_DOMAIN = "glamd.test"
WORKER_URI = f"spiffe://{TRUST_DOMAIN}/worker/settler"


def nothing_is_revoked(*, jti: str | None, kid: str | None) -> bool:
    """Believe every token that was ever made."""
    return False


class NobodyIsBelieved:
    """Webhooks, of which none is signed rightly."""

    async def take(self, _platform: str, _body: bytes, _headers: Mapping[str, str]) -> None:
        """Refuse it."""
        raise UnauthenticatedError("The webhook's signature is missing or wrong.")


@dataclass(slots=True)
class World:
    """What stands around the listeners."""

    clock: ManualClock = field(default_factory=ManualClock)
    tokens: FakeTokens = field(default_factory=FakeTokens)
    detokenizer: FakeDetokenizer = field(default_factory=FakeDetokenizer)
    submissions: FakeSubmissions = field(default_factory=FakeSubmissions)
    limits: HttpLimits = field(default_factory=lambda: HttpLimits(linger_s=0.2))
    draining: bool = False
    database: str | None = None
    bus: str | None = None
    rate_per_s: float = 1000.0
    burst: int = 1000
    domains_away: bool = False
    checks: int = 0
    cors_origins: tuple[str, ...] = ()

    async def merchant_by_domain(self, domain: str) -> Merchant:
        """Only one shop is known."""
        if self.domains_away:
            raise UnavailableError("The database is away.")
        if domain != "shop.example":
            raise NotFoundError("There is no such merchant.", code="MERCHANT_NOT_FOUND")
        return merchant()

    async def ask_database(self) -> str | None:
        """The required part's check."""
        self.checks += 1
        return self.database

    async def ask_bus(self) -> str | None:
        """The other part's check."""
        return self.bus

    def health(self) -> Health:
        """Readiness out of both."""
        parts = (
            Part(name="database", required=True, check=self.ask_database),
            Part(name="nats", required=False, check=self.ask_bus),
        )
        return Health(parts=parts, draining=lambda: self.draining, clock=self.clock)

    def limiter(self) -> RateLimiter:
        """The rate that the test chose."""
        return RateLimiter(rate_per_s=self.rate_per_s, burst=self.burst, clock=self.clock)

    def authenticator(self) -> Authenticator:
        """Believes the tests' secrets."""
        return Authenticator(
            client_secrets=["an-older-client-secret-of-32-bytes-x", CLIENT_SECRET],
            internal_secrets=[INTERNAL_SECRET],
            require_audience=False,
            merchant_by_domain=self.merchant_by_domain,
            clock=self.clock,
            is_revoked=nothing_is_revoked,
        )

    def api_server(self) -> ApiServer:
        """An api listener that is not started."""
        return ApiServer(
            tokens=self.tokens,
            submissions=self.submissions,
            # Platform tokens are tried where a database is: `test_platform_token_routes`.
            platform_tokens=cast("PlatformVault", None),
            readers=(),
            idempotency=cast("IdempotencyKeys", None),
            # So is money: `test_credit_routes`, `test_billing_routes`, `test_webhook_routes`.
            ledger=cast("Ledger", None),
            billing=cast("Billing", None),
            webhooks=cast("Webhooks", NobodyIsBelieved()),
            authenticator=self.authenticator(),
            health=self.health(),
            limiter=self.limiter(),
            trusted_proxies=[ip_network("127.0.0.1/32")],
            cors_origins=self.cors_origins,
            draining=lambda: self.draining,
            clock=self.clock,
            limits=self.limits,
        )

    def worker_server(self) -> WorkerServer:
        """A workers' listener that is not started."""
        return WorkerServer(
            detokenizer=self.detokenizer,
            submissions=self.submissions,
            trust_domain=TRUST_DOMAIN,
            health=self.health(),
            limiter=self.limiter(),
            draining=lambda: self.draining,
            clock=self.clock,
            limits=self.limits,
        )

    @asynccontextmanager
    async def api(self, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
        """A running api listener's port."""
        server = self.api_server()
        try:
            yield await server.start("127.0.0.1", 0, context)
        finally:
            await server.stop(1.0)

    @asynccontextmanager
    async def worker(self, tls: WorkerTls) -> AsyncIterator[int]:
        """A running workers' listener's port."""
        server = self.worker_server()
        try:
            yield await server.start("127.0.0.1", 0, tls)
        finally:
            await server.stop(1.0)
