"""Whose domain a platform token may be stored for, whoever recognised the caller."""

from typing import cast
from uuid import UUID

import pytest

from glamd.clock import Clock
from glamd.errors import UnauthenticatedError
from glamd.http.call import Answer, Call
from glamd.http.idempotent import Once
from glamd.http.identity import Client
from glamd.http.platform_token_models import StoreBody
from glamd.http.platform_tokens import STORE_PATH, PlatformTokenRoutes
from glamd.http.services import PlatformVault
from tests.support.http_fakes import MERCHANT, ManualClock


class Vault:
    """Remembers what was refused."""

    def __init__(self) -> None:
        self.refusals: list[tuple[UUID, object]] = []

    async def refused(self, merchant_id: UUID, **row: object) -> None:
        """Keep it."""
        self.refusals.append((merchant_id, row["code"]))


class Asked:
    """As much of a call as the handler looks at before it stores."""

    ip = request_id = correlation_id = "-"

    def __init__(self, shop: str) -> None:
        self.caller = self.identity = Client(merchant_id=MERCHANT, shop=shop, scopes=frozenset())

    async def json(self, model: type[StoreBody]) -> StoreBody:
        """A token for a domain with a k in it."""
        return model.model_validate_json(
            f'{{"merchant_id": "{MERCHANT}", "platform_name": "custom", "platform_shop_id": "1",'
            ' "domain": "kshop.example", "token_data": {"a": "b"}, "token_type": "bearer"}'
        )


async def stored(_call: Call, **_how: object) -> Answer:
    """What would be answered."""
    return Answer(data="stored")


async def store(vault: Vault, shop: str) -> Answer:
    """Ask to store it, as this shop."""
    routes = PlatformTokenRoutes(
        cast("PlatformVault", vault), once=cast("Once", stored), clock=cast("Clock", ManualClock())
    )
    (route,) = (route for route in routes.routes() if route.path == STORE_PATH)
    answer = await route.handler(cast("Call", Asked(shop)))
    assert isinstance(answer, Answer)
    return answer


@pytest.mark.parametrize("shop", ["\u212ashop.example", "kshop.ex\u0391mple", ""])
async def test_what_only_lower_case_makes_the_domain_is_another_one(shop: str) -> None:
    vault = Vault()
    with pytest.raises(UnauthenticatedError) as caught:
        await store(vault, shop)
    assert caught.value.code == "DOMAIN_MISMATCH"
    assert vault.refusals == [(MERCHANT, "DOMAIN_MISMATCH")]


async def test_the_same_domain_in_another_case_is_the_same() -> None:
    vault = Vault()
    assert (await store(vault, "KShop.Example")).data == "stored"
    assert vault.refusals == []
