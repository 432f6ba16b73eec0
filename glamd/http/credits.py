"""`/api/credits`: a merchant's credits for its own back end, and moving them for other services.

What a command does to an account, and that a reference has one effect, is the ledger's. Whose
account a caller may see is decided here.
"""

import re
from typing import Final

import structlog

from glamd.http.call import NO_HEADERS, Answer, Call
from glamd.http.credit_models import (
    CreditAccount,
    CreditsMoved,
    CreditTransaction,
    MoveBody,
    TransactionQuery,
    account_as_json,
    command_of,
    transaction_as_json,
)
from glamd.http.idempotent import REPLAYED
from glamd.http.identity import Client
from glamd.http.operation import Operation, Refusal
from glamd.http.routes import Route, client, internal
from glamd.ledger.model import Account, AccountNotFoundError, Applied
from glamd.ledger.model import Operation as LedgerOperation
from glamd.ledger.service import Ledger

log = structlog.get_logger()

DOMAIN_HEADER: Final = "X-Shop-Domain"
READ_SCOPE: Final = "bff:call"
WRITE_SCOPE: Final = "credits:write"

_DOMAIN = re.compile(r"[a-z0-9.-]{1,253}")


class CreditRoutes:
    """Handlers of the credit routes on the api listener."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        readers = (client(READ_SCOPE),)
        writers = (internal(WRITE_SCOPE),)
        return (
            Route(
                method="GET",
                path="/api/credits",
                handler=self._show,
                access=readers,
                operation=_SHOW,
            ),
            Route(
                method="GET",
                path="/api/credits/transactions",
                handler=self._list,
                access=readers,
                operation=_LIST,
            ),
            Route(
                method="POST",
                path="/api/credits/consume",
                handler=self._consume,
                access=writers,
                operation=_CONSUME,
            ),
            Route(
                method="POST",
                path="/api/credits/grant",
                handler=self._grant,
                access=writers,
                operation=_GRANT,
            ),
        )

    async def _show(self, call: Call) -> Answer:
        return Answer(data=account_as_json(await self._account(call)))

    async def _list(self, call: Call) -> Answer:
        query = call.query(TransactionQuery)
        page = query.number()
        account = await self._account(call)
        found = await self._ledger.transactions(
            account.merchant_id, limit=query.limit, page=page, cursor=query.cursor
        )
        return Answer(
            data=[transaction_as_json(each) for each in found.items],
            pagination=query.pagination(total=found.total, next_cursor=found.next_cursor),
        )

    async def _consume(self, call: Call) -> Answer:
        return await self._move(call, "debit")

    async def _grant(self, call: Call) -> Answer:
        return await self._move(call, "credit")

    async def _move(self, call: Call, operation: LedgerOperation) -> Answer:
        body = await call.json(MoveBody)
        command = command_of(
            body,
            body.merchant_id,
            operation,
            correlation_id=call.correlation_id,
            metadata=None if body.metadata is None else dict(body.metadata),
        )
        applied = await self._ledger.apply(command)
        return Answer(
            data=moved_as_json(applied), headers=REPLAYED if applied.replayed else NO_HEADERS
        )

    async def _account(self, call: Call) -> Account:
        """The caller's account: its merchant's, or else that of the shop that both its headers and
        its token name. Raises `AccountNotFoundError`.
        """
        caller = call.caller
        assert isinstance(caller, Client)
        named = _named_shop(call)
        try:
            account = await self._ledger.account(caller.merchant_id)
        except AccountNotFoundError:
            # Whoever says another shop's name has no right to it by that.
            if named is None or named != _lower(caller.shop or ""):
                raise
            account = await self._ledger.account_by_domain(named)
        if named is not None and named != _lower(account.platform_domain):
            log.warning(
                "credit_domain_differs",
                merchant_id=str(account.merchant_id),
                account_domain=account.platform_domain,
                named=named if _DOMAIN.fullmatch(named) else "?",
            )
        return account


def moved_as_json(applied: Applied) -> CreditsMoved:
    """What a command came to, as the contract names it."""
    return {"transaction": transaction_as_json(applied.transaction), "balance": applied.balance}


def _named_shop(call: Call) -> str | None:
    """The shop's domain that the request names; None without one, or with several."""
    named = call.request.headers.getall(DOMAIN_HEADER, [])
    return (_lower(named[0].strip()) or None) if len(named) == 1 else None


