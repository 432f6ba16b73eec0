"""Admin routes about payment tokens' metadata. No card data."""

from dataclasses import asdict
from typing import Protocol

from glamd.admin.services import Tokens
from glamd.http.call import Answer, Call
from glamd.http.payment_tokens import as_json, token_of
from glamd.http.routes import OPERATOR, Route
from glamd.payments.life.service import Purged
from glamd.payments.model import DECRYPT_FIELDS, Grant


class TokenLife(Protocol):
    """What becomes of tokens after their end."""

    async def purge_now(self) -> Purged:
        """Everything that is due; raises `UnavailableError`."""


class Grants(Protocol):
    """What workers may look at."""

    @property
    def grants(self) -> tuple[Grant, ...]:
        """Those in force, by worker."""


class TokenRoutes:
    """Handlers of the routes about tokens."""

    def __init__(self, tokens: Tokens, *, life: TokenLife, grants: Grants) -> None:
        self._tokens = tokens
        self._life = life
        self._grants = grants

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        found = (
            ("GET", "/v1/tokens/{token}", self._show),
            ("POST", "/v1/tokens/{token}/revoke", self._revoke),
            ("POST", "/v1/purge", self._purge),
            ("GET", "/v1/grants", self._list_grants),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _show(self, call: Call) -> Answer:
        token = await self._tokens.show(token_of(call), merchant_id=None)
        return Answer(data={"merchant_id": token.merchant_id, **as_json(token)})

    async def _revoke(self, call: Call) -> Answer:
        revoked = await self._tokens.revoke(
            token_of(call), merchant_id=None, correlation_id=call.correlation_id
        )
        return Answer(data={"token": revoked.token, "status": revoked.status})

    async def _purge(self, _call: Call) -> Answer:
        return Answer(data=asdict(await self._life.purge_now()))

    async def _list_grants(self, _call: Call) -> Answer:
        return Answer(data={"grants": [_grant(grant) for grant in self._grants.grants]})


def _grant(grant: Grant) -> dict[str, object]:
    return {
        "worker": grant.worker,
        "purposes": sorted(grant.purposes),
        "fields": [field for field in DECRYPT_FIELDS if field in grant.fields],
        "merchants": sorted(str(merchant_id) for merchant_id in grant.merchants) or "all",
        "rate_per_s": grant.rate_per_s,
    }
