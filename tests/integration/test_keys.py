"""Keyrings and key sets on a real database: two nodes, wrong keys, states, and the audit's say."""

import asyncio
from pathlib import Path

import asyncpg
import pytest

from glamd.db import Database
from glamd.errors import (
    ConfigError,
    CryptoError,
    UnavailableError,
)
from glamd.keys import keyrings as keyrings_module
from glamd.keys import store
from glamd.keys.keyrings import Keyrings
from glamd.keys.providers.interface import Providers
from tests.support.keys import local_provider
from tests.support.settable_clock import SettableClock

CLOCK = SettableClock()


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests here, emptied before each: much cheaper than one each."""
    connection = await asyncpg.connect(module_database_url)
    await connection.execute("DELETE FROM cde.encryption_keys; DELETE FROM cde.key_sets")
    await connection.close()
    return module_database_url


@pytest.fixture
def provider(tmp_path: Path) -> Providers:
    return local_provider(tmp_path)


async def load(database: Database, provider: Providers, first: str = "v1") -> Keyrings:
    return await Keyrings.load(database, provider, CLOCK, first)


# ---- keyrings


async def test_two_nodes_that_start_at_once_end_up_with_the_same_keys(
    database: Database, provider: Providers
) -> None:
    one, other, third = await asyncio.gather(
        load(database, provider), load(database, provider), load(database, provider, "v9")
    )
    sealed = one.payment_tokens.active.sealer.seal(b"4111", associated_data=b"ptk_1")
    for node in (other, third):
        key = await node.payment_tokens.version(one.payment_tokens.active.version)
        assert key.sealer.open_sealed(sealed, associated_data=b"ptk_1") == b"4111"
        assert node.fingerprints.active.key == one.fingerprints.active.key
        assert node.audit.active.key == one.audit.active.key
    assert await database.fetchval("SELECT count(*) FROM cde.encryption_keys") == 3


async def test_the_first_version_is_named_once_and_never_moves_an_active_key(
    database: Database, provider: Providers
) -> None:
    made = await load(database, provider, "2025-a")
    again = await load(database, provider, "2026-b")
    assert made.payment_tokens.active.version == again.payment_tokens.active.version == "2025-a"
    assert made.payment_tokens.kcvs == again.payment_tokens.kcvs
    rows = await database.fetch("SELECT keyring, kcv, wrapped_key FROM cde.encryption_keys")
    assert {row["keyring"] for row in rows} == {"payment-tokens", "fingerprints", "audit"}
    assert len({row["kcv"] for row in rows}) == 3
    assert not any(made.audit.active.key in row["wrapped_key"] for row in rows)


@pytest.mark.parametrize("first", ["", "v 1", "x" * 33, "v\n"])
async def test_a_first_version_that_is_no_name_is_refused(provider: Providers, first: str) -> None:
    with pytest.raises(ConfigError):
        await load(Database.__new__(Database), provider, first)


async def test_another_kek_ends_the_start_with_one_clear_line(
    database: Database, provider: Providers, tmp_path: Path
) -> None:
    await load(database, provider)
    (tmp_path / "kek").unlink()
    with pytest.raises(ConfigError, match="payment-tokens:v1 does not open under this key-encr"):
        await load(database, local_provider(tmp_path))


async def test_a_key_that_does_not_fit_its_check_value_ends_the_start(
    database: Database, provider: Providers
) -> None:
    await load(database, provider)
    await database.execute("UPDATE cde.encryption_keys SET kcv = '000000' WHERE keyring = 'audit'")
    with pytest.raises(ConfigError, match="audit v1 does not fit its check value 000000"):
        await load(database, provider)


async def test_a_wrapped_key_that_was_put_under_another_name_does_not_open(
    database: Database, provider: Providers
) -> None:
    await load(database, provider)
    await database.execute(
        "UPDATE cde.encryption_keys k SET wrapped_key = o.wrapped_key, kcv = o.kcv "
        "FROM cde.encryption_keys o WHERE o.keyring = 'audit' AND k.keyring = 'fingerprints'"
    )
    with pytest.raises(ConfigError, match="fingerprints:v1 does not open"):
        await load(database, provider)


async def test_a_key_of_another_provider_is_named(database: Database, provider: Providers) -> None:
    await load(database, provider)
    await database.execute("UPDATE cde.encryption_keys SET provider = 'aws-kms'")
    with pytest.raises(ConfigError, match="wrapped by the key provider aws-kms, which is not"):
        await load(database, provider)


async def test_a_keyring_without_an_active_version_is_refused_and_not_made_anew(
    database: Database, provider: Providers
) -> None:
    await load(database, provider)
    await database.execute("UPDATE cde.encryption_keys SET status = 'retired'")
    with pytest.raises(ConfigError, match="payment-tokens has no active version"):
        await load(database, provider, "v2")
    assert await database.fetchval("SELECT count(*) FROM cde.encryption_keys") == 3


async def add_version(database: Database, provider: Providers, version: str, status: str) -> None:
    """What another node's rotation will leave in the table."""
    key = bytes([len(version)]) * 32
    await database.execute(
        "INSERT INTO cde.encryption_keys (keyring, version, wrapped_key, provider, kcv, status) "
        "VALUES ('payment-tokens', $1, $2, 'local', $3, $4)",
        version,
        await provider.current.wrap(key, context=f"payment-tokens:{version}"),
        keyrings_module._kcv(key),
        status,
    )


