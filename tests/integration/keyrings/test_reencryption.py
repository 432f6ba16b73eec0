"""The re-encryption on a real database: killed, raced, damaged, deceived; and what readers see."""

import asyncio
from collections.abc import Sequence

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs
from typing_extensions import override

from glamd.db import Database
from glamd.errors import UnavailableError
from glamd.keys import store
from glamd.keys.keyrings import PAYMENT_TOKENS
from glamd.keys.providers.interface import Providers
from glamd.keys.sealed_rows import Span
from glamd.payments.cipher import sensitive_associated_data
from glamd.payments.resealing.service import PaymentTokenRows
from glamd.payments.resealing.store import SecretRow
from tests.support.postgres import eventually
from tests.support.sealed_rows import (
    CARD,
    SENSITIVE,
    Node,
    read_token,
    seal_tokens,
    start_node,
    versions_of,
)

TOKENS = 1500


class HeldRows(PaymentTokenRows):
    """Rows whose writing stops before the commit until it is let go; `held` says that it does."""

    def __init__(self, database: Database, *, free: int) -> None:
        super().__init__(database)
        self.held = asyncio.Event()
        self.go_on = asyncio.Event()
        self._free = free

    @override
    async def write(
        self, span: Span, changes: Sequence[tuple[SecretRow, SecretRow]], *, target: str
    ) -> int:
        """As ever, for so many times."""
        if self._free == 0:
            self.held.set()
            await self.go_on.wait()
        else:
            self._free -= 1
        return await super().write(span, changes, target=target)


async def held_up(
    database: Database, providers: Providers, *, free: int
) -> tuple[HeldRows, "asyncio.Task[None]"]:
    """Another node at work, which has come so many commits far and stops before the next."""
    rows = HeldRows(database, free=free)
    other = await start_node(database, providers, rows=rows)
    task = asyncio.create_task(other.job.work())
    async with asyncio.timeout(10):
        await rows.held.wait()
    return rows, task


