"""Trials on a real database: one a merchant, whoever asks and however often, and one end each."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from glamd.billing.model import (
    BillingSettings,
    MerchantNotFoundError,
    TrialAlreadyUsedError,
    TrialStarted,
)
from glamd.db import Connection
from glamd.errors import ConflictError, UnavailableError
from glamd.ledger.model import AccountNotFoundError, Command
from tests.support.billing_world import Node, World
from tests.support.database_proxy import DatabaseProxy
from tests.support.postgres import eventually

DAY_S = 86_400.0
EVENTS = ("credits.granted", "billing.trial.started", "billing.trial.expired")


@pytest.fixture
async def world(module_database_url: str) -> AsyncIterator[World]:
    """Shopify and an empty database."""
    async with World.make(module_database_url) as made:
        yield made


async def start(node: Node, merchant_id: UUID) -> TrialStarted:
    """Begin the merchant's trial."""
    return await node.billing.start_trial(merchant_id, correlation_id="c-1")


async def counts(world: World) -> tuple[int, ...]:
    """How many events there are of a trial's subjects."""
    return tuple([len(await world.events(subject)) for subject in EVENTS])


async def test_a_trial_that_was_used_is_not_had_again(world: World) -> None:
    merchant_id = await world.merchant()
    async with world.node() as node:
        await start(node, merchant_id)
        for _ in range(2):
            with pytest.raises(TrialAlreadyUsedError):
                await start(node, merchant_id)
            world.clock.advance(30 * DAY_S)
    assert await world.balance(merchant_id) == 500
    assert await counts(world) == (1, 1, 0)


async def test_two_nodes_that_start_one_trial_at_once_start_it_once(world: World) -> None:
    merchants = [await world.merchant() for _ in range(5)]
    async with world.node() as one, world.node() as other:
        for merchant_id in merchants:
            results = await asyncio.gather(
                *(start(node, merchant_id) for node in (one, other, one, other)),
                return_exceptions=True,
            )
            kinds = sorted(type(result).__name__ for result in results)
            assert kinds == ["TrialAlreadyUsedError"] * 3 + ["TrialStarted"]
            assert await world.balance(merchant_id) == 500
    assert await counts(world) == (5, 5, 0)


async def test_a_trial_of_another_billing_service_is_the_merchants_trial(world: World) -> None:
    for amount in (500, 250):
        merchant_id = await world.merchant()
        async with world.node() as node:
            command = Command(
                merchant_id=merchant_id,
                operation="credit",
                amount=amount,
                reference_type="trial",
                reference_id=f"TRIAL_GRANT_{merchant_id}",
                correlation_id="elsewhere",
            )
            async with node.database.transaction() as connection:
                await node.ledger.apply_within(connection, command, world.clock.now())
            with pytest.raises(TrialAlreadyUsedError):
                await start(node, merchant_id)
        assert await world.balance(merchant_id) == amount
    assert await world.events("billing.trial.started") == []


async def test_nobody_knows_a_merchant_without_a_record(world: World) -> None:
    async with world.node() as node:
        for call in (node.billing.overview, node.billing.trial):
            with pytest.raises(MerchantNotFoundError):
                await call(uuid4())
        with pytest.raises(MerchantNotFoundError):
            await start(node, uuid4())


async def test_without_an_account_there_is_no_trial_either(world: World) -> None:
    merchant_id = uuid4()
    async with world.node() as node:
        async with node.database.transaction() as connection:
            assert await node.billing.merchant_created(connection, merchant_id)
            assert not await node.billing.merchant_created(connection, merchant_id)
        with pytest.raises(AccountNotFoundError):
            await start(node, merchant_id)
        assert (await node.billing.trial(merchant_id)).available


async def test_an_answer_that_cannot_be_kept_undoes_the_trial(world: World) -> None:
    merchant_id = await world.merchant()

    async def keep(_: Connection, result: TrialStarted) -> None:
        assert result.credits_granted == 500
        raise ConflictError("Taken over.")

    async with world.node() as node:
        with pytest.raises(ConflictError, match="Taken over"):
            await node.billing.start_trial(merchant_id, correlation_id="c", keep=keep)
        assert (await node.billing.trial(merchant_id)).available
    assert await world.balance(merchant_id) == 0
    assert await counts(world) == (0, 0, 0)


async def test_a_trial_is_there_whole_or_not_at_all_wherever_the_connection_breaks(
    world: World,
) -> None:
    broken = 0
    async with DatabaseProxy(world.url) as proxy, world.node(url=proxy.url) as node:
        while True:
            merchant_id = await world.merchant()
            before = await counts(world)
            proxy.lose_answer = broken + 1
            try:
                await start(node, merchant_id)
                break
            except UnavailableError:
                broken += 1
            after = await counts(world)
            is_there = await world.balance(merchant_id) == 500
            assert (after[0] - before[0], after[1] - before[1]) == (is_there, is_there)
            assert (await node.billing.trial(merchant_id)).active == is_there
        proxy.lose_answer = 0
    assert broken > 5


async def test_a_trial_shows_as_it_is(world: World) -> None:
    merchant_id = await world.merchant()
    now = world.clock.now()
    async with world.node(settings=BillingSettings(trial_days=3, trial_credits=70)) as node:
        started = await start(node, merchant_id)
        assert started == TrialStarted(ends_at=now + timedelta(days=3), credits_granted=70)
        trial = await node.billing.trial(merchant_id)
        assert (trial.available, trial.active) == (False, True)
        assert (trial.started_at, trial.ends_at) == (now, now + timedelta(days=3))
        world.clock.advance(3 * DAY_S)
        overview = await node.billing.overview(merchant_id)
        assert not overview.trial.active
        assert (overview.credits_purchased, overview.recent_purchases) == (0, ())
    assert await world.balance(merchant_id) == 70
    assert await world.events("billing.trial.started") == [
        {
            "merchant_id": str(merchant_id),
            "ends_at": (now + timedelta(days=3)).isoformat(),
            "credits": 70,
        }
    ]


async def test_jobs_of_two_nodes_end_each_trial_once(world: World) -> None:
    merchants = [await world.merchant() for _ in range(30)]
    ends_at = world.clock.now() + timedelta(days=14)
    async with world.node() as one, world.node() as other:
        for merchant_id in merchants:
            await start(one, merchant_id)
        assert (await one.jobs.expire_now()).trials == 0
        world.clock.set(ends_at)
        async with one.working(), other.working():

            async def all_ended() -> bool:
                return len(await world.events("billing.trial.expired")) >= len(merchants)

            await eventually(all_ended)
        found = await asyncio.gather(one.jobs.expire_now(), other.jobs.expire_now())
        assert [each.trials for each in found] == [0, 0]
    told = await world.events("billing.trial.expired")
    assert sorted(each["merchant_id"] for each in told) == sorted(map(str, merchants))
    assert {each["expired_at"] for each in told} == {ends_at.isoformat()}


async def test_more_trials_than_a_batch_end_at_once_when_an_operator_says_so(world: World) -> None:
    await world.database.execute(
        "INSERT INTO glam.billing_records (merchant_id, trial_started_at, trial_ends_at,"
        " created_at) SELECT gen_random_uuid(), $1, $1, $1 FROM generate_series(1, 250)",
        world.clock.now(),
    )
    async with world.node() as one, world.node() as other:
        found = await asyncio.gather(one.jobs.expire_now(), other.jobs.expire_now())
    assert sum(each.trials for each in found) == 250
    assert len(await world.events("billing.trial.expired")) == 250
