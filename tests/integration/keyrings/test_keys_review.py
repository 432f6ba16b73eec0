"""Keys under hostile interleavings: two nodes on one database, stopped at the worst moment."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from typing_extensions import override

from glamd.crypto.dukpt import AES_DUKPT, Profile
from glamd.db import Connection, Database
from glamd.errors import ConflictError, CryptoError, UnavailableError
from glamd.keys import store
from glamd.keys.key_sets.service import Keys
from glamd.keys.keyrings import AUDIT, PAYMENT_TOKENS
from glamd.keys.lifecycle import COUNT_LIMIT
from glamd.keys.providers.interface import Providers
from glamd.keys.providers.local import LocalProvider, create_kek_file
from glamd.keys.sealed_rows import Span
from glamd.payments import store as payments
from glamd.payments.model import SealedToken
from glamd.payments.resealing.service import PaymentTokenRows
from glamd.payments.resealing.store import SecretRow
from tests.support.postgres import eventually, execute, lock_waiters
from tests.support.sealed_rows import Node, read_token, seal_tokens, start_node, versions_of
from tests.support.settable_clock import SettableClock

PATIENCE_S = 10.0


async def target_of(database: Database) -> str:
    """Where the re-encryption is bringing the rows to."""
    progress = await store.progress(database, "cde", PAYMENT_TOKENS)
    assert progress is not None
    return progress.target


async def so_many_wait(database: Database, sessions: int) -> bool:
    """Whether so many sessions wait for a lock."""
    return await lock_waiters(database) == sessions


# ---- keys that could not be unwrapped again


class OneWay(LocalProvider):
    """A provider that is allowed to wrap and not to unwrap, as by a policy of AWS KMS."""

    may_unwrap = True

    @override
    async def unwrap(self, wrapped: bytes, *, context: str) -> bytes:
        """Refused, once the test says so."""
        if not self.may_unwrap:
            raise CryptoError("AWS KMS refuses Decrypt")
        return await super().unwrap(wrapped, context=context)


class Forgetful(OneWay):
    """A provider that gives another key back than it took."""

    @override
    async def unwrap(self, wrapped: bytes, *, context: str) -> bytes:
        """Another key, once the test says so."""
        return (
            await LocalProvider.unwrap(self, wrapped, context=context)
            if self.may_unwrap
            else bytes(32)
        )


@pytest.mark.parametrize("kind", [OneWay, Forgetful])
async def test_a_key_that_its_provider_does_not_give_back_becomes_active_nowhere(
    database: Database, tmp_path: Path, kind: type[OneWay]
) -> None:
    create_kek_file(tmp_path / "kek")
    provider = kind(tmp_path / "kek")
    node = await start_node(database, Providers(provider))
    provider.may_unwrap = False
    with pytest.raises(CryptoError):
        await node.life.rotate(PAYMENT_TOKENS, actor="op")
    provider.may_unwrap = True
    versions = await store.keys(database, "cde", PAYMENT_TOKENS)
    assert [(one.version, one.status) for one in versions] == [("v1", "active")]
    assert node.written == [("keys.rotate", PAYMENT_TOKENS, "op", "CRYPTO_ERROR")]


@pytest.mark.parametrize("kind", [OneWay, Forgetful])
async def test_a_bdk_that_its_provider_does_not_give_back_is_not_imported(
    database: Database, tmp_path: Path, kind: type[OneWay]
) -> None:
    create_kek_file(tmp_path / "kek")
    provider = kind(tmp_path / "kek")
    node = await start_node(database, Providers(provider))
    written: list[str] = []

    async def record(*, action: str, subject: str, actor: str, outcome: str) -> None:
        written.append(f"{action} {subject} {actor} {outcome}")

    keys = Keys(
        database=database,
        glam=database,
        providers=Providers(provider),
        identity_key=node.keyrings.fingerprints.active.key,
        record=record,
        clock=SettableClock(),
    )
    provider.may_unwrap = False
    with pytest.raises(CryptoError) as refused:
        await keys.import_bdk(
            key_set="lane-1", profile=Profile(scheme=AES_DUKPT), bdk=bytes(range(16)), actor="op"
        )
    assert await database.fetchval("SELECT count(*) FROM cde.key_sets") == 0
    assert written == [f"bdk.import lane-1 op {refused.value.code}"]


# ---- interleavings of refusals and rotations


class Paused(Database):
    """A node's database on which the test does something before a certain transaction."""

    @classmethod
    def of(cls, database: Database) -> "Paused":
        """The same pool."""
        return cls(database._pool, database._connector)

    before: asyncio.Event | None = None
    reached: asyncio.Event
    free = 0

    def pause(self, *, after: int) -> asyncio.Event:
        """The transaction after so many waits for what this returns; `reached` says so."""
        self.reached, self.before, self.free = asyncio.Event(), asyncio.Event(), after
        return self.before

    @override
    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        if self.before is not None:
            if self.free == 0:
                self.reached.set()
                go_on, self.before = self.before, None
                await go_on.wait()
            self.free -= 1
        async with super().transaction() as connection:
            yield connection