async def cancelled(task: "asyncio.Task[None]") -> None:
    """Kill it where it is."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def progress_of(database: Database) -> store.Progress:
    """How far it has come."""
    found = await store.progress(database, "cde", PAYMENT_TOKENS)
    assert found is not None
    return found


# ---- what must not go wrong


async def test_a_job_that_is_killed_between_read_and_commit_is_resumed_and_loses_nothing(
    database: Database, providers: Providers, node: Node
) -> None:
    names = await seal_tokens(database, node.keyrings.payment_tokens.active, TOKENS)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    _, task = await held_up(database, providers, free=1)
    await cancelled(task)
    half = await versions_of(database)
    assert 0 < half["v2"] < TOKENS
    await node.job.work()
    assert await versions_of(database) == {"v2": TOKENS}
    for name in names[:: TOKENS // 20]:
        assert await read_token(node, name) == CARD
    progress = await progress_of(database)
    assert progress.finished_at is not None
    assert progress.remaining == 0
    assert progress.owner is None


async def test_after_a_kill_nobody_works_before_the_lease_ends_and_then_goes_on_where_it_was(
    database: Database, providers: Providers, node: Node
) -> None:
    await seal_tokens(database, node.keyrings.payment_tokens.active, TOKENS)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    # What a process leaves that could not tidy up: a place, and a lease that goes on.
    part = (await node.job.rows.parts())[0]
    await database.execute(
        "UPDATE cde.reencryptions SET owner = 'dead', owner_until = now() + '1 hour',"
        " position = $1, pass = 1, remaining = 700",
        f"{part.name} {part.pages - 2}",
    )
    await node.job.work()
    assert await versions_of(database) == {"v1": TOKENS}
    await database.execute("UPDATE cde.reencryptions SET owner_until = now()")
    with capture_logs() as logs:
        await node.job.work()
    passes = [entry for entry in logs if entry["event"] == "reencryption_pass"]
    assert [entry["number"] for entry in passes] == [1, 2]
    assert await versions_of(database) == {"v2": TOKENS}


async def test_two_nodes_do_not_work_at_the_same_time(
    database: Database, providers: Providers, node: Node
) -> None:
    await seal_tokens(database, node.keyrings.payment_tokens.active, TOKENS)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    rows, task = await held_up(database, providers, free=0)
    await node.job.work()
    assert await versions_of(database) == {"v1": TOKENS}
    rows.go_on.set()
    await task
    assert await versions_of(database) == {"v2": TOKENS}


async def test_a_row_that_changed_after_it_was_read_is_not_overwritten(
    database: Database, providers: Providers, node: Node
) -> None:
    key = node.keyrings.payment_tokens.active
    names = await seal_tokens(database, key, 40, with_sensitive=True)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    rows, task = await held_up(database, providers, free=0)
    # The sensitive data of one was erased, another was revoked: neither may come back.
    await database.execute(
        "UPDATE cde.token_secrets SET sensitive_ciphertext = NULL WHERE token = $1", names[3]
    )
    await database.execute("DELETE FROM cde.token_secrets WHERE token = $1", names[4])
    rows.go_on.set()
    await task
    assert await versions_of(database) == {"v2": 39}
    erased = await database.fetch(
        "SELECT token FROM cde.token_secrets WHERE sensitive_ciphertext IS NULL"
    )
    assert [row["token"] for row in erased] == [names[3]]
    assert await read_token(node, names[3]) == CARD


async def test_a_damaged_row_and_swapped_rows_stop_nothing_and_are_left_as_they_are(
    database: Database, node: Node
) -> None:
    names = await seal_tokens(database, node.keyrings.payment_tokens.active, 100)
    await database.execute(
        "UPDATE cde.token_secrets SET card_ciphertext = set_byte(card_ciphertext, 20,"
        " 255 - get_byte(card_ciphertext, 20)) WHERE token = $1",
        names[0],
    )
    await database.execute(
        "UPDATE cde.token_secrets a SET card_ciphertext = b.card_ciphertext"
        " FROM cde.token_secrets b WHERE (a.token = $1 AND b.token = $2)"
        " OR (a.token = $2 AND b.token = $1)",
        names[1],
        names[2],
    )
    before = await database.fetch(
        "SELECT token, card_ciphertext FROM cde.token_secrets WHERE token = ANY ($1) ORDER BY 1",
        names[:3],
    )
    counted = REGISTRY.get_sample_value(
        "glamd_keys_unsealable_rows_total", {"keyring": PAYMENT_TOKENS}
    )
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    with capture_logs() as logs:
        await node.job.work()
    assert await versions_of(database) == {"v1": 3, "v2": 97}
    after = await database.fetch(
        "SELECT token, card_ciphertext FROM cde.token_secrets WHERE token = ANY ($1) ORDER BY 1",
        names[:3],
    )
    assert before == after
    named = [entry for entry in logs if entry["event"] == "row_unsealable"]
    assert sorted(entry["row"] for entry in named) == names[:3]
    assert not any(row["card_ciphertext"].hex() in str(named) for row in before)
    sample = REGISTRY.get_sample_value(
        "glamd_keys_unsealable_rows_total", {"keyring": PAYMENT_TOKENS}
    )
    assert sample == (counted or 0.0) + 3
    status = (await node.life.status())[PAYMENT_TOKENS]
    assert (status.damaged, status.remaining) == (3, 3)
    assert status.finished_at is not None
    assert "3 rows do not open" in status.warnings[0]


async def test_a_card_put_in_the_place_of_sensitive_data_does_not_become_valid(
    database: Database, node: Node
) -> None:
    await seal_tokens(database, node.keyrings.payment_tokens.active, 1)
    await database.execute("UPDATE cde.token_secrets SET sensitive_ciphertext = card_ciphertext")
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    await node.job.work()
    assert await versions_of(database) == {"v1": 1}


async def test_a_row_of_a_version_that_nobody_knows_is_damaged_and_stops_nothing(
    database: Database, node: Node
) -> None:
    names = await seal_tokens(database, node.keyrings.payment_tokens.active, 50)
    await database.execute(
        "UPDATE cde.token_secrets SET key_version = 'v99' WHERE token = $1", names[7]
    )
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    await node.job.work()
    assert await versions_of(database) == {"v2": 49, "v99": 1}
    assert (await progress_of(database)).damaged == 1


# ---- nodes that know late


async def test_a_node_with_the_old_key_in_memory_is_waited_for(
    database: Database, providers: Providers
) -> None:
    node = await start_node(database, providers, settled_after_s=3600.0)
    late = await start_node(database, providers)
    await seal_tokens(database, late.keyrings.payment_tokens.active, 100)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    await node.job.work()
    assert await versions_of(database) == {"v2": 100}
    unfinished = await progress_of(database)
    assert (unfinished.remaining, unfinished.finished_at) == (0, None)
    # It has not looked at its keyring since, and seals as it always did.
    await seal_tokens(database, late.keyrings.payment_tokens.active, 10, start=100)
    await database.execute("UPDATE cde.reencryptions SET started_at = now() - interval '1 hour'")
    await node.job.work()
    assert await versions_of(database) == {"v2": 110}
    assert (await progress_of(database)).finished_at is not None


async def test_a_rotation_in_the_middle_of_another_brings_all_rows_to_the_newest(
    database: Database, providers: Providers, node: Node
) -> None:
    await seal_tokens(database, node.keyrings.payment_tokens.active, TOKENS)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    rows = HeldRows(database, free=1)
    busy = await start_node(database, providers, rows=rows)
    task = asyncio.create_task(busy.job.run())
    async with asyncio.timeout(10):
        await rows.held.wait()
        await node.life.rotate(PAYMENT_TOKENS, actor="op")
        rows.go_on.set()

    async def is_done() -> bool:
        return await versions_of(database) == {"v3": TOKENS}

    await eventually(is_done)
    await cancelled(task)


async def test_readers_on_two_nodes_never_fail_through_a_whole_life(
    database: Database, providers: Providers, node: Node
) -> None:
    names = await seal_tokens(database, node.keyrings.payment_tokens.active, 400)
    other = await start_node(database, providers)
    stop = asyncio.Event()
    reads = 0

    async def reader(of: Node, step: int) -> None:
        nonlocal reads
        while not stop.is_set():
            for name in names[::step]:
                assert await read_token(of, name) == CARD
                reads += 1

    async with asyncio.TaskGroup() as group:
        group.create_task(reader(node, 7))
        group.create_task(reader(other, 11))
        for number in range(1, 4):
            await node.life.rotate(PAYMENT_TOKENS, actor="op")
            await node.job.work()
            await node.life.retire(PAYMENT_TOKENS, f"v{number}", actor="op")
        stop.set()
    assert reads > 100
    for number in range(1, 4):
        await node.life.destroy(PAYMENT_TOKENS, f"v{number}", actor="op")
    for name in names:
        assert await read_token(other, name) == CARD


async def test_sensitive_data_is_sealed_anew_beside_the_card(
    database: Database, node: Node
) -> None:
    (name,) = await seal_tokens(
        database, node.keyrings.payment_tokens.active, 1, with_sensitive=True
    )
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    await node.job.work()
    ciphertext = await database.fetchval("SELECT sensitive_ciphertext FROM cde.token_secrets")
    clear = node.keyrings.payment_tokens.active.sealer.open_sealed(
        ciphertext, associated_data=sensitive_associated_data(name, "v2")
    )
    assert clear == SENSITIVE


# ---- the way there


async def test_a_partition_that_is_dropped_meanwhile_is_passed_over(
    database: Database, providers: Providers, node: Node
) -> None:
    await database.execute(
        "CREATE TABLE cde.token_secrets_2039 PARTITION OF cde.token_secrets"
        " FOR VALUES FROM ('2039-01-01') TO ('2040-01-01')"
    )
    await seal_tokens(database, node.keyrings.payment_tokens.active, 100)
    await database.execute(
        "INSERT INTO cde.token_secrets SELECT 'x' || token, '2039-06-01', card_ciphertext, NULL,"
        " key_version FROM cde.token_secrets"
    )
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    rows, task = await held_up(database, providers, free=0)
    async with asyncio.timeout(10):
        await database.execute("DROP TABLE cde.token_secrets_2039")
        rows.go_on.set()
        await task
    assert await versions_of(database) == {"v2": 100}


async def test_while_the_database_is_away_it_waits_and_then_goes_on(
    database: Database, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await seal_tokens(database, node.keyrings.payment_tokens.active, 100)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    failures = [UnavailableError("away"), RuntimeError("a bug")]

    async def fails(_span: Span, *, target: str) -> Sequence[SecretRow]:
        if failures:
            raise failures.pop(0)
        return await PaymentTokenRows(database).fetch(_span, target=target)

    monkeypatch.setattr(node.job.rows, "fetch", fails)
    task = asyncio.create_task(node.job.run())

    async def is_done() -> bool:
        return await versions_of(database) == {"v2": 100}

    await eventually(is_done)
    await cancelled(task)


async def test_the_progress_is_told_with_a_rate(database: Database, node: Node) -> None:
    await seal_tokens(database, node.keyrings.payment_tokens.active, TOKENS)
    before = (await node.life.status())[PAYMENT_TOKENS]
    assert (before.active, before.remaining, before.eta_s) == ("v1", 0, 0.0)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    begun = (await node.life.status())[PAYMENT_TOKENS]
    assert (begun.active, begun.remaining, begun.eta_s) == ("v2", TOKENS, None)
    await node.job.work()
    ended = (await node.life.status())[PAYMENT_TOKENS]
    assert (ended.remaining, ended.done, ended.eta_s) == (0, TOKENS, 0.0)
    assert ended.rate > 100
