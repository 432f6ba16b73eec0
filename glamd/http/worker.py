"""The workers' listener: mutual TLS, for workers and, to submit what they read, for devices.

Composition only: who a certificate names stands in `certificates`, what a route does in its file.
"""

import ssl
from collections.abc import Callable

from glamd.clock import Clock
from glamd.errors import ConfigError
from glamd.http.addresses import ClientAddress
from glamd.http.certificates import CertificateIdentity
from glamd.http.detokenizing import DetokenizeRoutes
from glamd.http.health import Health, health_routes
from glamd.http.limits import HttpLimits, RateLimiter
from glamd.http.listener import Listener
from glamd.http.middleware import Pipeline
from glamd.http.routes import RouteTable
from glamd.http.services import Detokenizer, Submissions
from glamd.http.submissions import SubmissionRoutes
from glamd.http.tls import WorkerTls

STOP_TIMEOUT_S = 10.0


class WorkerServer:
    """The workers' listener, whole."""

    def __init__(
        self,
        *,
        detokenizer: Detokenizer,
        submissions: Submissions,
        trust_domain: str,
        health: Health,
        limiter: RateLimiter,
        draining: Callable[[], bool],
        clock: Clock,
        limits: HttpLimits | None = None,
    ) -> None:
        limits = limits or HttpLimits()
        detokenize = DetokenizeRoutes(detokenizer)
        routes = (
            *detokenize.routes(),
            *SubmissionRoutes(submissions).routes(),
            *health_routes(health),
        )
        self._identity = CertificateIdentity(trust_domain, clock)
        pipeline = Pipeline(
            listener="worker",
            table=RouteTable(routes),
            authenticate=self._identity,
            # Callers come with their own certificate, so nobody stands in between.
            address=ClientAddress(),
            limits=limits,
            limiter=limiter,
            draining=draining,
            clock=clock,
            refused=detokenize.refused,
        )
        self._listener = Listener(pipeline, name="worker", limits=limits, refuse=pipeline.refuse)

    async def start(self, host: str, port: int, tls: WorkerTls) -> int:
        """Listen (port 0: any free one) and return the port.

        Raises `ConfigError` where the address cannot be bound, or the context would let in a
        client without a certificate.
        """
        _demand_certificates(tls.context)
        self._identity.trust(tls)
        return await self._listener.start_tcp(host, port, tls.context)

    async def replace_tls(self, tls: WorkerTls) -> None:
        """Handshakes from now on use `tls`; raises `ConfigError` as `start` does."""
        _demand_certificates(tls.context)
        self._identity.trust(tls)
        await self._listener.replace_tls(tls.context)

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop listening, let requests under way end, close the connections."""
        await self._listener.stop(timeout_s)


def _demand_certificates(context: ssl.SSLContext) -> None:
    if context.verify_mode is not ssl.CERT_REQUIRED:
        raise ConfigError("The workers' listener must require client certificates.")
