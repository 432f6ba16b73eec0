"""The group commit on a real PostgreSQL: fencing, remembered ids, bad neighbours, a dead server."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from glamd.db import Database
from glamd.errors import GlamError, UnavailableError
from glamd.payments.counter import CounterWindow
from glamd.payments.model import IDEMPOTENCY_TTL, IssuedToken, SealedCard, Spend
from glamd.payments.vault import Vault, new_token

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
WINDOW_BITS = 64


@pytest.fixture
async def vault(database: Database) -> AsyncIterator[Vault]:
    """A vault whose journal runs."""
    made = Vault(database, connections=2, batch_limit=256)
    await made.journal.start()
    yield made
    await made.journal.stop(timeout_s=5.0)


@pytest.fixture
async def merchant_id(database: Database) -> UUID:
    """A merchant with a key set and a data key."""
    merchant_id = uuid4()
    await database.execute("INSERT INTO cde.merchants (merchant_id) VALUES ($1)", merchant_id)
    await database.execute(
        "INSERT INTO cde.key_sets (key_set, scheme, data_usage, padding, mac, wrapped_bdk,"
        " provider, kcv) VALUES ('set', 'tdes-dukpt', 'data', 'zero', 'optional', '',"
        " 'local', '000000')"
    )
    await database.execute(
        "INSERT INTO cde.encryption_keys (keyring, version, wrapped_key, provider, kcv, status)"
        " VALUES ('payment-tokens', 'v1', '\\x01', 'local', '000000', 'active')"
    )
    return merchant_id


async def counters(database: Database, merchant_id: UUID, name: bytes) -> int:
    """Make a device's counters and return their id."""
    value = await database.fetchval(
        "INSERT INTO cde.device_counters (initial_key, merchant_id) VALUES ($1, $2)"
        " RETURNING counter_id",
        name,
        merchant_id,
    )
    assert isinstance(value, int)
    await database.execute(
        "INSERT INTO cde.devices (device_id, merchant_id, key_set, initial_ksn, counter_id,"
        " certificate_sha256, certificate_expires_at)"
        " VALUES ($1, $2, 'set', '', $3, repeat('0', 64), now())",
        f"dev_{value}",
        merchant_id,
        value,
    )
    return value


def spend(counter_id: int, *, counter: int = 1, version: int = 0) -> Spend:
    """A spend that issues a token."""
    return Spend(
        counter_id=counter_id,
        counter_version=version,
        window=CounterWindow(WINDOW_BITS).spend(counter),
        device_id=f"dev_{counter_id}",
        request_id=f"r{counter}",
        content_hash=bytes(32),
        answer=b'{"answer":%d}' % counter,
        at=NOW,
        issued=IssuedToken(
            token=new_token(),
            entry_mode="chip",
            expires_at=NOW + timedelta(hours=24),
            card=SealedCard(
                brand="visa",
                bin="41111111",
                last4="1111",
                exp_month=12,
                exp_year=2030,
                fingerprint=bytes(32),
                ciphertext=b"sealed",
                sensitive_ciphertext=None,
                key_version="v1",
            ),
        ),
    )


async def count(database: Database, table: str) -> object:
    """How many rows a table has."""
    return await database.fetchval(f"SELECT count(*) FROM cde.{table}")


async def test_a_spend_on_a_version_that_has_moved_leaves_nothing(
    database: Database, vault: Vault, merchant_id: UUID
) -> None:
    counter_id = await counters(database, merchant_id, b"a")
    assert await vault.journal.submit(spend(counter_id))
    assert not await vault.journal.submit(spend(counter_id, counter=2))
    assert await count(database, "payment_tokens") == 1
    assert await count(database, "token_idempotency_keys") == 1
    assert await count(database, "outbox") == 1


