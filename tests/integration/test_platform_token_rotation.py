"""Platform tokens while their key is rotated, retired and destroyed: writers that know it late."""

from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from glamd.credentials.resealing.service import PlatformTokenRows
from glamd.credentials.resealing.store import SecretRow
from glamd.credentials.service import PlatformTokens
from glamd.db import Database
from glamd.db_errors import UnusableKeyError
from glamd.errors import ConflictError
from glamd.keys.keyrings import PLATFORM_TOKENS, DataKey, Keyring
from glamd.keys.lifecycle import KeyLife
from glamd.keys.operations import Operations
from glamd.keys.providers.interface import Providers
from glamd.keys.reencryption import Reencryption
from glamd.keys.throttle import Throttle
from tests.support.keys import local_provider
from tests.support.platform_vault import NOW, READER, by_platform, load_keyring, new_token
from tests.support.postgres import execute
from tests.support.refresh_world import World
from tests.support.settable_clock import SettableClock

CLOCK = SettableClock(NOW)


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests here, without keys and tokens: much cheaper than one each."""
    await execute(
        module_database_url,
        "DELETE FROM glam.platform_tokens; DELETE FROM glam.encryption_keys;"
        " DELETE FROM glam.reencryptions",
    )
    return module_database_url


@pytest.fixture
def providers(tmp_path: Path) -> Providers:
    """The key provider of this test's database."""
    return local_provider(tmp_path)


@pytest.fixture
async def keyring(database: Database, providers: Providers) -> Keyring[DataKey]:
    """The keyring of the node that rotates."""
    return await load_keyring(database, providers, CLOCK)


@pytest.fixture
async def late(
    database: Database, providers: Providers, keyring: Keyring[DataKey]
) -> PlatformTokens:
    """The vault of another node, which learns of nothing by itself."""
    assert keyring.active.version == "v1"
    other = await load_keyring(database, providers, CLOCK)
    return PlatformTokens(database, keyring=other, clock=CLOCK)


@pytest.fixture
def job(database: Database, keyring: Keyring[DataKey]) -> Reencryption[SecretRow]:
    """The re-encryption of the node that rotates."""
    return Reencryption(
        keyring,
        PlatformTokenRows(database),
        throttle=Throttle(CLOCK),
        clock=CLOCK,
        node_id="n1",
        settled_after_s=0.0,
    )


@pytest.fixture
def life(keyring: Keyring[DataKey], job: Reencryption[SecretRow]) -> KeyLife:
    """The operators' commands on the node that rotates."""

    async def record(*, action: str, subject: str, actor: str, outcome: str) -> None:
        assert action.startswith("keys.")

    return KeyLife(
        (keyring,),
        jobs=(job,),
        operations=Operations(record),
        clock=CLOCK,
        cryptoperiods={PLATFORM_TOKENS: timedelta(days=365)},
        rotate_automatically=False,
    )


async def versions_of(database: Database) -> set[str]:
    """The key versions that rows name."""
    return {row[0] for row in await database.fetch("SELECT key_version FROM glam.platform_tokens")}


async def test_a_token_is_sealed_anew_and_nothing_else_of_its_row_changes(
    database: Database, late: PlatformTokens, life: KeyLife, job: Reencryption[SecretRow]
) -> None:
    merchants = [uuid4() for _ in range(300)]
    for merchant_id in merchants:
        await late.store(new_token(merchant_id), accessor=READER)
    columns = "SELECT to_jsonb(t) - 'ciphertext' - 'key_version' FROM glam.platform_tokens t"
    before = await database.fetch(f"{columns} ORDER BY token_id")
    await life.rotate(PLATFORM_TOKENS, actor="op")
    await job.work()
    assert await versions_of(database) == {"v2"}
    assert await database.fetch(f"{columns} ORDER BY token_id") == before
    await life.retire(PLATFORM_TOKENS, "v1", actor="op")
    await life.destroy(PLATFORM_TOKENS, "v1", actor="op")
    reading = await late.read(merchants[7], platform=None, accessor=READER)
    assert by_platform(reading)["shopify"].secret == new_token(merchants[7]).secret


async def test_a_writer_that_knows_only_a_retired_key_does_not_slip_a_row_in(
    database: Database, late: PlatformTokens, life: KeyLife
) -> None:
    merchant_id = uuid4()
    await late.store(new_token(merchant_id), accessor=READER)
    await database.execute("DELETE FROM glam.platform_tokens")
    await life.rotate(PLATFORM_TOKENS, actor="op")
    await life.retire(PLATFORM_TOKENS, "v1", actor="op")
    # It seals with what it has, is refused, reads its keyring anew, and seals again.
    await late.store(new_token(merchant_id), accessor=READER)
    assert await versions_of(database) == {"v2"}
    reading = await late.read(merchant_id, platform=None, accessor=READER)
    assert by_platform(reading)["shopify"].secret == new_token(merchant_id).secret
    with pytest.raises(UnusableKeyError) as caught:
        await database.execute("UPDATE glam.platform_tokens SET key_version = 'v1'")
    assert caught.value.retryable


async def test_a_pair_that_a_platform_has_given_survives_the_retirement_of_the_key_in_hand(
    module_database_url: str, tmp_path: Path
) -> None:
    async with World.make(module_database_url, tmp_path) as world:
        connection = await world.connect()
        gate = world.platform.hold()
        async with world.node():
            await world.platform.called(1)
            await world.rotate()
            await world.database.execute(
                "UPDATE glam.encryption_keys SET status = 'retired' WHERE version = 'v1'"
            )
            gate.set()
            renewed = await world.is_renewed(connection)
        assert renewed.key_version == "v2"
        assert world.platform.is_good(await world.data(connection))


async def test_rows_that_were_swapped_are_left_as_they_are_and_block_the_retirement(
    database: Database, late: PlatformTokens, life: KeyLife, job: Reencryption[SecretRow]
) -> None:
    one, other, third = uuid4(), uuid4(), uuid4()
    for merchant_id in (one, other, third):
        await late.store(new_token(merchant_id), accessor=READER)
    await database.execute(
        "UPDATE glam.platform_tokens a SET ciphertext = b.ciphertext FROM glam.platform_tokens b"
        " WHERE (a.merchant_id, b.merchant_id) IN (($1, $2), ($2, $1))",
        one,
        other,
    )
    await life.rotate(PLATFORM_TOKENS, actor="op")
    await job.work()
    rows = await database.fetch("SELECT merchant_id, key_version FROM glam.platform_tokens")
    assert dict(rows) == {one: "v1", other: "v1", third: "v2"}
    with pytest.raises(ConflictError, match="needed by 2 rows"):
        await life.retire(PLATFORM_TOKENS, "v1", actor="op")
    assert (await life.status())[PLATFORM_TOKENS].damaged in {0, 2}


async def test_a_row_that_somebody_has_locked_is_left_for_the_next_pass(
    database: Database, late: PlatformTokens, life: KeyLife, job: Reencryption[SecretRow]
) -> None:
    merchants: list[UUID] = [uuid4() for _ in range(3)]
    for merchant_id in merchants:
        await late.store(new_token(merchant_id), accessor=READER)
    await life.rotate(PLATFORM_TOKENS, actor="op")
    async with database.transaction() as reader:
        await reader.execute(
            "SELECT FROM glam.platform_tokens WHERE merchant_id = $1 FOR UPDATE", merchants[0]
        )
        await job.work()
        left = "SELECT merchant_id FROM glam.platform_tokens WHERE key_version = 'v1'"
        assert [row[0] for row in await database.fetch(left)] == [merchants[0]]
    await job.work()
    assert await versions_of(database) == {"v2"}
