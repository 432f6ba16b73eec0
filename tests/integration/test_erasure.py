"""Erasing a merchant: nothing slips in behind the request, nothing is done twice or left half."""

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from glamd.db import Database
from glamd.erasure import Erased, Erasure
from glamd.errors import NotFoundError, UnavailableError
from glamd.payments import store
from glamd.payments.counter import CounterWindow
from glamd.payments.life import erasure
from glamd.payments.life import store as life_store
from glamd.payments.life.erasure import CardErasure
from glamd.payments.model import IssuedToken, SealedCard, Spend
from glamd.payments.tokens import Tokens
from glamd.payments.vault import Vault, new_token
from tests.support.database_proxy import DatabaseProxy
from tests.support.settable_clock import SettableClock
from tests.support.stored_tokens import put_merchant, put_token, token_life

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


class World:
    """An erasure of a real database of cards, beside platform tokens in a dictionary."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.clock = SettableClock(NOW)
        self.platform_tokens: dict[UUID, int] = {}
        self.rows: list[tuple[str, str, str, str]] = []
        self.audit_is_away = False
        self.glam_is_away = False
        self.erasure = Erasure(
            cards=CardErasure(database, clock=self.clock),
            forget_platform_tokens=self._forget,
            record=self._record,
        )

    async def erase(self, merchant_id: UUID) -> Erased:
        return await self.erasure.erase(merchant_id, actor="uid:0", correlation_id="c")

    async def _forget(self, merchant_id: UUID) -> int:
        if self.glam_is_away:
            raise UnavailableError("The database is not available.")
        return self.platform_tokens.pop(merchant_id, 0)

    async def _record(self, *, action: str, subject: str, actor: str, outcome: str) -> None:
        if self.audit_is_away:
            raise UnavailableError("The audit row cannot be written.")
        self.rows.append((action, subject, actor, outcome))

    async def merchant(self, *, devices: int, tokens: int) -> UUID:
        """A merchant whose devices have so many living tokens each, with an answer for each."""
        merchant_id = await put_merchant(self.database, devices=devices)
        self.platform_tokens[merchant_id] = 2
        for device_id in await self.devices(merchant_id):
            for _ in range(tokens):
                token = await put_token(
                    self.database, merchant_id, expires_at=NOW + DAY, device_id=device_id
                )
                await self.database.execute(
                    "INSERT INTO cde.token_idempotency_keys VALUES ($1, $2, '', '', $3)",
                    device_id,
                    token,
                    NOW + DAY,
                )
        return merchant_id

    async def devices(self, merchant_id: UUID) -> list[str]:
        rows = await self.database.fetch(
            "SELECT device_id FROM cde.devices WHERE merchant_id = $1", merchant_id
        )
        return [row[0] for row in rows]

    async def left(self, merchant_id: UUID) -> tuple[int, int, int]:
        """Tokens, secrets and answers of the merchant, and of nobody else where it is alone."""
        row = await self.database.fetchrow(
            "SELECT (SELECT count(*) FROM cde.payment_tokens WHERE merchant_id = $1),"
            " (SELECT count(*) FROM cde.token_secrets),"
            " (SELECT count(*) FROM cde.token_idempotency_keys)",
            merchant_id,
        )
        assert row is not None
        return tuple(row)

    async def told(self, subject: str) -> int:
        count: int = await self.database.fetchval(
            "SELECT count(*) FROM cde.outbox WHERE subject = $1", subject
        )
        return count


@pytest.fixture
def world(database: Database) -> World:
    return World(database)


async def test_an_unknown_merchant_is_not_found_and_that_is_written_down(world: World) -> None:
    nobody = uuid4()
    with pytest.raises(NotFoundError):
        await world.erase(nobody)
    assert world.rows == [("merchant.erase", str(nobody), "uid:0", "MERCHANT_NOT_FOUND")]


async def test_with_platform_tokens_out_of_reach_it_is_not_done_and_the_job_goes_on(
    world: World,
) -> None:
    merchant_id = await world.merchant(devices=1, tokens=3)
    world.glam_is_away = True
    with pytest.raises(UnavailableError):
        await world.erase(merchant_id)
    with pytest.raises(UnavailableError):
        await world.erasure.resume()
    assert await world.left(merchant_id) == (3, 3, 3)
    world.glam_is_away = False
    assert await world.erasure.resume() == 1
    assert await world.left(merchant_id) == (0, 0, 0)
    assert world.platform_tokens == {}
    assert await world.erasure.resume() == 0


async def test_without_its_audit_row_nobody_is_told_that_it_was_done(world: World) -> None:
    merchant_id = await world.merchant(devices=1, tokens=1)
    world.audit_is_away = True
    with pytest.raises(UnavailableError):
        await world.erase(merchant_id)
    world.audit_is_away = False
    assert (await world.erase(merchant_id)).done


async def test_a_crash_between_two_batches_is_gone_on_with_and_no_end_is_told_twice(
    world: World, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "ROWS", 4)
    merchant_id = await world.merchant(devices=2, tokens=10)
    async with DatabaseProxy(database_url) as proxy:
        through = await Database.connect(proxy.url, pool_size=1)
        try:
            cards = CardErasure(through, clock=world.clock)
            await cards.request(merchant_id, correlation_id="c")
            # A first batch, so that it is the second one's answer that gets lost.
            await life_store.erase_tokens(through, merchant_id, limit=4, correlation_id="c")
            proxy.lose_answer = 1
            with pytest.raises(UnavailableError):
                await cards.erase(merchant_id)
        finally:
            await through.close()
    tokens, secrets, _ = await world.left(merchant_id)
    assert tokens == secrets == 12
    assert await world.erasure.resume() == 1
    assert await world.left(merchant_id) == (0, 0, 0)
    assert await world.told("evt.payment.token.revoked.v1") == 20


async def test_four_nodes_erase_together_and_tell_of_each_token_and_device_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "ROWS", 5)
    merchant_id = await world.merchant(devices=3, tokens=12)
    done = await asyncio.gather(*(world.erase(merchant_id) for _ in range(4)))
    await world.erasure.resume()
    assert sum(one.payment_tokens for one in done) <= 36
    assert await world.left(merchant_id) == (0, 0, 0)
    assert await store.total(world.database, merchant_id) == 0
    assert await world.told("evt.payment.token.revoked.v1") == 36
    assert await world.told("evt.device.revoked.v1") == 3
    assert [row[0] for row in world.rows].count("merchant.erased") == 1


async def test_another_merchants_things_stay_and_so_do_settings_devices_and_counters(
    world: World,
) -> None:
    erased = await world.merchant(devices=2, tokens=2)
    other = await world.merchant(devices=1, tokens=3)
    found = await world.erase(erased)
    assert found == Erased(
        merchant_id=erased, payment_tokens=4, stored_answers=4, platform_tokens=2, done=True
    )
    assert await world.left(other) == (3, 3, 3)
    assert await store.total(world.database, other) == 3
    assert set(world.platform_tokens) == {other}
    rows = await world.database.fetch(
        "SELECT merchant_id, erased_at, (SELECT count(*) FROM cde.devices d"
        " WHERE d.merchant_id = m.merchant_id AND status = 'revoked'),"
        " (SELECT count(*) FROM cde.device_counters c WHERE c.merchant_id = m.merchant_id)"
        " FROM cde.merchants m"
    )
    assert {tuple(row) for row in rows} == {(erased, NOW, 2, 2), (other, None, 0, 1)}
    assert (await world.erase(erased)).payment_tokens == 0, "repeatable"


async def test_tokens_that_had_ended_before_are_deleted_without_another_event(
    world: World,
) -> None:
    merchant_id = await put_merchant(world.database, devices=1)
    await put_token(world.database, merchant_id, expires_at=NOW - DAY)
    revoked = await put_token(world.database, merchant_id, expires_at=NOW + DAY)
    tokens = Tokens(world.database, clock=world.clock)
    assert await tokens.announce_expired() == 1
    await tokens.revoke(revoked, merchant_id=None, correlation_id="c")
    assert (await world.erase(merchant_id)).payment_tokens == 2
    assert await world.told("evt.payment.token.revoked.v1") == 1


async def test_what_was_sealed_is_shredded_like_that_of_any_token(world: World) -> None:
    merchant_id = await world.merchant(devices=1, tokens=2)
    await world.erase(merchant_id)
    [dirty] = await life_store.dirty(world.database)
    assert dirty.partition == "token_secrets_other"
    life = token_life(world.database, world.clock)
    assert (await life.purge_now()).rewritten == ("token_secrets_other",)


async def test_no_commit_slips_in_behind_the_request(world: World) -> None:
    """A sceptic's: devices tokenize as fast as they can while their merchant is erased."""
    merchant_id = await world.merchant(devices=8, tokens=0)
    await world.database.execute(
        "INSERT INTO cde.encryption_keys (keyring, version, wrapped_key, provider, kcv, status)"
        " VALUES ('payment-tokens', 'v1', '\\x01', 'local', '000000', 'active')"
    )
    rows = await world.database.fetch("SELECT device_id, counter_id FROM cde.devices")
    vault = Vault(world.database, connections=2, batch_limit=16)
    await vault.journal.start()
    begun = asyncio.Event()

    async def tap(device_id: str, counter_id: int) -> int:
        for number in range(1, 500):
            if not await vault.journal.submit(spend(device_id, counter_id, number)):
                return number - 1
            if number == 3:
                begun.set()
        raise AssertionError("it was never stopped")

    async def erase() -> Erased:
        await begun.wait()
        return await world.erase(merchant_id)

    try:
        erased, *taps = await asyncio.gather(erase(), *(tap(row[0], row[1]) for row in rows))
    finally:
        await vault.journal.stop(5.0)
    assert isinstance(erased, Erased)
    assert erased.payment_tokens == sum(n for n in taps if isinstance(n, int)) > 0
    assert erased.done
    assert await world.left(merchant_id) == (0, 0, 0)
    assert await store.total(world.database, merchant_id) == 0


def spend(device_id: str, counter_id: int, number: int) -> Spend:
    """The `number`th tap of a device."""
    card = SealedCard(
        brand="visa",
        bin="41111111",
        last4="1111",
        exp_month=12,
        exp_year=2030,
        fingerprint=bytes(32),
        ciphertext=b"sealed",
        sensitive_ciphertext=None,
        key_version="v1",
    )
    return Spend(
        counter_id=counter_id,
        counter_version=number - 1,
        window=CounterWindow(1024).spend(number),
        device_id=device_id,
        request_id=f"r{number}",
        content_hash=bytes(32),
        answer=b"{}",
        at=NOW,
        issued=IssuedToken(token=new_token(), entry_mode="chip", expires_at=NOW + DAY, card=card),
    )
