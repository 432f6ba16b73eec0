"""The life of a key's versions on a real database: races, refusals, cryptoperiods, the audit."""

import asyncio
from collections.abc import Awaitable
from datetime import timedelta

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from glamd.db import Database
from glamd.errors import ConflictError, CryptoError, GlamError, NotFoundError, UnavailableError
from glamd.keys.keyrings import (
    AUDIT,
    FINGERPRINTS,
    PAYMENT_TOKENS,
    DataKey,
    Keyring,
    KeyringWatch,
)
from glamd.keys.providers.interface import Providers
from glamd.keys.store import NewKey
from tests.support.postgres import eventually
from tests.support.sealed_rows import Node, read_token, seal_tokens, start_node, versions_of
from tests.support.settable_clock import SettableClock

YEAR = timedelta(days=365)


@pytest.fixture
def clock() -> SettableClock:
    """A clock that stands."""
    return SettableClock()


@pytest.fixture
async def node(database: Database, providers: Providers, clock: SettableClock) -> Node:
    """A node that is not started to work by itself."""
    return await start_node(database, providers, clock=clock)


async def statuses(database: Database, keyring: str = PAYMENT_TOKENS) -> dict[str, str]:
    """The status of each version."""
    rows = await database.fetch(
        "SELECT version, status FROM cde.encryption_keys WHERE keyring = $1", keyring
    )
    return {row["version"]: row["status"] for row in rows}


async def refusal(work: Awaitable[object]) -> GlamError:
    """What a step is refused with."""
    with pytest.raises(GlamError) as caught:
        await work
    return caught.value


# ---- rotate


async def test_two_operators_who_rotate_at_once_make_one_version(
    database: Database, providers: Providers, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [node, *[await start_node(database, providers) for _ in range(2)]]
    # All of them have seen what is there before any of them has done anything.
    met = asyncio.Barrier(len(nodes))
    make = Keyring.make

    async def make_together(self: Keyring[DataKey], version: str) -> NewKey:
        await met.wait()
        return await make(self, version)

    monkeypatch.setattr(Keyring, "make", make_together)
    results = await asyncio.gather(
        *(one.life.rotate(PAYMENT_TOKENS, actor=f"op{n}") for n, one in enumerate(nodes)),
        return_exceptions=True,
    )
    refused = [result for result in results if isinstance(result, ConflictError)]
    assert [error.code for error in refused] == ["KEY_ROTATED_MEANWHILE"] * 2
    assert await statuses(database) == {"v1": "decrypt-only", "v2": "active"}
    written = sorted(entry[3] for one in nodes for entry in one.written)
    assert written == ["KEY_ROTATED_MEANWHILE"] * 2 + ["ok"]


async def test_a_rotation_that_cannot_be_written_down_does_not_happen(
    database: Database, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_args: object, **_named: object) -> None:
        raise UnavailableError("the audit is away")

    monkeypatch.setattr(node.life._operations, "write_down", fails)
    with pytest.raises(UnavailableError):
        await node.life.rotate(PAYMENT_TOKENS, actor="op")
    assert await statuses(database) == {"v1": "active"}
    assert await database.fetchval("SELECT count(*) FROM cde.reencryptions") == 0


async def test_the_fingerprint_key_is_never_rotated_and_the_refusal_says_why(node: Node) -> None:
    with pytest.raises(ConflictError, match="another fingerprint") as caught:
        await node.life.rotate(FINGERPRINTS, actor="op")
    assert caught.value.fields[0].field == "keyring"
    assert node.written == [("keys.rotate", FINGERPRINTS, "op", "KEYRING_NEVER_ROTATES")]


async def test_the_new_version_is_active_at_once_here_and_soon_elsewhere(
    database: Database, providers: Providers, node: Node
) -> None:
    other = await start_node(database, providers)
    watch = KeyringWatch(other.keyrings.all(), interval_s=0.01)
    task = asyncio.create_task(watch.run())
    made = await node.life.rotate(PAYMENT_TOKENS, actor="op")
    assert (made.version, made.status, made.provider) == ("v2", "active", "local")
    assert node.keyrings.payment_tokens.active.version == "v2"
    assert node.keyrings.payment_tokens.active.kcv == made.kcv

    async def is_known() -> bool:
        return other.keyrings.payment_tokens.active.version == "v2"

    await eventually(is_known)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    labels = {"keyring": PAYMENT_TOKENS, "status": "decrypt-only"}
    assert REGISTRY.get_sample_value("glamd_keys_versions_count", labels) == 1


async def test_a_watch_survives_a_keyring_that_cannot_be_read(
    database: Database, node: Node
) -> None:
    await database.execute("UPDATE cde.encryption_keys SET kcv = '000000' WHERE keyring = 'audit'")
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    await database.execute(
        "UPDATE cde.encryption_keys SET status = 'retired' WHERE keyring = 'fingerprints'"
    )
    before = node.keyrings.fingerprints.active
    with capture_logs() as logs:
        await KeyringWatch(node.keyrings.all(), interval_s=1.0).look()
    assert [entry["keyring"] for entry in logs] == [FINGERPRINTS]
    assert node.keyrings.fingerprints.active is before


async def test_the_audit_key_rotates_and_nothing_is_re_encrypted(
    database: Database, node: Node
) -> None:
    before = node.keyrings.audit.active
    await node.life.rotate(AUDIT, actor="op")
    assert node.keyrings.audit.active.version == "v2"
    assert await node.keyrings.audit.version("v1") is before
    assert await database.fetchval("SELECT count(*) FROM cde.reencryptions") == 0
    error = await refusal(node.life.retire(AUDIT, "v1", actor="op"))
    assert error.code == "KEY_IN_USE"
    assert (await node.life.status())[AUDIT].remaining == 0


# ---- retire


async def test_retire_is_refused_while_a_row_needs_it_and_starts_the_re_encryption_again(
    database: Database, node: Node
) -> None:
    key = node.keyrings.payment_tokens.active
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    await node.job.work()
    await seal_tokens(database, key, 3)
    with pytest.raises(ConflictError, match="v1 is needed by 3 rows") as caught:
        await node.life.retire(PAYMENT_TOKENS, "v1", actor="op")
    assert caught.value.code == "KEY_IN_USE"
    assert node.written[-1] == ("keys.retire", "payment-tokens:v1", "op", "KEY_IN_USE")
    assert (await statuses(database))["v1"] == "decrypt-only"
    await node.job.work()
    assert await versions_of(database) == {"v2": 3}
    retired = await node.life.retire(PAYMENT_TOKENS, "v1", actor="op")
    assert (retired.status, retired.retired_at) == ("retired", node.life._clock.now())
    assert node.written[-1] == ("keys.retire", "payment-tokens:v1", "op", "ok")


async def test_retire_waits_for_whoever_is_sealing_with_it_and_then_sees_the_row(
    database: Database, node: Node
) -> None:
    key = node.keyrings.payment_tokens.active
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    async with database.transaction() as writer:
        # As the commit of tokens does, on a node that did not know of the rotation.
        await writer.execute(
            "SELECT FROM cde.encryption_keys WHERE keyring = 'payment-tokens' AND version = 'v1'"
            " FOR KEY SHARE"
        )
        retiring = asyncio.create_task(node.life.retire(PAYMENT_TOKENS, "v1", actor="op"))
        await eventually(
            lambda: database.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            )
        )
        await writer.execute(
            "INSERT INTO cde.token_secrets (token, expires_at, card_ciphertext, key_version)"
            " VALUES ('ptk_late', '2040-01-01', '', $1)",
            key.version,
        )
    error = await refusal(retiring)
    assert error.code == "KEY_IN_USE"
    assert (await statuses(database))["v1"] == "decrypt-only"


