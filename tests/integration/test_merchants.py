"""Merchants in both schemas: what is refused, what is the same again, what a crash leaves."""

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

import asyncpg
import pytest

from glamd.db import Database
from glamd.errors import ConflictError, GlamError, InputError, NotFoundError, UnavailableError
from glamd.merchants.service import Merchants
from glamd.merchants.store import Merchant
from tests.support.database_proxy import DatabaseProxy
from tests.support.settable_clock import SettableClock

ID = UUID("018f3b1c-0000-7000-8000-000000000001")
OTHER_ID = UUID("018f3b1c-0000-7000-8000-000000000002")


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests here, emptied before each: much cheaper than one each."""
    connection = await asyncpg.connect(module_database_url)
    await connection.execute("DELETE FROM glam.merchants; DELETE FROM cde.merchants")
    await connection.close()
    return module_database_url


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock()


@pytest.fixture
def merchants(database: Database, clock: SettableClock) -> Merchants:
    return Merchants(glam=database, cde=database, clock=clock)


async def create(
    merchants: Merchants,
    *,
    platform: str = "shopify",
    shop_id: str = "1001",
    domain: str = "shop.example.com",
    merchant_id: UUID | None = None,
) -> Merchant:
    return await merchants.create(
        platform=platform, shop_id=shop_id, domain=domain, merchant_id=merchant_id
    )


def fields(error: GlamError) -> set[str]:
    return {one.field for one in error.fields}


@pytest.mark.parametrize(
    "domain",
    [
        "",
        "localhost",
        ".example.com",
        "example.com.",
        "exa mple.com",
        "-a.example.com",
        "a-.example.com",
        "a..example.com",
        "a_b.example.com",
        "shop.example.com\n",
        "shop.example.com:443",
        "https://shop.example.com",
        "bücher.example.com",
        "shop.example.\N{KELVIN SIGN}",
        "a" * 64 + ".example.com",
        ".".join(["a" * 60] * 5),
    ],
)
async def test_what_is_no_host_name_is_refused_and_found_nowhere(domain: str) -> None:
    unconnected = Database.__new__(Database)
    merchants = Merchants(glam=unconnected, cde=unconnected, clock=SettableClock())
    with pytest.raises(InputError) as raised:
        await create(merchants, domain=domain)
    assert fields(raised.value) == {"domain"}
    with pytest.raises(NotFoundError):
        await merchants.by_domain(domain)


async def test_every_wrong_field_is_named_at_once(merchants: Merchants) -> None:
    with pytest.raises(InputError) as raised:
        await create(merchants, platform="Shopify", shop_id="a\0", domain="x")
    assert fields(raised.value) == {"platform", "shop_id", "domain"}
    for shop_id in ("", "x" * 256, "\ud800"):
        with pytest.raises(InputError):
            await create(merchants, shop_id=shop_id)


async def test_another_merchants_domain_shop_or_id_is_a_conflict_by_field(
    merchants: Merchants,
) -> None:
    await create(merchants, merchant_id=ID)
    for changed, named in (
        ({"shop_id": "2"}, {"domain"}),
        ({"domain": "b.example.com"}, {"shop_id"}),
        ({}, {"shop_id", "domain"}),
    ):
        with pytest.raises(ConflictError) as raised:
            await create(merchants, merchant_id=OTHER_ID, **changed)
        assert raised.value.code == "MERCHANT_EXISTS"
        assert fields(raised.value) == named
    with pytest.raises(ConflictError) as raised:
        await create(merchants, merchant_id=ID, platform="magento", domain="b.example.com")
    assert fields(raised.value) == {"platform", "domain"}


async def test_a_conflict_leaves_nothing_behind(database: Database, merchants: Merchants) -> None:
    await create(merchants, merchant_id=ID)
    with pytest.raises(ConflictError):
        await create(merchants, merchant_id=OTHER_ID, shop_id="2")
    with pytest.raises(ConflictError):
        await create(merchants, domain="b.example.com")
    for table in ("glam.merchants", "cde.merchants"):
        assert await database.fetchval(f"SELECT array_agg(merchant_id) FROM {table}") == [ID]


async def test_the_same_merchant_again_is_the_same_merchant(
    merchants: Merchants, clock: SettableClock
) -> None:
    made = await create(merchants, merchant_id=ID)
    clock.advance(60)
    assert await create(merchants, merchant_id=ID, domain="SHOP.Example.com") == made
    assert await create(merchants) == made


async def test_the_same_merchant_made_ten_times_at_once_is_one(merchants: Merchants) -> None:
    made = await asyncio.gather(*(create(merchants) for _ in range(10)))
    assert len({merchant.merchant_id for merchant in made}) == 1
    assert len(await merchants.list()) == 1


async def test_the_same_shop_id_on_another_platform_is_another_merchant(
    merchants: Merchants,
) -> None:
    await create(merchants)
    await create(merchants, platform="custom", domain="b.example.com")
    assert len(await merchants.list()) == 2


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[DatabaseProxy]:
    async with DatabaseProxy(database_url) as proxy:
        yield proxy


@pytest.fixture
async def cde(proxy: DatabaseProxy) -> AsyncIterator[Database]:
    """What stands for the server of card data, by way of the proxy."""
    connected = await Database.connect(proxy.url, pool_size=1)
    yield connected
    await connected.close()


async def test_what_a_crash_between_the_two_servers_left_is_mended_by_repeating(
    database: Database, cde: Database, proxy: DatabaseProxy, clock: SettableClock
) -> None:
    merchants = Merchants(glam=database, cde=cde, clock=clock)
    proxy.go_down()
    with pytest.raises(UnavailableError):
        await create(merchants)
    assert await database.fetchval("SELECT count(*) FROM glam.merchants") == 1
    assert await database.fetchval("SELECT count(*) FROM cde.merchants") == 0
    proxy.is_down = False
    mended = await create(merchants)
    assert await database.fetchval("SELECT merchant_id FROM cde.merchants") == mended.merchant_id


async def test_a_merchant_is_found_by_id_and_by_domain_in_any_case(merchants: Merchants) -> None:
    made = await create(merchants, domain="Shop.Example.COM")
    assert made.domain == "shop.example.com"
    assert await merchants.show(made.merchant_id) == made
    assert await merchants.by_domain("SHOP.example.com") == made
    with pytest.raises(NotFoundError) as raised:
        await merchants.show(ID)
    assert raised.value.code == "MERCHANT_NOT_FOUND"


async def test_merchants_are_listed_page_by_page_in_the_order_they_were_made(
    merchants: Merchants, clock: SettableClock
) -> None:
    made = []
    for number in range(5):
        clock.advance(1)
        domain = f"s{number}.example.com"
        made.append(await create(merchants, shop_id=str(number), domain=domain))
    first = await merchants.list(limit=2)
    second = await merchants.list(limit=2, after=first[-1].merchant_id)
    last = await merchants.list(limit=2, after=second[-1].merchant_id)
    assert [*first, *second, *last] == made
    assert await merchants.list(after=last[-1].merchant_id) == ()
    for limit in (0, 201):
        with pytest.raises(InputError):
            await merchants.list(limit=limit)


# ---- settings


async def test_settings_out_of_bounds_or_none_at_all_are_refused_by_field(
    merchants: Merchants,
) -> None:
    made = await create(merchants)
    for ttl_s in (0, -1, 59, 8_760 * 3_600 + 1, 2**70):
        with pytest.raises(InputError) as caught:
            await merchants.configure(made.merchant_id, token_ttl_s=ttl_s)
        assert fields(caught.value) == {"token_ttl_s"}
    with pytest.raises(InputError):
        await merchants.configure(made.merchant_id)
    with pytest.raises(NotFoundError):
        await merchants.configure(OTHER_ID, token_ttl_s=3600)
    with pytest.raises(NotFoundError):
        await merchants.settings(OTHER_ID)
    assert (await merchants.settings(made.merchant_id)).token_ttl_s is None


async def test_a_setting_is_changed_alone_and_a_merchant_that_is_erased_has_none(
    database: Database, merchants: Merchants
) -> None:
    merchant_id = (await create(merchants)).merchant_id
    changed = await merchants.configure(merchant_id, token_ttl_s=3600)
    assert (changed.token_ttl_s, changed.sensitive_data) == (3600, "drop")
    changed = await merchants.configure(merchant_id, sensitive_data="until-authorized")
    assert (changed.token_ttl_s, changed.sensitive_data) == (3600, "until-authorized")
    changed = await merchants.configure(merchant_id, token_ttl_s="default")
    assert (changed.token_ttl_s, changed.sensitive_data) == (None, "until-authorized")
    assert await merchants.settings(merchant_id) == changed
    await database.execute("UPDATE cde.merchants SET erase_requested_at = now()")
    with pytest.raises(ConflictError) as caught:
        await merchants.configure(merchant_id, token_ttl_s=60)
    assert caught.value.code == "MERCHANT_ERASED"