@pytest.mark.parametrize("status", ["suspended", "revoked"])
async def test_a_device_that_was_stopped_meanwhile_spends_nothing(
    database: Database, vault: Vault, merchant_id: UUID, status: str
) -> None:
    counter_id = await counters(database, merchant_id, b"a")
    await database.execute("UPDATE cde.devices SET status = $1", status)
    assert not await vault.journal.submit(spend(counter_id))
    assert await count(database, "payment_tokens") == 0


async def test_an_id_that_was_answered_is_not_answered_again_even_on_the_right_version(
    database: Database, vault: Vault, merchant_id: UUID
) -> None:
    counter_id = await counters(database, merchant_id, b"a")
    first = spend(counter_id)
    assert await vault.journal.submit(first)
    again = replace(spend(counter_id, counter=2, version=1), request_id="r1")
    assert not await vault.journal.submit(again)
    stored = await vault.answer_of(first.device_id, "r1", now=NOW)
    assert stored is not None
    assert stored.answer == first.answer
    row = await database.fetchrow("SELECT highest, version, token_count FROM cde.device_counters")
    assert row is not None
    assert tuple(row) == (1, 1, 1)


async def test_a_card_number_as_an_id_does_not_go_out_with_the_event(
    database: Database, vault: Vault, merchant_id: UUID
) -> None:
    counter_id = await counters(database, merchant_id, b"a")
    chosen = ("4242424242424242", "tap-4242 4242 4242 4242", "0d54398ca47a4b63")
    for n, request_id in enumerate(chosen):
        made = spend(counter_id, counter=n + 1, version=n)
        assert await vault.journal.submit(replace(made, request_id=request_id))
        assert await vault.answer_of(made.device_id, request_id, now=NOW) is not None
    rows = await database.fetch("SELECT correlation_id FROM cde.outbox ORDER BY id")
    assert [row["correlation_id"] for row in rows] == [
        "*" * 16,
        "tap-" + "**** " * 3 + "****",
        chosen[2],
    ]


async def test_an_id_is_free_again_when_its_day_is_over(
    database: Database, vault: Vault, merchant_id: UUID
) -> None:
    counter_id = await counters(database, merchant_id, b"a")
    assert await vault.journal.submit(spend(counter_id))
    later = NOW + IDEMPOTENCY_TTL + timedelta(seconds=1)
    assert await vault.answer_of(f"dev_{counter_id}", "r1", now=later) is None
    again = spend(counter_id, counter=2, version=1)
    assert await vault.journal.submit(replace(again, request_id="r1", at=later))
    stored = await vault.answer_of(f"dev_{counter_id}", "r1", now=later)
    assert stored is not None
    assert stored.answer == again.answer


async def test_two_spends_of_one_counter_in_one_batch_have_one_effect(
    database: Database, vault: Vault, merchant_id: UUID
) -> None:
    counter_id = await counters(database, merchant_id, b"a")
    outcomes = await asyncio.gather(
        *(vault.journal.submit(spend(counter_id, counter=n)) for n in range(1, 40))
    )
    assert sum(outcomes) == 1
    assert await count(database, "payment_tokens") == 1


async def test_one_bad_spend_does_not_fail_its_neighbours(
    database: Database, vault: Vault, merchant_id: UUID
) -> None:
    ids = [await counters(database, merchant_id, bytes([n])) for n in range(30)]
    spends = [spend(counter_id) for counter_id in ids]
    issued = spends[7].issued
    assert issued is not None
    # The database refuses a month that is none; nothing above it lets one through.
    bad = replace(issued, card=replace(issued.card, exp_month=13))
    spends[7] = replace(spends[7], issued=bad)
    outcomes = await asyncio.gather(
        *(vault.journal.submit(each) for each in spends), return_exceptions=True
    )
    assert isinstance(outcomes.pop(7), GlamError)
    assert outcomes == [True] * 29
    assert await count(database, "payment_tokens") == 29


