"""The bytes of what was shredded, looked for in the files of a real PostgreSQL."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from glamd.admin import migrate
from glamd.clock import SystemClock
from glamd.db import Database
from glamd.payments import store
from glamd.payments.tokens import Tokens
from tests.conftest import IN_CI
from tests.support.postgres import PostgresServer, execute
from tests.support.stored_tokens import put_token, token_life

NEEDLE_BYTES = 64
TOASTED_BYTES = 6000
"""More than PostgreSQL keeps in the row itself; random, so that nothing is compressed."""


@pytest.fixture
def data(postgres_server: PostgresServer) -> Path:
    """The server's files; loudly skipped on a server whose files are not ours to read."""
    if postgres_server.data is None:
        message = "the tests use a foreign PostgreSQL: the bytes of its files cannot be looked at"
        if IN_CI:
            pytest.fail(message)
        pytest.skip(message)
    return postgres_server.data


def found_in(data: Path, needles: dict[str, bytes]) -> set[str]:
    """Which of these stand in any file of the server but its write-ahead log."""
    found: set[str] = set()
    for path in data.rglob("*"):
        if "pg_wal" in path.parts or not path.is_file():
            continue
        content = path.read_bytes()
        found |= {name for name, needle in needles.items() if needle in content}
    return found


def needles_of(name: str, ciphertext: bytes) -> dict[str, bytes]:
    """Pieces of a ciphertext that stand in one page, however PostgreSQL cuts it up."""
    starts = range(0, len(ciphertext) - NEEDLE_BYTES // 2, 2000)
    return {f"{name}:{at}": ciphertext[at : at + NEEDLE_BYTES // 2] for at in starts}


async def test_nothing_is_left_of_what_was_shredded_in_any_file_and_all_of_what_lives(
    database: Database, database_url: str, postgres_server: PostgresServer, data: Path
) -> None:
    tokens = Tokens(database, clock=SystemClock())
    merchant_id, tomorrow = uuid4(), datetime.now(UTC) + timedelta(hours=24)
    await token_life(database, SystemClock()).tend_partitions()
    sealed = {
        name: os.urandom(size)
        for name, size in {
            "revoked": NEEDLE_BYTES,
            "revoked-sensitive": TOASTED_BYTES,
            "authorized": NEEDLE_BYTES,
            "authorized-sensitive": TOASTED_BYTES,
            "far": NEEDLE_BYTES,
            "living": NEEDLE_BYTES,
            "living-sensitive": TOASTED_BYTES,
        }.items()
    }
    names = {
        name: await put_token(
            database,
            merchant_id,
            expires_at=tomorrow,
            card=sealed[name],
            sensitive=sealed[f"{name}-sensitive"],
        )
        for name in ("revoked", "authorized", "living")
    }
    far = await put_token(
        database, merchant_id, expires_at=tomorrow + timedelta(days=100), card=sealed["far"]
    )
    needles = {k: v for name, each in sealed.items() for k, v in needles_of(name, each).items()}
    # As autovacuum does by itself, when there is enough: what it samples it keeps in a catalogue.
    await execute(database_url, "ANALYZE")
    await postgres_server.checkpoint()
    assert found_in(data, needles) == set(needles)

    # A snapshot that could still see what is deleted, on another table: it must not keep the bytes.
    async with database.connection() as reader, reader.transaction():
        await reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        await reader.fetchval("SELECT count(*) FROM cde.merchants")
        for token in (names["revoked"], far):
            await tokens.revoke(token, merchant_id=None, correlation_id="c")
        assert await store.authorize(database, names["authorized"], datetime.now(UTC)) is not None
        await execute(database_url, "VACUUM ANALYZE")
        await postgres_server.checkpoint()
        shredded = ("revoked", "revoked-sensitive", "authorized-sensitive", "far")
        gone = {name for name in needles if name.startswith(shredded)}
        assert gone & found_in(data, needles), "neither DELETE nor VACUUM has shredded anything"

        purged = await token_life(database, SystemClock()).purge_now()
        assert set(purged.rewritten) == {
            f"token_secrets_{tomorrow:%Y%m%d}",
            "token_secrets_other",
        }
        assert purged.waiting == ()
        await postgres_server.checkpoint()
        assert found_in(data, needles) == set(needles) - gone
    rows = await database.fetch(
        "SELECT token, card_ciphertext, sensitive_ciphertext FROM cde.token_secrets"
    )
    assert {tuple(row) for row in rows} == {
        (names["authorized"], sealed["authorized"], None),
        (names["living"], sealed["living"], sealed["living-sensitive"]),
    }


async def test_what_earlier_releases_kept_beside_the_metadata_is_gone_after_the_upgrade(
    empty_database_url: str, postgres_server: PostgresServer, data: Path
) -> None:
    await migrate.upgrade(empty_database_url, revision="0003")
    old = os.urandom(NEEDLE_BYTES)
    await execute(
        empty_database_url,
        "INSERT INTO cde.payment_tokens (token, merchant_id, device_id, brand, bin, last4,"
        " fingerprint, entry_mode, card_ciphertext, key_version, created_at, expires_at)"
        " VALUES ('ptk_00000000000000000000000000', gen_random_uuid(), 'd', 'visa', '42424242',"
        f" '4242', '\\x00', 'chip', '\\x{old.hex()}', 'v1', now(), now())",
    )
    await postgres_server.checkpoint()
    assert found_in(data, {"old": old}) == {"old"}
    await migrate.upgrade(empty_database_url)
    await postgres_server.checkpoint()
    assert found_in(data, {"old": old}) == set()