def _lower(domain: str) -> str:
    # In lower case what is not ASCII may become another's domain (the Kelvin sign is a k then).
    return domain.lower() if domain.isascii() else domain


_TAG: Final = "Credits"
_NOT_FOUND: Final = Refusal(
    code="CREDIT_ACCOUNT_NOT_FOUND", status=404, when="The merchant has no credit account."
)
_TRANSACTION: Final = {
    "id": "019b1f6e-7d1c-7a52-9c0f-3a5d1e8b2f40",
    "amount": 1,
    "operation": "debit",
    "balance_before": 500,
    "balance_after": 499,
    "reference_type": "match",
    "reference_id": "match-8713",
    "description": None,
    "metadata": {"shopper_id": "s-17", "matched_items_count": 4},
    "created_at": "2026-11-21T12:28:47.818622Z",
}
_BODY: Final = {
    "merchant_id": "6f1d0a52-5b0e-4a54-9f0a-0d7c0a1f2b3c",
    "amount": 1,
    "reference_type": "match",
    "reference_id": "match-8713",
    "metadata": {"shopper_id": "s-17", "matched_items_count": 4},
}
_BY_DOMAIN: Final = (
    f"Where the token's merchant has no account, it is that of the shop in `{DOMAIN_HEADER}`, "
    "which has to be the token's shop."
)
_ONCE: Final = (
    "The reference is the idempotency key, for ever: the same reference with the same operation "
    "and amount is answered with the first transaction and `Idempotent-Replayed: true`. The header "
    "`Idempotency-Key` is not needed and not looked at."
)

_SHOW: Final = Operation(
    id="showCredits",
    tag=_TAG,
    summary="The merchant's balance",
    description=_BY_DOMAIN,
    answer=CreditAccount,
    example={
        "balance": 499,
        "total_granted": 500,
        "total_consumed": 1,
        "platform_name": "shopify",
        "shop_domain": "shop.example.com",
    },
    refusals=(_NOT_FOUND,),
)
_LIST: Final = Operation(
    id="listCreditTransactions",
    tag=_TAG,
    summary="The merchant's transactions, newest first",
    description=_BY_DOMAIN,
    query=TransactionQuery,
    answer=list[CreditTransaction],
    example=[_TRANSACTION],
    paginated=True,
    refusals=(_NOT_FOUND,),
)
_DUPLICATE: Final = Refusal(
    code="DUPLICATE_TRANSACTION",
    status=409,
    when="The reference was used for another operation or amount.",
)
_CONSUME: Final = Operation(
    id="consumeCredits",
    tag=_TAG,
    summary="Take credits from a merchant",
    description=_ONCE,
    body=MoveBody,
    body_example=_BODY,
    answer=CreditsMoved,
    example={"transaction": _TRANSACTION, "balance": 499},
    refusals=(
        Refusal(
            code="INSUFFICIENT_CREDITS",
            status=402,
            when="The balance is smaller than the amount; `balance` and `required` tell both. "
            "Nothing is taken, and the reference is not used up.",
        ),
        _NOT_FOUND,
        _DUPLICATE,
    ),
)
_GRANT: Final = Operation(
    id="grantCredits",
    tag=_TAG,
    summary="Grant credits to a merchant",
    description=_ONCE,
    body=MoveBody,
    body_example={
        "merchant_id": _BODY["merchant_id"],
        "amount": 500,
        "reference_type": "purchase",
        "reference_id": "019b1f6e-7d1c-7a52-9c0f-3a5d1e8b2f40",
        "description": "Medium pack",
    },
    answer=CreditsMoved,
    example={
        "transaction": {
            **_TRANSACTION,
            "amount": 500,
            "operation": "credit",
            "balance_before": 0,
            "balance_after": 500,
            "reference_type": "purchase",
            "reference_id": "019b1f6e-7d1c-7a52-9c0f-3a5d1e8b2f40",
            "description": "Medium pack",
            "metadata": None,
        },
        "balance": 500,
    },
    refusals=(_NOT_FOUND, _DUPLICATE),
)
