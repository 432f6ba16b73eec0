"""The api listener: its routes, its callers, its limits, put together.

Composition only: what happens to a request stands in `middleware`, what a route does in its file.
"""

import ssl
from collections.abc import Callable, Sequence

from glamd.clock import Clock
from glamd.http.addresses import ClientAddress, Network
from glamd.http.auth import Authenticator
from glamd.http.health import Health, health_routes
from glamd.http.limits import HttpLimits, RateLimiter
from glamd.http.listener import Listener
from glamd.http.middleware import Pipeline
from glamd.http.payment_tokens import PaymentTokenRoutes
from glamd.http.routes import RouteTable
from glamd.http.services import Tokens

STOP_TIMEOUT_S = 10.0


class ApiServer:
    """The listener for clients and internal services, whole."""

    def __init__(
        self,
        *,
        tokens: Tokens,
        authenticator: Authenticator,
        health: Health,
        limiter: RateLimiter,
        trusted_proxies: Sequence[Network],
        draining: Callable[[], bool],
        clock: Clock,
        limits: HttpLimits | None = None,
    ) -> None:
        limits = limits or HttpLimits()
        routes = (*PaymentTokenRoutes(tokens).routes(), *health_routes(health))
        pipeline = Pipeline(
            listener="api",
            table=RouteTable(routes),
            authenticate=authenticator,
            address=ClientAddress(trusted_proxies),
            limits=limits,
            limiter=limiter,
            draining=draining,
            clock=clock,
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
