"""Admin routes about payment tokens' metadata and the audit chain. No card data."""

from glamd.admin.services import Audit, Tokens
from glamd.http.call import Answer, Call
from glamd.http.payment_tokens import as_json, token_of
from glamd.http.routes import OPERATOR, Route
from glamd.payments.audit import AuditReport


class TokenRoutes:
    """Handlers of the routes about tokens and the audit."""

    def __init__(self, *, tokens: Tokens, audit: Audit) -> None:
        self._tokens = tokens
        self._audit = audit

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        found = (
            ("GET", "/v1/tokens/{token}", self._show),
            ("POST", "/v1/tokens/{token}/revoke", self._revoke),
            ("POST", "/v1/audit/verify", self._verify),
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

    async def _verify(self, _call: Call) -> Answer:
        return Answer(data=_report(await self._audit.verify()))


def _report(report: AuditReport) -> dict[str, object]:
    broken = report.first_broken
    return {
        "ok": report.ok,
        "rows": report.rows,
        "partitions": report.partitions,
        "first_broken": None
        if broken is None
        else {
            "partition": f"{broken.month:%Y-%m}",
            "seq": broken.seq,
            "reason": str(broken.reason),
            "detail": broken.detail,
        },
    }
