"""The admin socket: the operators' routes behind the kernel's word on who is asking.

Composition only. The same middleware as on the other listeners gives every command its ids, its
problem answers and its line in the log with the operator's uid; a success is the bare data.
"""

from pathlib import Path

from glamd.admin.minting import Mint
from glamd.admin.peers import Operators, PeerIdentity
from glamd.admin.routes_audit import AuditLog, AuditRoutes
from glamd.admin.routes_billing import BillingAdminRoutes
from glamd.admin.routes_credentials import CredentialRoutes
from glamd.admin.routes_daemon import Controls, DaemonRoutes, Facts
from glamd.admin.routes_devices import DeviceRoutes
from glamd.admin.routes_events import EventRoutes
from glamd.admin.routes_import import ImportRoutes
from glamd.admin.routes_jwt import JwtRoutes
from glamd.admin.routes_key_sets import KeySetRoutes
from glamd.admin.routes_keys import KeyLifeRoutes, KeyRoutes, Life
from glamd.admin.routes_ledger import LedgerRoutes
from glamd.admin.routes_merchants import Erasure, MerchantRoutes
from glamd.admin.routes_rewrap import RewrapRoutes
from glamd.admin.routes_tokens import Grants, TokenLife, TokenRoutes
from glamd.admin.services import (
    Actors,
    Credentials,
    Keys,
    Merchants,
    NewMerchants,
    OlderTokens,
    Registry,
    RevokedJwts,
    Tokens,
)
from glamd.clock import Clock
from glamd.http.addresses import ClientAddress
from glamd.http.health import Health
from glamd.http.limits import HttpLimits
from glamd.http.listener import Listener
from glamd.http.middleware import Pipeline
from glamd.http.routes import RouteTable

SOCKET_MODE = 0o660
STOP_TIMEOUT_S = 5.0
LIMITS = HttpLimits(connections=64, handler_timeout_s=4 * 3600.0)
"""A walk of the whole audit chain may take hours; an operator who waits no longer hangs up."""


class AdminServer:
    """The admin listener, whole."""

    def __init__(
        self,
        *,
        facts: Facts,
        controls: Controls,
        operators: Operators,
        health: Health,
        actors: Actors,
        merchants: Merchants,
        onboarding: NewMerchants,
        registry: Registry,
        keys: Keys,
        tokens: Tokens,
        audit: AuditLog,
        credentials: Credentials,
        importer: OlderTokens,
        revocations: RevokedJwts,
        money: LedgerRoutes,
        billing: BillingAdminRoutes,
        events: EventRoutes,
        imports: ImportRoutes,
        rewrapping: RewrapRoutes,
        key_life: Life,
        token_life: TokenLife,
        grants: Grants,
        erasure: Erasure,
        mint: Mint | None,
        clock: Clock,
    ) -> None:
        """`mint` is None outside development."""
        development = facts.environment == "development"
        daemon = DaemonRoutes(
            facts=facts, controls=controls, health=health, actors=actors, clock=clock
        )
        table = RouteTable(
            (
                *daemon.routes(),
                *MerchantRoutes(merchants, onboarding=onboarding, erasure=erasure).routes(),
                *DeviceRoutes(registry, facts=facts).routes(),
                *KeyRoutes(keys).routes(),
                *KeyLifeRoutes(key_life).routes(),
                *KeySetRoutes(keys, development=development).routes(),
                *TokenRoutes(tokens, life=token_life, grants=grants).routes(),
                *AuditRoutes(audit).routes(),
                *CredentialRoutes(credentials, importer=importer, clock=clock).routes(),
                *JwtRoutes(mint, revocations=revocations).routes(),
                *money.routes(),
                *billing.routes(),
                *events.routes(),
                *imports.routes(),
                *rewrapping.routes(),
            )
        )
        pipeline = Pipeline(
            listener="admin",
            table=table,
            authenticate=PeerIdentity(operators),
            address=ClientAddress(),
            limits=LIMITS,
            # An operator is not held to a rate, and may look on while the daemon drains.
            limiter=None,
            draining=lambda: False,
            clock=clock,
            envelope=False,
        )
        self._gid = operators.gid
        self._imports = imports
        self._listener = Listener(pipeline, name="admin", limits=LIMITS, refuse=pipeline.refuse)

    async def start(self, path: Path) -> None:
        """Listen on a unix socket at `path`, mode 0660.

        Raises `ConfigError` where another process listens there or the file cannot be made.
        """
        await self._listener.start_unix(path, mode=SOCKET_MODE, gid=self._gid)

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop listening, let commands under way end, remove the socket file."""
        await self._listener.stop(timeout_s)
        self._imports.close()
