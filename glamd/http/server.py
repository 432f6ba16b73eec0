"""The api listener: its routes, its callers, its limits, put together.

Composition only: what happens to a request stands in `middleware`, what a route does in its file.
"""

import ssl
from collections.abc import Callable, Iterable, Sequence

from glamd.billing.service import Billing
from glamd.billing.webhooks.service import Webhooks
from glamd.clock import Clock
from glamd.http.addresses import ClientAddress, Network
from glamd.http.auth import Authenticator
from glamd.http.billing import BillingRoutes
from glamd.http.cors import Cors
from glamd.http.credits import CreditRoutes
from glamd.http.docs_page import docs_routes
from glamd.http.health import Health, health_routes
from glamd.http.idempotent import Once
from glamd.http.limits import HttpLimits, RateLimiter
from glamd.http.listener import Listener
from glamd.http.middleware import Pipeline
from glamd.http.openapi import published
from glamd.http.payment_tokens import PaymentTokenRoutes
from glamd.http.platform_tokens import PlatformTokenRoutes
from glamd.http.routes import RouteTable
from glamd.http.services import PlatformVault, Submissions, Tokens
from glamd.http.submissions import SubmissionRoutes
from glamd.http.webhooks import WebhookRoutes
from glamd.idempotency import IdempotencyKeys
from glamd.ledger.service import Ledger

STOP_TIMEOUT_S = 10.0


class ApiServer:
    """The listener for clients and internal services, whole."""

    def __init__(
        self,
        *,
        tokens: Tokens,
        submissions: Submissions,
        platform_tokens: PlatformVault,
        readers: Iterable[str],
        ledger: Ledger,
        billing: Billing,
        webhooks: Webhooks,
        idempotency: IdempotencyKeys,
        authenticator: Authenticator,
        health: Health,
        limiter: RateLimiter,
        trusted_proxies: Sequence[Network],
        cors_origins: Sequence[str],
        draining: Callable[[], bool],
        clock: Clock,
        limits: HttpLimits | None = None,
    ) -> None:
        """`readers` are the internal services that may read platform tokens.

        Raises `ConfigError` for an origin that is none.
        """
        limits = limits or HttpLimits()
        once = Once(idempotency)
        shops = PlatformTokenRoutes(platform_tokens, once=once, clock=clock, readers=readers)
        routes = (
            *PaymentTokenRoutes(tokens).routes(),
            *SubmissionRoutes(submissions).routes(),
            *shops.routes(),
            *CreditRoutes(ledger).routes(),
            *BillingRoutes(billing, once=once).routes(),
            *WebhookRoutes(webhooks, limiter=limiter, draining=draining).routes(),
            *health_routes(health),
            *docs_routes(published()),
        )
        pipeline = Pipeline(
            listener="api",
            table=RouteTable(routes),
            authenticate=authenticator,
            address=ClientAddress(trusted_proxies),
            limits=limits,
            limiter=limiter,
            draining=draining,
            clock=clock,
            refused=shops.refused,
            cors=Cors(cors_origins) if cors_origins else None,
        )
        self._listener = Listener(pipeline, name="api", limits=limits, refuse=pipeline.refuse)

    async def start(self, host: str, port: int, context: ssl.SSLContext | None) -> int:
        """Listen (port 0: any free one) and return the port.

        Raises `ConfigError` where the address cannot be bound.
        """
        return await self._listener.start_tcp(host, port, context)

    async def replace_tls(self, context: ssl.SSLContext) -> None:
        """Handshakes from now on use `context`; connections that stand keep what they have."""
        await self._listener.replace_tls(context)

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop listening, let requests under way end, close the connections."""
        await self._listener.stop(timeout_s)