async def test_a_version_that_another_node_made_is_fetched_when_a_row_names_it(
    database: Database, provider: Providers
) -> None:
    ring = (await load(database, provider)).payment_tokens
    first = ring.active
    await database.execute(
        "UPDATE cde.encryption_keys SET status = 'decrypt-only' WHERE keyring = 'payment-tokens'"
    )
    await add_version(database, provider, "v2", "active")
    assert ring.active is first
    found = await asyncio.gather(*(ring.version("v2") for _ in range(10)))
    assert {key.version for key in found} == {"v2"}
    assert ring.active is found[0]
    assert await ring.version("v1") is first


async def test_a_version_that_does_not_exist_is_a_crypto_error(
    database: Database, provider: Providers
) -> None:
    ring = (await load(database, provider)).payment_tokens
    with pytest.raises(CryptoError, match="no version v7"):
        await ring.version("v7")


async def test_a_destroyed_version_opens_nothing_and_says_so(
    database: Database, provider: Providers
) -> None:
    await load(database, provider)
    await add_version(database, provider, "v0", "retired")
    await database.execute(
        "UPDATE cde.encryption_keys SET status = 'destroyed', wrapped_key = NULL "
        "WHERE version = 'v0'"
    )
    ring = (await load(database, provider)).payment_tokens
    assert ring.kcvs.keys() == {"v1"}
    with pytest.raises(CryptoError, match="v0 of the key payment-tokens is destroyed"):
        await ring.version("v0")


async def test_a_retired_version_still_opens_what_it_sealed(
    database: Database, provider: Providers
) -> None:
    ring = (await load(database, provider)).payment_tokens
    await add_version(database, provider, "v00", "retired")
    assert (await ring.version("v00")).version == "v00"


async def test_what_is_in_memory_goes_on_working_while_the_database_is_away(
    database: Database, provider: Providers
) -> None:
    ring = (await load(database, provider)).payment_tokens
    await database.close()
    assert await ring.version("v1") is ring.active
    with pytest.raises(UnavailableError):
        await ring.version("v2")
    assert ring.active.version == "v1"


async def test_nothing_that_is_printed_shows_a_key(database: Database, provider: Providers) -> None:
    loaded = await load(database, provider)
    secret = loaded.audit.active.key
    shown = repr(loaded) + repr(loaded.audit.active) + repr(loaded.payment_tokens.active)
    shown += repr(await store.keys(database, "cde"))
    assert secret.hex() not in shown
    assert repr(secret)[2:-1] not in shown
    assert "wrapped_key" not in shown
