"""`/api/v1/tokens`: the credentials of merchants' shop platforms, stored, read and deleted.

The one place of the api listener where such a secret comes in and goes out in the clear; nothing
here logs a body or an answer. How a token is kept, and that each access has its row, is the
credentials room's; a request that is refused before it gets there has its row from `refused`.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Final
from uuid import UUID

from glamd.clock import Clock
from glamd.credentials.model import (
    DEFAULT_READERS,
    PLATFORMS,
    Accessor,
    Action,
    OpenToken,
    Platform,
)
from glamd.errors import (
    FieldError,
    ForbiddenError,
    GlamError,
    InputError,
    NotFoundError,
    UnauthenticatedError,
)
from glamd.http.call import Answer, Call
from glamd.http.idempotent import Once
from glamd.http.identity import Client
from glamd.http.operation import Operation, Param, Refusal
from glamd.http.platform_token_models import (
    PlatformToken,
    PlatformTokenList,
    ReadQuery,
    StoreBody,
    TokenDeleted,
    TokenStored,
)
from glamd.http.routes import Route, client, internal
from glamd.http.services import PlatformVault
from glamd.idempotency import Keep
from glamd.ids import as_uuid

DOMAIN_MISMATCH: Final = "DOMAIN_MISMATCH"

STORE_PATH: Final = "/api/v1/tokens"
READ_PATH: Final = "/api/v1/tokens/{merchant_id}"
DELETE_PATH: Final = "/api/v1/tokens/{merchant_id}/{platform}"

_ACTIONS: Final[dict[str, Action]] = {READ_PATH: "read", DELETE_PATH: "delete"}
"""What a refused request wanted, on the paths that say to whose tokens."""


class PlatformTokenRoutes:
    """Handlers of the platform-token routes on the api listener."""

    def __init__(
        self,
        vault: PlatformVault,
        *,
        once: Once,
        clock: Clock,
        readers: Iterable[str] = DEFAULT_READERS,
    ) -> None:
        """`readers` are the internal services that may read."""
        self._vault = vault
        self._once = once
        self._clock = clock
        self._readers = frozenset(readers)

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        return (
            Route(
                method="POST",
                path=STORE_PATH,
                handler=self._store,
                access=(client(),),
                operation=_STORE,
            ),
            Route(
                method="GET",
                path=READ_PATH,
                handler=self._read,
                access=(internal(services=self._readers),),
                operation=_READ,
            ),
            Route(
                method="DELETE",
                path=DELETE_PATH,
                handler=self._delete,
                access=(client(),),
                operation=_DELETE,
            ),
        )

    async def refused(self, call: Call, error: GlamError) -> None:
        """Log an attempt on a merchant's tokens that never came to its handler.

        Only what is refused for who asks has a row, under the merchant that the path names, and how
        often is the vault's to say: a flood must not write one for each request. UnavailableError.
        """
        action = _ACTIONS.get(call.route)
        if action is None or not isinstance(error, ForbiddenError | NotFoundError):
            return
        try:
            merchant_id = _merchant_of(call)
        except NotFoundError:
            return
        wanted = call.params.get("platform", call.request.query.get("platform"))
        await self._vault.refused(
            merchant_id,
            action=action,
            code=error.code,
            accessor=_accessor(call),
            platform=next((known for known in PLATFORMS if known == wanted), None),
        )

    async def _store(self, call: Call) -> Answer:
        body = await call.json(StoreBody)
        new = body.new_token()
        caller = call.caller
        assert isinstance(caller, Client)
        shop = caller.shop or ""
        # In lower case what is not ASCII may become another's domain (the Kelvin sign is a k then).
        shop = shop.lower() if shop.isascii() else ""
        if new.merchant_id != caller.merchant_id or new.domain != shop:
            await self._vault.refused(
                caller.merchant_id,
                action="store",
                code=DOMAIN_MISMATCH,
                accessor=_accessor(call),
                platform=new.platform,
            )
            raise UnauthenticatedError(
                "The merchant and the domain must be those of the token that came with the call.",
                code=DOMAIN_MISMATCH,
            )

        async def work(keep: Keep[UUID] | None) -> UUID:
            return await self._vault.store(new, accessor=_accessor(call), keep=keep)

        return await self._once(call, body=body, work=work, answer=_stored)

    async def _read(self, call: Call) -> Answer:
        merchant_id = _merchant_of(call)
        query = call.query(ReadQuery)
        reading = await self._vault.read(
            merchant_id, platform=query.platform, accessor=_accessor(call)
        )
        now = self._clock.now()
        data = PlatformTokenList(
            tokens=[as_json(token, now) for token in reading.tokens],
            undecryptable=list(reading.undecryptable),
        )
        return Answer(data=data)

    async def _delete(self, call: Call) -> Answer:
        merchant_id = _merchant_of(call)
        await self._vault.delete(merchant_id, _platform_of(call), accessor=_accessor(call))
        return Answer(data=TokenDeleted(status="deleted"))


def as_json(token: OpenToken, now: datetime) -> PlatformToken:
    """A token as the contract names it."""
    connection = token.connection
    return PlatformToken(
        platform_name=connection.platform,
        platform_shop_id=connection.platform_shop_id,
        domain=connection.domain,
        token_data=dict(token.secret.data),
        token_type=connection.token_type,
        expires_at=connection.expires_at,
        is_expired=connection.is_expired(now),
        scopes=list(connection.scopes),
        health=connection.health(now),
    )


def _stored(token_id: UUID) -> Answer:
    return Answer(status=201, data=TokenStored(token_id=token_id, status="stored"))


def _accessor(call: Call) -> Accessor:
    return Accessor(
        kind=call.identity.kind,
        name=call.identity.name,
        ip=call.ip,
        request_id=call.request_id,
        correlation_id=call.correlation_id,
    )


def _merchant_of(call: Call) -> UUID:
    """The path's merchant; what can be none is not there."""
    merchant_id = as_uuid(call.params["merchant_id"])
    if merchant_id is None:
        raise NotFoundError("There is no such merchant.")
    return merchant_id