async def test_damaged_rows_keep_their_version_from_being_retired(
    database: Database, node: Node
) -> None:
    await seal_tokens(database, node.keyrings.payment_tokens.active, 2)
    await database.execute("UPDATE cde.token_secrets SET card_ciphertext = 'damaged'")
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    await node.job.work()
    for _ in range(2):
        error = await refusal(node.life.retire(PAYMENT_TOKENS, "v1", actor="op"))
        assert error.code == "KEY_IN_USE"
        await node.job.work()


@pytest.mark.parametrize("step", ["retire", "destroy"])
async def test_what_cannot_be_retired_or_destroyed_is_refused_by_its_field(
    node: Node, step: str
) -> None:
    take = getattr(node.life, step)
    unknown = await refusal(take("payment", "v1", actor="op"))
    assert isinstance(unknown, NotFoundError)
    assert (unknown.code, unknown.fields[0].field) == ("KEYRING_NOT_FOUND", "keyring")
    missing = await refusal(take(PAYMENT_TOKENS, "v7", actor="op"))
    assert isinstance(missing, NotFoundError)
    assert (missing.code, missing.fields[0].field) == ("KEY_VERSION_NOT_FOUND", "version")
    active = await refusal(take(PAYMENT_TOKENS, "v1", actor="op"))
    assert (active.code, active.fields[0].field) == ("KEY_STATUS", "version")
    assert [entry[1:] for entry in node.written] == [
        ("unknown:v1", "op", "KEYRING_NOT_FOUND"),
        ("payment-tokens:v7", "op", "KEY_VERSION_NOT_FOUND"),
        ("payment-tokens:v1", "op", "KEY_STATUS"),
    ]


