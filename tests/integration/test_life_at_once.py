"""Everything that touches tokens at once, on two nodes; then the books are judged.

Commits, looks, revocations, authorizations, ends, purges, shredding, rotations with their
re-encryption, settings, an erasure: nothing but what may be tried again is raised, no living token
is without what was sealed, no dead one has any of it, and each event is there once.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest

from glamd.clock import SystemClock
from glamd.db import Database
from glamd.errors import NotFoundError, TransientError
from glamd.keys.keyrings import PAYMENT_TOKENS, DataKey
from glamd.merchants import store as merchants
from glamd.payments import store
from glamd.payments.cipher import associated_data, sensitive_associated_data
from glamd.payments.counter import CounterWindow
from glamd.payments.life import erasure
from glamd.payments.life.erasure import CardErasure
from glamd.payments.life.service import TokenLife
from glamd.payments.model import IssuedToken, SealedCard, Spend
from glamd.payments.tokens import Tokens
from glamd.payments.vault import Vault, new_token
from tests.support.keys import local_provider
from tests.support.sealed_rows import Node, start_node
from tests.support.stored_tokens import put_merchant

MORE: Final = 300
"""Tokens made between two of the things that happen once."""

SETTLE_S: Final = 10.0
ALL_S: Final = 40.0
PAUSE_S: Final = 0.02
DAY: Final = timedelta(days=1)
CLOCK: Final = SystemClock()
LIVES: Final = (timedelta(seconds=0.2), DAY, 60 * DAY)
"""Ends soon, in a day that has its partition, in none."""

JUDGED: Final = """
SELECT (SELECT count(*) FROM cde.payment_tokens t
        WHERE status = 'active' AND expired_at IS NULL AND NOT EXISTS (
            SELECT FROM cde.token_secrets s
            WHERE s.token = t.token AND s.expires_at = t.expires_at)) AS living_without,
       (SELECT count(*) FROM cde.token_secrets s WHERE NOT EXISTS (
            SELECT FROM cde.payment_tokens t
            WHERE t.token = s.token AND status = 'active' AND expired_at IS NULL)) AS dead_with,
       (SELECT count(*) FROM (SELECT FROM cde.outbox WHERE data ? 'token'
            GROUP BY data ->> 'token', subject HAVING count(*) > 1) n) AS told_twice,
       (SELECT count(*) FROM cde.outbox
        WHERE subject = 'evt.payment.token.created.v1') AS created,
       (SELECT count(DISTINCT data ->> 'token') FROM cde.outbox
        WHERE subject IN ('evt.payment.token.revoked.v1', 'evt.payment.token.expired.v1')) AS ended,
       (SELECT count(*) FROM cde.payment_tokens
        WHERE status = 'active' AND expired_at IS NULL) AS living