async def test_many_devices_share_their_commits_and_each_gets_its_own_effect(
    database: Database, vault: Vault, merchant_id: UUID
) -> None:
    ids = [await counters(database, merchant_id, n.to_bytes(2, "big")) for n in range(300)]
    assert all(await asyncio.gather(*(vault.journal.submit(spend(i)) for i in ids)))
    rows = await database.fetch("SELECT device_id, count(*) FROM cde.payment_tokens GROUP BY 1")
    assert {row[0]: row[1] for row in rows} == {f"dev_{i}": 1 for i in ids}


async def test_two_writers_of_one_device_never_both_spend_a_version(
    database: Database, vault: Vault, merchant_id: UUID
) -> None:
    other = Vault(database, connections=1, batch_limit=256)
    await other.journal.start()
    counter_id = await counters(database, merchant_id, b"a")
    for version in range(20):
        mine = spend(counter_id, counter=2 * version + 1, version=version)
        theirs = spend(counter_id, counter=2 * version + 2, version=version)
        won = await asyncio.gather(vault.journal.submit(mine), other.journal.submit(theirs))
        assert sorted(won) == [False, True]
    await other.journal.stop(timeout_s=5.0)
    assert await count(database, "payment_tokens") == 20


async def test_a_closed_journal_refuses_and_what_was_submitted_before_is_committed(
    database: Database, merchant_id: UUID
) -> None:
    vault = Vault(database, connections=1, batch_limit=1)
    await vault.journal.start()
    ids = [await counters(database, merchant_id, bytes([n])) for n in range(20)]
    waiting = [vault.journal.submit(spend(i)) for i in ids]
    await vault.journal.stop(timeout_s=5.0)
    assert all(await asyncio.gather(*waiting))
    with pytest.raises(UnavailableError):
        await vault.journal.submit(spend(ids[0]))


def test_tokens_have_130_random_bits_and_nothing_else() -> None:
    tokens = {new_token() for _ in range(10_000)}
    assert len(tokens) == 10_000
    for token in tokens:
        assert token.startswith("ptk_")
        assert len(token) == 4 + 26
        assert set(token[4:]) <= set("0123456789ABCDEFGHJKMNPQRSTVWXYZ")


@pytest.mark.parametrize("status", ["retired", "destroyed"])
async def test_nothing_is_stored_under_a_key_that_is_not_usable_any_more(
    database: Database, vault: Vault, merchant_id: UUID, status: str
) -> None:
    counter_id = await counters(database, merchant_id, b"a")
    await database.execute(
        "UPDATE cde.encryption_keys SET status = $1::text,"
        " wrapped_key = CASE WHEN $1 = 'destroyed' THEN NULL ELSE wrapped_key END",
        status,
    )
    assert not await vault.journal.submit(spend(counter_id))
    assert await count(database, "token_secrets") == 0
    # What needs no key is not held up by one.
    assert await vault.journal.submit(replace(spend(counter_id), issued=None))


async def test_a_key_that_only_decrypts_still_takes_what_was_sealed_before_it_was_replaced(
    database: Database, vault: Vault, merchant_id: UUID
) -> None:
    counter_id = await counters(database, merchant_id, b"a")
    await database.execute("UPDATE cde.encryption_keys SET status = 'decrypt-only'")
    assert await vault.journal.submit(spend(counter_id))


async def test_a_device_whose_key_set_was_retired_meanwhile_spends_nothing(
    database: Database, vault: Vault, merchant_id: UUID
) -> None:
    counter_id = await counters(database, merchant_id, b"a")
    await database.execute("UPDATE cde.key_sets SET status = 'retired'")
    assert not await vault.journal.submit(spend(counter_id))
    assert await count(database, "token_idempotency_keys") == 0


async def test_a_device_that_got_another_initial_key_meanwhile_spends_nothing_of_the_former(
    database: Database, vault: Vault, merchant_id: UUID
) -> None:
    former = await counters(database, merchant_id, b"a")
    other = await counters(database, merchant_id, b"b")
    await database.execute("DELETE FROM cde.devices WHERE counter_id = $1", other)
    await database.execute("UPDATE cde.devices SET counter_id = $1", other)
    assert not await vault.journal.submit(spend(former))
