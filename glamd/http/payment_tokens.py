"""`/api/v1/payment-tokens`: metadata of payment tokens for merchants and internal services.

No card data passes here; opening a token is `worker`'s. Rules of tokens are the payment part's.
"""

import re
from datetime import datetime
from typing import Annotated, Final, Literal
from uuid import UUID

from pydantic import Field
from typing_extensions import TypedDict

from glamd.errors import NotFoundError
from glamd.http.call import Answer, Call, Pagination
from glamd.http.identity import Client
from glamd.http.operation import Operation, Param, Refusal
from glamd.http.queries import Query, wrong_query
from glamd.http.routes import Route, client, internal
from glamd.http.services import Tokens
from glamd.payments.model import EntryMode, PaymentToken, TokenStatus

MAX_PAGE_SIZE = 200
# A page number is an offset underneath; whoever wants to go deeper has the cursor.
MAX_PAGE = 10_000
MAX_CURSOR_CHARS = 512

_TOKEN = re.compile(r"ptk_[0-9A-Za-z]{16,64}")


class TokenQuery(Query):
    """The query of the list."""

    merchant_id: UUID | None = Field(
        default=None, description="Whose tokens; an internal service must say it."
    )
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE_SIZE)] = Field(
        default=50, description="How many tokens are on a page."
    )
    page: Annotated[int, Field(ge=1, le=MAX_PAGE)] | None = Field(
        default=None, description="Which page, counted from 1; not together with `cursor`."
    )
    cursor: Annotated[str, Field(min_length=1, max_length=MAX_CURSOR_CHARS)] | None = Field(
        default=None, description="The `next_cursor` of the page before."
    )


class TokenMetadata(TypedDict):
    """What is known of a payment token; never a card number."""

    token: str
    brand: str
    bin: str
    last4: str
    exp_month: int | None
    exp_year: int | None
    fingerprint: str
    entry_mode: EntryMode
    device_id: str
    status: TokenStatus
    has_sensitive_data: bool
    created_at: datetime
    expires_at: datetime


class RevokedToken(TypedDict):
    """A token that is worth nothing any more."""

    token: str
    status: Literal["revoked"]


_TAG: Final = "Payment tokens"
_EXAMPLE: Final = "ptk_9AV8E50SQGM3VQF3MMC59HQTMB"
_METADATA: Final = {
    "token": _EXAMPLE,
    "brand": "mastercard",
    "bin": "55555555",
    "last4": "4444",
    "exp_month": 12,
    "exp_year": 2049,
    "fingerprint": "24c9e921fedff3a3299ea0b731a407709c1d38ab2c02f6e4b7f3f1c6a1f0d2ce",
    "entry_mode": "magstripe",
    "device_id": "dev_9c31d3ccd4c5e502eed1",
    "status": "active",
    "has_sensitive_data": False,
    "created_at": "2026-11-21T12:28:47.818622Z",
    "expires_at": "2026-11-22T12:28:47.818622Z",
}
TOKEN_PARAM: Final = Param(description="The payment token.", example=_EXAMPLE)
TOKEN_NOT_FOUND: Final = Refusal(
    code="TOKEN_NOT_FOUND", status=404, when="There is no such token for this caller."
)
_LIST: Final = Operation(
    id="listPaymentTokens",
    tag=_TAG,
    summary="A merchant's payment tokens, newest first",
    query=TokenQuery,
    answer=list[TokenMetadata],
    example=[_METADATA],
    paginated=True,
    refusals=(
        Refusal(
            code="NOT_FOUND", status=404, when="A client named a merchant that is not its own."
        ),
    ),
)
_SHOW: Final = Operation(
    id="showPaymentToken",
    tag=_TAG,
    summary="What is known of a payment token",
    params={"token": TOKEN_PARAM},
    answer=TokenMetadata,
    example=_METADATA,
    refusals=(TOKEN_NOT_FOUND,),
)
_REVOKE: Final = Operation(
    id="revokePaymentToken",
    tag=_TAG,
    summary="Revoke a payment token for good",
    description="What is sealed under it is erased; the metadata stays. Asking again is the same.",
    params={"token": TOKEN_PARAM},
    answer=RevokedToken,
    example={"token": _EXAMPLE, "status": "revoked"},
    refusals=(TOKEN_NOT_FOUND,),
)


class PaymentTokenRoutes:
    """Handlers of the payment-token routes on the api listener."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        readers = (client(), internal("payment:read"))
        one = "/api/v1/payment-tokens/{token}"
        return (
            Route(
                method="GET",
                path="/api/v1/payment-tokens",
                handler=self._list,
                access=readers,
                operation=_LIST,
            ),
            Route(method="GET", path=one, handler=self._show, access=readers, operation=_SHOW),
            Route(
                method="DELETE",
                path=one,
                handler=self._revoke,
                access=(client(), internal("payment:revoke")),
                operation=_REVOKE,
            ),
        )

    async def _show(self, call: Call) -> Answer:
        token = token_of(call)
        return Answer(data=as_json(await self._tokens.show(token, merchant_id=_owner(call))))

    async def _revoke(self, call: Call) -> Answer:
        token = token_of(call)
        revoked = await self._tokens.revoke(
            token, merchant_id=_owner(call), correlation_id=call.correlation_id
        )
        data: RevokedToken = {"token": revoked.token, "status": "revoked"}
        return Answer(data=data)

    async def _list(self, call: Call) -> Answer:
        query = call.query(TokenQuery)
        merchant_id = _owner(call)
        if merchant_id is None:
            merchant_id = query.merchant_id
        elif query.merchant_id not in (None, merchant_id):
            raise NotFoundError("There is no such merchant.")
        if merchant_id is None:
            raise wrong_query("merchant_id", "This field is needed.")
        if query.page is not None and query.cursor is not None:
            raise wrong_query("cursor", "A page and a cursor do not go together.")
        page = None if query.cursor is not None else query.page or 1
        found = await self._tokens.page(
            merchant_id, limit=query.limit, page=page, cursor=query.cursor
        )
        return Answer(
            data=[as_json(token) for token in found.items],
            pagination=Pagination(
                page=page, limit=query.limit, total=found.total, next_cursor=found.next_cursor
            ),
        )


def is_token(text: str) -> bool:
    """Whether a token may look like this."""
    return _TOKEN.fullmatch(text) is not None


def token_of(call: Call) -> str:
    """The path's token; what cannot be one is not found without anybody having looked."""
    token = call.params["token"]
    if not is_token(token):
        raise NotFoundError("There is no such token.", code="TOKEN_NOT_FOUND")
    return token


def as_json(token: PaymentToken) -> TokenMetadata:
    """A token's metadata as the contract names it."""
    return {
        "token": token.token,
        "brand": token.brand,
        "bin": token.bin,
        "last4": token.last4,
        "exp_month": token.exp_month,
        "exp_year": token.exp_year,
        "fingerprint": token.fingerprint,
        "entry_mode": token.entry_mode,
        "device_id": token.device_id,
        "status": token.status,
        "has_sensitive_data": token.has_sensitive_data,
        "created_at": token.created_at,
        "expires_at": token.expires_at,
    }


def _owner(call: Call) -> UUID | None:
    """Whose tokens the caller may see; None is everybody's."""
    caller = call.caller
    return caller.merchant_id if isinstance(caller, Client) else None
