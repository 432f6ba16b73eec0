"""`/api/v1/payment-tokens`: metadata of payment tokens for merchants and internal services.

No card data passes here; opening a token is `worker`'s. Rules of tokens are the payment part's.
"""

import re
from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from glamd.errors import FieldError, InputError, NotFoundError
from glamd.http.call import Answer, Call, Pagination
from glamd.http.identity import Client
from glamd.http.routes import Route, client, internal
from glamd.http.services import Tokens
from glamd.payments.model import PaymentToken

MAX_PAGE_SIZE = 200
# A page number is an offset underneath; whoever wants to go deeper has the cursor.
MAX_PAGE = 10_000
MAX_CURSOR_CHARS = 512

_TOKEN = re.compile(r"ptk_[0-9A-Za-z]{16,64}")


class TokenQuery(BaseModel):
    """The query of the list; what it does not know it ignores, as queries collect extras."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    merchant_id: UUID | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE_SIZE)] = 50
    page: Annotated[int, Field(ge=1, le=MAX_PAGE)] | None = None
    cursor: Annotated[str, Field(min_length=1, max_length=MAX_CURSOR_CHARS)] | None = None


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
            ),
            Route(method="GET", path=one, handler=self._show, access=readers),
            Route(
                method="DELETE",
                path=one,
                handler=self._revoke,
                access=(client(), internal("payment:revoke")),
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
        return Answer(data={"token": revoked.token, "status": revoked.status})

    async def _list(self, call: Call) -> Answer:
        query = _query(call)
        merchant_id = _owner(call)
        if merchant_id is None:
            merchant_id = query.merchant_id
        elif query.merchant_id not in (None, merchant_id):
            raise NotFoundError("There is no such merchant.")
        if merchant_id is None:
            raise _wrong("merchant_id", "This field is needed.")
        if query.page is not None and query.cursor is not None:
            raise _wrong("cursor", "A page and a cursor do not go together.")
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


def as_json(token: PaymentToken) -> dict[str, object]:
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


def _query(call: Call) -> TokenQuery:
    given = call.request.query
    repeated = [name for name in TokenQuery.model_fields if len(given.getall(name, [])) > 1]
    if repeated:
        raise _wrong(repeated[0], "This field stands twice.")
    try:
        return TokenQuery.model_validate(dict(given))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise InputError(
            "The query is not as it should be.",
            fields=[FieldError(str(e["loc"][0]), e["msg"]) for e in found],
        ) from None


def _wrong(field: str, message: str) -> InputError:
    return InputError("The query is not as it should be.", fields=[FieldError(field, message)])