def _platform_of(call: Call) -> Platform:
    """The path's platform; any other name is a mistake in the request, and named as one."""
    for platform in PLATFORMS:
        if call.params["platform"] == platform:
            return platform
    raise InputError(
        "The path is not as it should be.",
        fields=[FieldError("platform", f"It should be one of {', '.join(PLATFORMS)}.")],
    )


_MERCHANT = Param(
    description="The merchant's id.", example="6f1d0a52-5b0e-4a54-9f0a-0d7c0a1f2b3c", format="uuid"
)
_TAG: Final = "Platform tokens"

_STORE: Final = Operation(
    id="storePlatformToken",
    tag=_TAG,
    summary="Store a platform token",
    description="There is one token for each merchant and platform: storing again replaces it and "
    "keeps its id. `token_data` is sealed before it is stored.",
    body=StoreBody,
    body_example={
        "merchant_id": _MERCHANT.example,
        "platform_name": "shopify",
        "platform_shop_id": "67890",
        "domain": "shop.example.com",
        "token_data": {"access_token": "an access token", "refresh_token": "a refresh token"},
        "token_type": "oauth",
        "expires_at": "2030-01-31T12:00:00Z",
        "scopes": ["read_products", "write_orders"],
    },
    answer=TokenStored,
    example={"token_id": "019b1f6e-7d1c-7a52-9c0f-3a5d1e8b2f40", "status": "stored"},
    status=201,
    refusals=(
        Refusal(
            code=DOMAIN_MISMATCH,
            status=401,
            when="`domain` is not the shop of the caller's token, or `merchant_id` not its "
            "merchant.",
        ),
    ),
    idempotent=True,
)

_READ: Final = Operation(
    id="readPlatformTokens",
    tag=_TAG,
    summary="Read a merchant's platform tokens",
    description="With what opens the shop, in the clear; every token that is read has a row in the "
    "access log before it is answered. One that is about to expire and can be renewed is renewed "
    "first. A merchant without tokens has an empty list.",
    params={"merchant_id": _MERCHANT},
    query=ReadQuery,
    answer=PlatformTokenList,
    example={
        "tokens": [
            {
                "platform_name": "shopify",
                "platform_shop_id": "67890",
                "domain": "shop.example.com",
                "token_data": {
                    "access_token": "an access token",
                    "refresh_token": "a refresh token",
                },
                "token_type": "oauth",
                "expires_at": "2030-01-31T12:00:00Z",
                "is_expired": False,
                "scopes": ["read_products", "write_orders"],
                "health": "valid",
            }
        ],
        "undecryptable": [],
    },
)

_DELETE: Final = Operation(
    id="deletePlatformToken",
    tag=_TAG,
    summary="Delete a platform token",
    description="Repeatable: the answer is the same where there was none.",
    params={
        "merchant_id": _MERCHANT,
        "platform": Param(
            description="The platform's name.", example="shopify", choices=tuple(PLATFORMS)
        ),
    },
    answer=TokenDeleted,
    example={"status": "deleted"},
    refusals=(
        Refusal(code="VALIDATION_ERROR", status=422, when="The platform is not one of the six."),
    ),
)
