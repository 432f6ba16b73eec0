"""Admin routes about credits: an account, its transactions, a grant or a debit, and the proof.

An operator moves credits through the same ledger as everybody, under a reference; the log says who
did.
"""

from typing import Annotated
from uuid import UUID

import structlog
from pydantic import Field

from glamd.admin.query import DEFAULT_LIMIT, MAX_LIMIT, merchant_in_path
from glamd.db import Database
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.credit_models import Move, command_of, transaction_as_json
from glamd.http.queries import Query
from glamd.http.routes import OPERATOR, Route
from glamd.ledger.model import Account, Operation
from glamd.ledger.service import Ledger
from glamd.ledger.verify import Report, verify

VERIFY_LIMIT = 1000
"""Merchants that may be named at once; all of them need no naming."""

log = structlog.get_logger()


class HistoryQuery(Query):
    """Which transactions to list; `after` is the `next` of the page before."""

    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT
    after: str | None = None


class VerifyBody(Body):
    """Whose accounts to check; all there are where nobody is named."""

    merchants: Annotated[list[UUID], Field(min_length=1, max_length=VERIFY_LIMIT)] | None = None


class LedgerRoutes:
    """Handlers of the routes about credits."""

    def __init__(self, ledger: Ledger, *, database: Database) -> None:
        """`database` is where the ledger's tables are, for the proof reads them itself."""
        self._ledger = ledger
        self._database = database

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        of_merchant = "/v1/ledger/{merchant_id}"
        found = (
            ("POST", "/v1/ledger/verify", self._verify),
            ("GET", of_merchant, self._show),
            ("GET", f"{of_merchant}/transactions", self._history),
            ("POST", f"{of_merchant}/grant", self._grant),
            ("POST", f"{of_merchant}/consume", self._consume),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _show(self, call: Call) -> Answer:
        return Answer(data=_as_json(await self._ledger.account(merchant_in_path(call))))

    async def _history(self, call: Call) -> Answer:
        query = call.query(HistoryQuery)
        found = await self._ledger.transactions(
            merchant_in_path(call), limit=query.limit, cursor=query.after
        )
        data = {
            "transactions": [transaction_as_json(each) for each in found.items],
            "total": found.total,
            "next": found.next_cursor,
        }
        return Answer(data=data)

    async def _grant(self, call: Call) -> Answer:
        return await self._move(call, "credit")

    async def _consume(self, call: Call) -> Answer:
        return await self._move(call, "debit")

    async def _move(self, call: Call, operation: Operation) -> Answer:
        merchant_id = merchant_in_path(call)
        body = await call.json(Move)
        command = command_of(body, merchant_id, operation, correlation_id=call.correlation_id)
        applied = await self._ledger.apply(command)
        log.info(
            "credits_moved_by_operator",
            by=call.operator.name,
            merchant_id=str(merchant_id),
            operation=operation,
            amount=applied.transaction.amount,
            transaction_id=str(applied.transaction.id),
            replayed=applied.replayed,
        )
        data = {
            "merchant_id": merchant_id,
            "balance": applied.balance,
            "replayed": applied.replayed,
            "transaction": transaction_as_json(applied.transaction),
        }
        return Answer(data=data)

    async def _verify(self, call: Call) -> Answer:
        body = await call.json(VerifyBody)
        return Answer(data=_report(await verify(self._database, body.merchants)))


def _as_json(account: Account) -> dict[str, object]:
    return {
        "merchant_id": account.merchant_id,
        "balance": account.balance,
        "total_granted": account.total_granted,
        "total_consumed": account.total_consumed,
        "transactions": account.transaction_count,
        "version": account.version,
        "platform": account.platform_name,
        "shop_id": account.platform_id,
        "domain": account.platform_domain,
    }


def _report(report: Report) -> dict[str, object]:
    return {
        "ok": not report.broken_accounts,
        "accounts": report.accounts,
        "transactions": report.transactions,
        "broken_accounts": report.broken_accounts,
        "broken": [
            {
                "merchant_id": broken.merchant_id,
                "rule": broken.rule,
                "seq": broken.seq,
                "transaction_id": broken.transaction_id,
            }
            for broken in report.broken
        ],
    }