async def test_a_refused_retirement_does_not_turn_the_re_encryption_back(
    database: Database, providers: Providers, node: Node
) -> None:
    paused = Paused.of(database)
    slow = await start_node(paused, providers)
    await seal_tokens(database, node.keyrings.payment_tokens.active, 3)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    go_on = paused.pause(after=1)
    retiring = asyncio.create_task(slow.life.retire(PAYMENT_TOKENS, "v1", actor="slow"))
    async with asyncio.timeout(PATIENCE_S):
        await paused.reached.wait()
    # It knows by now that v1 is needed, and has not yet had its rows brought to the active version.
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    go_on.set()
    with pytest.raises(ConflictError, match="v1 is needed by 3 rows"):
        await retiring
    assert await target_of(database) == "v3"
    await node.job.work()
    assert await versions_of(database) == {"v3": 3}


async def test_a_refused_retirement_waits_for_a_rotation_that_is_about_to_commit(
    database: Database, providers: Providers, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await start_node(database, providers)
    await seal_tokens(database, node.keyrings.payment_tokens.active, 3)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    await node.job.work()
    await seal_tokens(database, await node.keyrings.payment_tokens.version("v1"), 2, start=10)
    retiring: list[asyncio.Task[object]] = []

    async def write_down(*_args: object, **_named: object) -> None:
        """Between what a rotation changes and its commit."""
        work = other.life.retire(PAYMENT_TOKENS, "v1", actor="other")
        retiring.append(asyncio.create_task(work))
        await eventually(lambda: so_many_wait(database, 1))

    monkeypatch.setattr(node.life._operations, "write_down", write_down)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    with pytest.raises(ConflictError, match="v1 is needed by 2 rows"):
        await retiring[0]
    assert await target_of(database) == "v3"
    await node.job.work()
    assert await versions_of(database) == {"v3": 5}


async def test_a_retired_version_that_rows_still_need_can_be_got_rid_of(
    database: Database, node: Node
) -> None:
    key = node.keyrings.payment_tokens.active
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    await node.job.work()
    await node.life.retire(PAYMENT_TOKENS, "v1", actor="op")
    # From a backup that somebody has put back in part.
    names = await seal_tokens(database, key, 2)
    with pytest.raises(ConflictError, match="they are being re-encrypted"):
        await node.life.destroy(PAYMENT_TOKENS, "v1", actor="op")
    await node.job.work()
    assert await versions_of(database) == {"v2": 2}
    await node.life.destroy(PAYMENT_TOKENS, "v1", actor="op")
    for name in names:
        assert await read_token(node, name)


async def test_a_place_that_is_no_place_any_more_does_not_end_the_re_encryption(
    database: Database, node: Node
) -> None:
    await seal_tokens(database, node.keyrings.payment_tokens.active, 20)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    # Killed far behind, and then the partition was written anew, which made it shorter.
    part = (await PaymentTokenRows(database).parts())[0].name
    await database.execute(
        "UPDATE cde.reencryptions SET position = $1, pass = 1, remaining = 20", f"{part} 100000"
    )
    await node.job.work()
    assert await versions_of(database) == {"v2": 20}


class MovedRows(PaymentTokenRows):
    """Rows of which a pass finds none, since they move ahead of it."""

    are_moving = True

    @override
    async def fetch(self, span: Span, *, target: str) -> Sequence[SecretRow]:
        """None while they move."""
        return () if self.are_moving else await super().fetch(span, target=target)


async def test_rows_that_moved_past_a_pass_are_not_taken_for_damaged(
    database: Database, providers: Providers
) -> None:
    rows = MovedRows(database)
    node = await start_node(database, providers, rows=rows)
    await seal_tokens(database, node.keyrings.payment_tokens.active, 20)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    await node.job.work()
    status = (await node.life.status())[PAYMENT_TOKENS]
    assert (status.remaining, status.damaged, status.finished_at) == (20, 0, None)
    rows.are_moving = False
    await node.job.work()
    assert await versions_of(database) == {"v2": 20}


# ---- clocks that differ


async def test_a_version_comes_after_the_one_before_it_whatever_the_clocks_say(
    database: Database, providers: Providers, node: Node
) -> None:
    behind = SettableClock()
    behind.advance(-3600 * 24 * 365)
    slow = await start_node(database, providers, clock=behind)
    made = await slow.life.rotate(AUDIT, actor="op")
    await node.keyrings.audit.reload()
    # The audit tells by this order which version is the newer one.
    assert list(node.keyrings.audit.kcvs) == ["v1", "v2"]
    assert made.activated_at == behind.now()
    versions = await store.keys(database, "cde", AUDIT)
    assert [one.created_at for one in versions] == [versions[0].created_at, made.created_at]


async def test_nodes_whose_clocks_differ_by_years_do_not_rotate_in_turns(
    database: Database, providers: Providers
) -> None:
    now, ahead = SettableClock(), SettableClock()
    ahead.advance(timedelta(days=5 * 365).total_seconds())
    nodes = [
        await start_node(database, providers, clock=clock, rotate_automatically=True)
        for clock in (now, ahead)
    ]
    for _ in range(5):
        for each in nodes:
            await each.life.check_periods()
    versions = await store.keys(database, "cde", PAYMENT_TOKENS)
    assert [(one.version, one.status) for one in versions] == [
        ("v1", "decrypt-only"),
        ("v2", "active"),
    ]


async def test_a_keyring_that_cannot_be_rotated_keeps_no_other_from_it(
    database: Database, providers: Providers
) -> None:
    clock = SettableClock()
    node = await start_node(database, providers, clock=clock, rotate_automatically=True)
    await database.execute(
        "UPDATE cde.encryption_keys SET status = 'decrypt-only' WHERE keyring = $1", PAYMENT_TOKENS
    )
    clock.advance(timedelta(days=366).total_seconds())
    with pytest.raises(UnavailableError, match="no active version"):
        await node.life.check_periods()
    assert node.written == [("keys.rotate", "audit:v2", "glamd", "ok")]


# ---- rows that move while they are counted


async def test_rows_that_move_to_the_partition_of_their_day_are_counted_and_read_meanwhile(
    database_url: str, database: Database, node: Node
) -> None:
    day = await database.fetchval("SELECT now()::date + 3")
    names = await seal_tokens(database, node.keyrings.payment_tokens.active, 3)
    await database.execute(
        "UPDATE cde.token_secrets SET expires_at = $1::date + interval '1 hour'", day
    )
    await database.execute(
        "INSERT INTO cde.payment_tokens (token, merchant_id, device_id, brand, bin, last4,"
        " exp_month, exp_year, fingerprint, entry_mode, created_at, expires_at)"
        " SELECT token, gen_random_uuid(), 'd', 'visa', '411111', '1111', 12, 2030, '\\x00',"
        " 'swipe', now(), expires_at FROM cde.token_secrets"
    )
    # Connections of their own: what they plan, they plan while the rows are on their way.
    planner = await Database.connect(database_url, pool_size=2)
    rows = PaymentTokenRows(planner)

    async def count() -> int:
        async with planner.connection() as connection:
            return await rows.using(connection, "v1", limit=COUNT_LIMIT, timeout_s=PATIENCE_S)

    async def read() -> list[SealedToken | None]:
        async with planner.connection() as connection:
            return await payments.sealed(connection, names)

    async with database.transaction() as mover:
        await mover.execute("SELECT cde.make_secrets_partition($1)", day)
        counting, reading = asyncio.create_task(count()), asyncio.create_task(read())
        await eventually(lambda: so_many_wait(database, 2))
    counted, found = await asyncio.gather(counting, reading)
    await planner.close()
    assert counted == 3
    assert [one is not None and one.key_version for one in found] == ["v1"] * 3


# ---- the budget of nonces


async def test_whatever_is_sealed_under_a_version_is_counted(
    database: Database, node: Node
) -> None:
    def sealed(version: str) -> float:
        labels = {"keyring": PAYMENT_TOKENS, "version": version}
        return REGISTRY.get_sample_value("glamd_keys_sealed_total", labels) or 0.0

    before = sealed("v1")
    await seal_tokens(database, node.keyrings.payment_tokens.active, 3, with_sensitive=True)
    assert sealed("v1") - before == 6
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    before = sealed("v2")
    await node.job.work()
    assert sealed("v2") - before == 6


# ---- what a crash of the server may take back


async def test_a_destruction_is_never_on_the_disk_before_the_rows_that_it_was_decided_by(
    database: Database, node: Node
) -> None:
    await seal_tokens(database, node.keyrings.payment_tokens.active, 500)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    rows = PaymentTokenRows(database)
    key = await node.keyrings.payment_tokens.version("v1")
    new = node.keyrings.payment_tokens.active
    for part in await rows.parts():
        span = Span(part.name, 0, part.pages)
        found = await rows.fetch(span, target="v2")
        changes = [(row, rows.reseal(row, old=key, new=new)) for row in found]
        await rows.write(span, changes, target="v2")
    written_back = await database.fetchval("SELECT pg_current_wal_insert_lsn()")
    await node.life.retire(PAYMENT_TOKENS, "v1", actor="op")
    # All that was written back without waiting for the disk is there, since it is before the
    # retirement in the same log; and so it is before the key is erased.
    on_disk = await database.fetchval("SELECT pg_current_wal_flush_lsn() >= $1", written_back)
    assert on_disk
    assert await database.fetchval("SHOW synchronous_commit") == "on"


async def test_no_setting_of_the_server_changes_what_a_transaction_sees(
    database_url: str, database: Database
) -> None:
    # Retiring counts rows after it has waited for who seals: an older snapshot would miss theirs.
    name = await database.fetchval("SELECT quote_ident(current_database())")
    setting = "default_transaction_isolation"
    await execute(database_url, f"ALTER DATABASE {name} SET {setting} = 'repeatable read'")
    try:
        connected = await Database.connect(database_url, pool_size=1)
        async with connected.transaction() as connection:
            found = await connection.fetchval("SHOW transaction_isolation")
        await connected.close()
    finally:
        await execute(database_url, f"ALTER DATABASE {name} RESET {setting}")
    assert found == "read committed"