"""


@dataclass(slots=True)
class One:
    """What one node has of the life of tokens."""

    database: Database
    keys: Node
    vault: Vault
    tokens: Tokens
    life: TokenLife
    erasure: CardErasure


@dataclass(slots=True)
class World:
    """Two nodes, and what they have made."""

    nodes: list[One]
    made: list[str] = field(default_factory=list)
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    postponed: int = 0
    is_over: bool = False

    def some(self) -> str:
        return random.choice(self.made[-300:])

    async def more(self) -> None:
        """Return once MORE tokens have been made."""
        wanted = len(self.made) + MORE
        while len(self.made) < wanted:
            self.grown.clear()
            await self.grown.wait()

    async def again_and_again(self, work: Callable[[], Awaitable[object]]) -> None:
        while not self.is_over:
            if self.made:
                try:
                    await work()
                except TransientError:
                    self.postponed += 1
            await asyncio.sleep(PAUSE_S)


def spend(key: DataKey, *, device_id: str, counter_id: int, version: int, number: int) -> Spend:
    """The `number`th tap of a device, sealed as the cipher seals."""
    token, at = new_token(), CLOCK.now()
    sealed = key.sealer.seal(b"card", associated_data=associated_data(token, key.version))
    place = sensitive_associated_data(token, key.version)
    card = SealedCard(
        brand="visa",
        bin="41111111",
        last4="1111",
        exp_month=12,
        exp_year=2030,
        fingerprint=bytes(32),
        ciphertext=sealed,
        sensitive_ciphertext=key.sealer.seal(b"track", associated_data=place),
        key_version=key.version,
    )
    return Spend(
        counter_id=counter_id,
        counter_version=version,
        window=CounterWindow(1024).spend(number),
        device_id=device_id,
        request_id=f"r{number}",
        content_hash=bytes(32),
        answer=b"{}",
        at=at,
        issued=IssuedToken(
            token=token, entry_mode="chip", expires_at=at + LIVES[number % 3], card=card
        ),
    )


async def tap(world: World, one: One, device_id: str, counter_id: int) -> None:
    """Tap until it is over or the device is revoked; a commit that was fenced is done again."""
    number = 0
    while not world.is_over:
        number += 1
        version: int = await one.database.fetchval(
            "SELECT version FROM cde.device_counters WHERE counter_id = $1", counter_id
        )
        made = spend(
            one.keys.keyrings.payment_tokens.active,
            device_id=device_id,
            counter_id=counter_id,
            version=version,
            number=number,
        )
        if await one.vault.journal.submit(made):
            assert made.issued is not None
            world.made.append(made.issued.token)
            world.grown.set()
            continue
        await one.keys.keyrings.payment_tokens.reload()
        status = await one.database.fetchval(
            "SELECT status FROM cde.devices WHERE device_id = $1", device_id
        )
        if status != "active":
            return


async def look(world: World, one: One) -> None:
    """Open some tokens, each with the key that its row names; a living one has what was sealed."""
    names = world.made[-50:]
    async with one.database.connection() as connection:
        found = await store.sealed(connection, names)
    for name, sealed in zip(names, found, strict=True):
        if sealed is not None and sealed.ciphertext:
            await opened(one, name, sealed.key_version, sealed.ciphertext)


async def opened(one: One, name: str, version: str, ciphertext: bytes) -> None:
    key = await one.keys.keyrings.payment_tokens.version(version)
    place = associated_data(name, version)
    assert bytes(key.sealer.open_sealed(ciphertext, associated_data=place)) == b"card"


async def erased(world: World, merchant_id: UUID) -> None:
    """Both nodes erase it at the same time, until each says that it is done."""

    async def by(one: One) -> None:
        async with asyncio.timeout(SETTLE_S):
            while True:
                try:
                    await one.erasure.request(merchant_id, correlation_id="c")
                    if (await one.erasure.erase(merchant_id)).done:
                        return
                except TransientError:
                    world.postponed += 1

    await asyncio.gather(*(by(one) for one in world.nodes))


async def start(stack: AsyncExitStack, url: str, directory: Path) -> World:
    providers = local_provider(directory)
    nodes = []
    for _ in range(2):
        database = await Database.connect(url, pool_size=12)
        stack.push_async_callback(database.close)
        tokens = Tokens(database, clock=CLOCK)
        vault = Vault(database, connections=2, batch_limit=16)
        await vault.journal.start()
        stack.push_async_callback(vault.journal.stop, 5.0)
        life = TokenLife(
            database,
            tokens=tokens,
            clock=CLOCK,
            default_ttl=DAY,
            shred_within=timedelta(0),
            keep_metadata=timedelta(seconds=0.2),
        )
        keys = await start_node(database, providers)
        cards = CardErasure(database, clock=CLOCK)
        nodes.append(One(database, keys, vault, tokens, life, cards))
    return World(nodes)


def works(world: World, one: One, settled: UUID) -> list[Callable[[], Awaitable[object]]]:
    database = one.database
    return [
        lambda: look(world, one),
        lambda: store.authorize(database, world.some(), CLOCK.now()),
        lambda: revoked(one, world.some()),
        one.tokens.announce_expired,
        one.life.purge_answers,
        one.life.purge_metadata,
        one.life.shred,
        one.life.tend_partitions,
        one.keys.job.work,
        lambda: merchants.change_settings(database, settled, token_ttl_s=3600, sensitive_data=None),
    ]


async def revoked(one: One, name: str) -> None:
    async with one.database.connection() as connection:
        [found] = await store.sealed(connection, [name])
    if found is not None and found.expires_at > CLOCK.now() + DAY / 2:
        with suppress(NotFoundError):  # gone with its merchant
            await one.tokens.revoke(name, merchant_id=None, correlation_id="c")


async def test_all_at_once_on_two_nodes_leaves_every_token_either_whole_or_gone(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "ROWS", 50)
    async with AsyncExitStack() as stack:
        world = await start(stack, database_url, tmp_path)
        first = world.nodes[0]
        await first.life.tend_partitions()
        shops = [await put_merchant(first.database, devices=3) for _ in range(3)]
        rows = await first.database.fetch("SELECT device_id, counter_id FROM cde.devices")
        async with asyncio.timeout(ALL_S), asyncio.TaskGroup() as group:
            for number, (device_id, counter_id) in enumerate(rows):
                group.create_task(tap(world, world.nodes[number % 2], device_id, counter_id))
            for one in world.nodes:
                for work in works(world, one, shops[0]):
                    group.create_task(world.again_and_again(work))
            await world.more()
            await first.keys.life.rotate(PAYMENT_TOKENS, actor="test")
            await erased(world, shops[1])
            await world.more()
            await first.keys.life.rotate(PAYMENT_TOKENS, actor="test")
            await world.more()
            world.is_over = True
        await judged(world, shops)


async def judged(world: World, shops: list[UUID]) -> None:
    one = world.nodes[1]
    found = await one.database.fetchrow(JUDGED)
    assert found is not None
    assert (found["living_without"], found["dead_with"], found["told_twice"]) == (0, 0, 0)
    assert found["created"] == len(world.made) == found["living"] + found["ended"] > MORE
    for merchant_id in shops:
        rows: int = await one.database.fetchval(
            "SELECT count(*) FROM cde.payment_tokens WHERE merchant_id = $1", merchant_id
        )
        assert await store.total(one.database, merchant_id) == rows
        assert rows == 0 or merchant_id != shops[1]
    for row in await one.database.fetch(
        "SELECT token, key_version, card_ciphertext FROM cde.token_secrets"
    ):
        await opened(one, *row)
