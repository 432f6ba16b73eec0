"""Admin routes about payment tokens' metadata and the audit chain. No card data."""

import re
from datetime import date

from glamd.admin.query import wrong
from glamd.admin.services import Audit, Tokens
from glamd.http.call import Answer, Call
from glamd.http.payment_tokens import as_json, token_of
from glamd.http.routes import OPERATOR, Route
from glamd.payments.audit import AuditReport
from glamd.payments.audit_chain import Head

_HEAD = re.compile(
    r"((?!0000)[0-9]{4}-(?:0[1-9]|1[0-2]))(?:-01)?:([1-9][0-9]{0,17}):([0-9A-Fa-f]{64})"
)


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

    async def _verify(self, call: Call) -> Answer:
        return Answer(data=_report(await self._audit.verify(head=_head_in_query(call))))


def _head_in_query(call: Call) -> Head | None:
    """The end of the chain as `audit_head` was logged, None where it is absent."""
    given = call.request.query.getall("head", [])
    if not given:
        return None
    found = _HEAD.fullmatch(given[0])
    if len(given) > 1 or found is None:
        raise wrong("head", "It is one MONTH:SEQ:MAC, as in the log's audit_head.")
    month, seq, mac = found.groups()
    return Head(date.fromisoformat(f"{month}-01"), int(seq), bytes.fromhex(mac))


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