async def test_what_somebody_typed_is_not_written_into_the_audit_log(node: Node) -> None:
    await refusal(node.life.retire("a" * 5000, "; DROP TABLE", actor="op"))
    assert node.written == [("keys.retire", "unknown:unknown", "op", "KEYRING_NOT_FOUND")]


# ---- destroy


async def test_destroy_wants_a_retired_version_and_erases_its_key(
    database: Database, providers: Providers, node: Node
) -> None:
    other = await start_node(database, providers)
    names = await seal_tokens(database, node.keyrings.payment_tokens.active, 20)
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    await node.job.work()
    error = await refusal(node.life.destroy(PAYMENT_TOKENS, "v1", actor="op"))
    assert error.code == "KEY_STATUS"
    await node.life.retire(PAYMENT_TOKENS, "v1", actor="op")
    destroyed = await node.life.destroy(PAYMENT_TOKENS, "v1", actor="op")
    assert (destroyed.status, destroyed.wrapped_key) == ("destroyed", None)
    with pytest.raises(CryptoError, match="v1 of the key payment-tokens is destroyed"):
        await node.keyrings.payment_tokens.version("v1")
    await KeyringWatch(other.keyrings.all(), interval_s=1.0).look()
    assert other.keyrings.payment_tokens.kcvs.keys() == {"v2"}
    for name in names:
        assert await read_token(other, name)
    again = await refusal(node.life.destroy(PAYMENT_TOKENS, "v1", actor="op"))
    assert again.code == "KEY_STATUS"


async def test_destroy_looks_again_whether_a_row_needs_it(database: Database, node: Node) -> None:
    key = node.keyrings.payment_tokens.active
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    await node.life.retire(PAYMENT_TOKENS, "v1", actor="op")
    # From a backup, say, that somebody has put back in part.
    await seal_tokens(database, key, 1)
    error = await refusal(node.life.destroy(PAYMENT_TOKENS, "v1", actor="op"))
    assert error.code == "KEY_IN_USE"
    assert (await statuses(database))["v1"] == "retired"


async def test_the_name_of_a_destroyed_version_does_not_come_back(
    database: Database, node: Node
) -> None:
    for expected in ("v2", "v3", "v4"):
        made = await node.life.rotate(PAYMENT_TOKENS, actor="op")
        assert made.version == expected
    await node.life.retire(PAYMENT_TOKENS, "v2", actor="op")
    await node.life.destroy(PAYMENT_TOKENS, "v2", actor="op")
    await node.life.rotate(PAYMENT_TOKENS, actor="op")
    assert await statuses(database) == {
        "v1": "decrypt-only",
        "v2": "destroyed",
        "v3": "decrypt-only",
        "v4": "decrypt-only",
        "v5": "active",
    }


# ---- cryptoperiods


async def test_past_its_cryptoperiod_a_keyring_is_warned_of_and_left_alone(
    database: Database, node: Node, clock: SettableClock
) -> None:
    clock.advance(YEAR.total_seconds() - 1)
    with capture_logs() as logs:
        await node.life.check_periods()
    assert logs == []
    clock.advance(1)
    with capture_logs() as logs:
        await node.life.check_periods()
        await node.life.check_periods()
    assert [(entry["event"], entry["keyring"]) for entry in logs] == [
        ("key_cryptoperiod_over", PAYMENT_TOKENS),
        ("key_cryptoperiod_over", AUDIT),
    ]
    over = REGISTRY.get_sample_value("glamd_keys_cryptoperiod_over", {"keyring": PAYMENT_TOKENS})
    assert over == 1.0
    status = (await node.life.status())[PAYMENT_TOKENS]
    assert status.cryptoperiod_ends_at == clock.now()
    assert "past its cryptoperiod" in status.warnings[0]
    assert await statuses(database) == {"v1": "active"}
    assert (await node.life.status())[FINGERPRINTS].cryptoperiod_ends_at is None


async def test_past_its_cryptoperiod_a_keyring_is_rotated_once_by_several_nodes(
    database: Database, providers: Providers, clock: SettableClock
) -> None:
    nodes = [
        await start_node(database, providers, clock=clock, rotate_automatically=True)
        for _ in range(3)
    ]
    clock.advance(YEAR.total_seconds())
    await asyncio.gather(*(node.life.check_periods() for node in nodes))
    for node in nodes:
        await node.life.check_periods()
    assert await statuses(database) == {"v1": "decrypt-only", "v2": "active"}
    assert await statuses(database, AUDIT) == {"v1": "decrypt-only", "v2": "active"}
    assert await statuses(database, FINGERPRINTS) == {"v1": "active"}
    done = [entry for node in nodes for entry in node.written if entry[3] == "ok"]
    assert sorted(done) == [
        ("keys.rotate", "audit:v2", "glamd", "ok"),
        ("keys.rotate", "payment-tokens:v2", "glamd", "ok"),
    ]
