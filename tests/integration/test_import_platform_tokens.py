"""The import of older platform tokens on a real PostgreSQL: bad rows, lost commits, races, keys."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, MutableMapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from glamd.credentials.importing import service, store
from glamd.credentials.importing.older import OlderKey, OlderRow
from glamd.credentials.importing.service import Importer, OlderBatch, Progress
from glamd.credentials.model import Accessor, Platform
from glamd.credentials.refresh import store as refresh
from glamd.credentials.service import PlatformTokens
from glamd.db import Database
from glamd.errors import ConflictError, UnavailableError
from glamd.keys.keyrings import DataKey, Keyring
from glamd.keys.providers.interface import Providers
from tests.support.database_proxy import DatabaseProxy
from tests.support.keys import local_provider
from tests.support.older_service import CANARY, KEY_TEXT, merchant_id, older_id, row, sealed
from tests.support.platform_vault import (
    READER,
    load_keyring,
    log_of,
    new_token,
    refreshable,
    rows_of,
)
from tests.support.postgres import execute
from tests.support.settable_clock import SettableClock

OPERATOR = Accessor(
    kind="operator", name="uid:0", ip="-", request_id="req-9", correlation_id="move-1"
)
NEWER = {"access_token": f"{CANARY}-newer", "refresh_token": f"{CANARY}-newer-refresh"}
LATER = datetime(2024, 8, 1, tzinfo=UTC)
DERIVED = functools.cache(OlderKey)
TABLES = "glam.platform_tokens, glam.token_access_log, glam.imports, glam.encryption_keys"


@pytest.fixture(scope="module")
def kek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the key-encryption key of this module's database is."""
    return tmp_path_factory.mktemp("kek")


@pytest.fixture
def provider(kek: Path) -> Providers:
    """The key provider of this module's database."""
    return local_provider(kek)


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests here, emptied before each: much cheaper than one each."""
    await execute(module_database_url, f"TRUNCATE {TABLES}")
    return module_database_url


@pytest.fixture
def clock() -> SettableClock:
    """The daemon's clock."""
    return SettableClock()


@pytest.fixture
async def keyring(
    database: Database, provider: Providers, clock: SettableClock
) -> Keyring[DataKey]:
    """The keys that tokens are sealed under now."""
    return await load_keyring(database, provider, clock)


@pytest.fixture
def vault(database: Database, keyring: Keyring[DataKey], clock: SettableClock) -> PlatformTokens:
    """The vault that the tokens are brought into."""
    return PlatformTokens(database, keyring=keyring, clock=clock)


@pytest.fixture
def importer(database: Database, keyring: Keyring[DataKey], clock: SettableClock) -> Importer:
    """An importer with the older service's key."""
    return Importer(database, keyring=keyring, key_text=KEY_TEXT, clock=clock)


@pytest.fixture(autouse=True)
def _derived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deriving a key is slow, and the same each time."""
    monkeypatch.setattr(service, "OlderKey", DERIVED)


@pytest.fixture(autouse=True)
async def logs(database: Database) -> AsyncIterator[list[MutableMapping[str, Any]]]:
    """What is logged; no secret, and no sealed one, is ever in it or in a row in the clear."""
    with capture_logs() as logs:
        yield logs
    written = json.dumps(logs, default=str)
    for table in TABLES.split(", "):
        written += str([dict(row) for row in await database.fetch(f"SELECT * FROM {table}")])
    assert CANARY not in written
    assert sealed({})[:8] not in json.dumps(logs, default=str)


async def take(importer: Importer, *rows: OlderRow, **changes: Any) -> Progress:
    """Take rows as the next batch."""
    if "after" not in changes:
        changes["after"] = (await importer.progress()).position
    return await importer.take(OlderBatch(rows=rows, **changes), accessor=OPERATOR)


async def count(database: Database, table: str = "glam.platform_tokens") -> int:
    """How many rows a table has."""
    return int(await database.fetchval(f"SELECT count(*) FROM {table}"))


def some(progress: Progress) -> dict[str, int]:
    """The counts of a batch that are not 0."""
    return {str(outcome): count for outcome, count in progress.batch.items() if count}


async def refusal(importer: Importer, *rows: OlderRow, **changes: Any) -> str:
    """The code that a batch is refused with."""
    with pytest.raises(ConflictError) as raised:
        await take(importer, *rows, **changes)
    assert CANARY not in str(raised.value)
    return raised.value.code


class TestKey:
    """Without the right key nothing begins."""

    async def test_without_a_key_the_setting_is_named(
        self, database: Database, keyring: Keyring[DataKey], clock: SettableClock
    ) -> None:
        importer = Importer(database, keyring=keyring, key_text=None, clock=clock)
        with pytest.raises(ConflictError, match=r"credentials\.import_key") as raised:
            await importer.progress()
        assert raised.value.code == "IMPORT_KEY_MISSING"
        assert await refusal(importer, row(1), after=None) == "IMPORT_KEY_MISSING"

    async def test_a_wrong_key_is_found_out_before_a_row_is_written(
        self, database: Database, keyring: Keyring[DataKey], clock: SettableClock
    ) -> None:
        importer = Importer(database, keyring=keyring, key_text="wrong", clock=clock)
        rows = [row(number) for number in range(service.DOUBT_ROWS)]
        for dry_run in (True, False):
            assert await refusal(importer, *rows, dry_run=dry_run) == "IMPORT_KEY_WRONG"
        for table in ("platform_tokens", "token_access_log", "imports"):
            assert await count(database, f"glam.{table}") == 0

    async def test_damage_after_a_row_that_opened_is_damage_and_no_wrong_key(
        self, importer: Importer
    ) -> None:
        await take(importer, row(0))
        damaged = sealed({"a": 1}, "a key that was lost long ago")
        rows = [row(n, encrypted_token=damaged) for n in range(1, service.DOUBT_ROWS + 2)]
        assert some(await take(importer, *rows)) == {"undecryptable": len(rows)}

    async def test_the_key_is_derived_once_however_many_ask(
        self, importer: Importer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        derived: list[str] = []

        def derive(text: str) -> OlderKey:
            derived.append(text)
            return OlderKey(text)

        monkeypatch.setattr(service, "OlderKey", derive)
        await asyncio.gather(*(importer.progress() for _ in range(5)))
        assert derived == [KEY_TEXT]


class TestBadRows:
    """They are counted and named, and stop nothing."""

    async def test_each_is_named_by_its_id_and_what_is_wrong_and_the_others_are_taken(
        self, importer: Importer, database: Database, vault: PlatformTokens
    ) -> None:
        rows = [
            row(1),
            row(2, platform_name="etsy", domain=f"{CANARY}/"),
            row(3, encrypted_token=sealed({"a": CANARY}, "another key")),
            row(4, encrypted_token=CANARY),
            row(5, encrypted_token=sealed([CANARY])),
            row(6, merchant_id=CANARY),
            {"id": None},
            {},
            row(7, id=f"{CANARY}\x00"),
            row(8),
        ]
        came_to = await take(importer, *rows)
        assert some(came_to) == {"taken": 2, "undecryptable": 3, "invalid": 5}
        named = [(one.id, one.code, [f.field for f in one.fields]) for one in came_to.refused]
        assert named[:5] == [
            (str(older_id(2)), "VALIDATION_ERROR", ["platform_name", "domain"]),
            (str(older_id(3)), "OLDER_TOKEN_UNDECRYPTABLE", ["encrypted_token"]),
            (str(older_id(4)), "OLDER_TOKEN_MALFORMED", ["encrypted_token"]),
            (str(older_id(5)), "OLDER_TOKEN_NO_OBJECT", ["encrypted_token"]),
            (str(older_id(6)), "VALIDATION_ERROR", ["merchant_id"]),
        ]
        assert [one.id for one in came_to.refused[5:]] == ["", "", ""]
        assert CANARY not in repr(came_to)
        assert came_to.position == str(older_id(8))
        assert await count(database) == 2

    async def test_a_refused_row_is_in_the_access_log_with_its_code(
        self, importer: Importer, database: Database
    ) -> None:
        await take(
            importer,
            row(1),
            row(2, encrypted_token=CANARY),
            row(3, platform_name="etsy"),
            row(4, merchant_id="nobody"),
        )
        assert await log_of(database, merchant_id(1)) == [
            ("import", "shopify", "uid:0", True, None)
        ]
        assert await log_of(database, merchant_id(2)) == [
            ("import", "shopify", "uid:0", False, "OLDER_TOKEN_MALFORMED")
        ]
        assert await log_of(database, merchant_id(3)) == [
            ("import", None, "uid:0", False, "VALIDATION_ERROR")
        ]
        assert await count(database, "glam.token_access_log") == 3

    async def test_an_id_that_another_merchants_token_has_is_refused(
        self, importer: Importer, database: Database
    ) -> None:
        await take(importer, row(1))
        came_to = await take(importer, row(2, id=str(older_id(1))))
        assert some(came_to) == {"invalid": 1}
        assert came_to.refused[0].code == "OLDER_TOKEN_ID_TAKEN"
        assert await count(database) == 1
        assert not await rows_of(database, merchant_id(2))

    async def test_a_batch_of_nothing_but_bad_rows_moves_the_import_on(
        self, importer: Importer
    ) -> None:
        came_to = await take(importer, row(1, token_type="Bearer"))
        assert came_to.position == str(older_id(1))
        assert (await importer.progress()).position == str(older_id(1))


class TestNewerThings:
    """What was done here since the older service wrote its row is not undone."""

    async def test_a_token_that_was_stored_here_stays(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        stored = await vault.store(new_token(merchant_id(1)), accessor=READER)
        came_to = await take(importer, row(1), row(2))
        assert some(came_to) == {"taken": 1, "superseded": 1}
        assert (await vault.connection(merchant_id(1), "shopify")).token_id == stored

    async def test_an_imported_token_that_was_replaced_here_stays_replaced(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        await take(importer, row(1))
        await vault.store(new_token(merchant_id(1), domain="new.example"), accessor=READER)
        for again in (row(1), replaced(1)):
            came_to = await take(importer, again, after=None, restart=True)
            assert some(came_to) == {"superseded": 1}
        assert (await vault.connection(merchant_id(1), "shopify")).domain == "new.example"

    async def test_a_token_that_was_deleted_here_does_not_come_back(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        await take(importer, row(1))
        await vault.delete(merchant_id(1), "shopify", accessor=READER)
        again = await take(importer, row(1), after=None, restart=True)
        assert some(again) == {"superseded": 1}
        assert await vault.connections(merchant_id=merchant_id(1)) == ()

    async def test_a_token_that_the_older_service_got_after_a_deletion_here_is_taken(
        self, importer: Importer, vault: PlatformTokens, clock: SettableClock
    ) -> None:
        clock.set(datetime(2024, 6, 1, 9, tzinfo=UTC))
        await vault.delete(merchant_id(1), "shopify", accessor=READER)
        clock.set(datetime(2024, 6, 2, tzinfo=UTC))
        assert some(await take(importer, row(1))) == {"taken": 1}

    async def test_a_deletion_of_another_platforms_token_is_none_of_this_one(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        await vault.delete(merchant_id(1), "magento", accessor=READER)
        assert some(await take(importer, row(1))) == {"taken": 1}

    async def test_of_two_rows_for_one_token_the_newer_is_kept_wherever_it_stands(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        assert some(await take(importer, row(1), replaced(1))) == {"taken": 1, "already": 1}
        assert some(await take(importer, replaced(2))) == {"taken": 1}
        assert some(await take(importer, row(2))) == {"already": 1}
        for number in (1, 2):
            assert await secret_of(vault, number) == NEWER

    async def test_of_two_rows_for_one_token_in_a_batch_the_first_is_taken(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        same_place = row(2, merchant_id=str(merchant_id(1)))
        came_to = await take(importer, row(1), row(1), same_place)
        assert some(came_to) == {"taken": 1, "already": 1, "superseded": 1}
        assert (await vault.connection(merchant_id(1), "shopify")).token_id == older_id(1)

    async def test_a_token_that_is_stored_in_the_very_moment_stays(
        self, importer: Importer, vault: PlatformTokens, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add = store.add

        async def late(*args: Any, **kwargs: Any) -> Any:
            await vault.store(new_token(merchant_id(1)), accessor=READER)
            return await add(*args, **kwargs)

        monkeypatch.setattr(store, "add", late)
        assert some(await take(importer, row(1), row(2))) == {"taken": 1, "superseded": 1}
        assert (await vault.connection(merchant_id(1), "shopify")).token_id != older_id(1)


class TestReplacedThere:
    """What the older service replaced after its row was imported, while it still ran."""

    async def test_a_token_that_nobody_touched_here_gets_the_newer_secret(
        self, importer: Importer, vault: PlatformTokens, database: Database
    ) -> None:
        await take(importer, row(1), row(2))
        first = await vault.connection(merchant_id(1), "shopify")
        await vault.read(merchant_id(1), platform=None, accessor=READER)
        changed = replaced(1, domain="moved.example", scopes="read_orders", expires_at=None)
        again = await take(importer, changed, row(2), after=None, restart=True)
        assert some(again) == {"updated": 1, "already": 1}
        assert await secret_of(vault, 1) == NEWER
        found = await vault.connection(merchant_id(1), "shopify")
        assert (found.token_id, found.generation) == (older_id(1), first.generation + 1)
        assert (found.domain, found.scopes) == ("moved.example", ("read_orders",))
        assert (found.expires_at, found.updated_at) == (None, LATER)
        assert found.access_count == first.access_count + 2
        imports = [one for one in await log_of(database, merchant_id(1)) if one[0] == "import"]
        assert imports == [("import", "shopify", "uid:0", True, None)] * 2

    async def test_it_may_be_replaced_there_more_than_once(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        for day in (1, 2, 3):
            secret = {"access_token": f"{CANARY}-day-{day}"}
            again = row(1, updated_at=f"2024-08-0{day}", encrypted_token=sealed(secret))
            came_to = await take(importer, again, after=None, restart=True)
            assert some(came_to) == ({"taken": 1} if day == 1 else {"updated": 1})
            assert await secret_of(vault, 1) == secret

    async def test_a_row_that_was_deleted_there_and_made_anew_has_its_new_id_here_too(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        await take(importer, row(1))
        anew = replaced(1, id=str(older_id(99)))
        assert some(await take(importer, anew, after=None, restart=True)) == {"updated": 1}
        assert (await vault.connection(merchant_id(1), "shopify")).token_id == older_id(99)
        assert await secret_of(vault, 1) == NEWER

    async def test_an_older_state_of_the_row_brings_nothing_back(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        await take(importer, replaced(1))
        assert some(await take(importer, row(1), after=None, restart=True)) == {"already": 1}
        anew = row(1, id=str(older_id(99)))
        assert some(await take(importer, anew, after=None, restart=True)) == {"superseded": 1}
        assert await secret_of(vault, 1) == NEWER

    async def test_a_token_that_was_renewed_here_meanwhile_stays(
        self, importer: Importer, vault: PlatformTokens, database: Database, clock: SettableClock
    ) -> None:
        await take(importer, row(1), hold_renewal=timedelta(0))
        (claimed,) = await claim(database, clock)
        renewed = refresh.Sealed(
            ciphertext=claimed.ciphertext,
            key_version=claimed.connection.key_version,
            expires_at=clock.now() + timedelta(hours=1),
            scopes=None,
            not_before=None,
        )
        await refresh.commit(database, claimed, renewed, at=clock.now(), accessor=OPERATOR)
        came_to = await take(importer, replaced(1), after=None, restart=True)
        assert some(came_to) == {"superseded": 1}
        assert await secret_of(vault, 1) != NEWER

    async def test_a_renewal_under_way_with_the_former_secret_comes_too_late(
        self, importer: Importer, vault: PlatformTokens, database: Database, clock: SettableClock
    ) -> None:
        await take(importer, row(1), hold_renewal=timedelta(0))
        (claimed,) = await claim(database, clock)
        again = await take(importer, replaced(1), after=None, restart=True)
        assert some(again) == {"updated": 1}
        renewed = refresh.Sealed(
            ciphertext=b"-", key_version="v1", expires_at=LATER, scopes=None, not_before=None
        )
        kept = await refresh.commit(database, claimed, renewed, at=clock.now(), accessor=OPERATOR)
        assert kept == "superseded"
        assert await secret_of(vault, 1) == NEWER

    async def test_a_token_that_is_stored_here_in_the_very_moment_stays(
        self, importer: Importer, vault: PlatformTokens, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await take(importer, row(1), row(2))
        lock = store.lock

        async def late(*args: Any) -> None:
            await vault.store(new_token(merchant_id(1)), accessor=READER)
            await lock(*args)

        monkeypatch.setattr(store, "lock", late)
        again = await take(importer, replaced(1), replaced(2), after=None, restart=True)
        assert some(again) == {"updated": 1, "superseded": 1}
        assert await secret_of(vault, 1) != NEWER
        assert await secret_of(vault, 2) == NEWER

    async def test_a_token_that_is_stored_here_a_moment_later_is_the_one_that_stays(
        self, importer: Importer, vault: PlatformTokens, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await take(importer, row(1))
        change = store.change
        storing: list[asyncio.Task[object]] = []

        async def early(*args: Any, **kwargs: Any) -> Any:
            stored = vault.store(new_token(merchant_id(1), domain="new.example"), accessor=READER)
            storing.append(asyncio.create_task(stored))
            return await change(*args, **kwargs)

        monkeypatch.setattr(store, "change", early)
        again = await take(importer, replaced(1), after=None, restart=True)
        assert some(again) == {"updated": 1}
        await storing[0]
        assert (await vault.connection(merchant_id(1), "shopify")).domain == "new.example"

    async def test_readers_and_an_import_of_all_that_they_read_never_block_each_other_for_good(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        platforms: tuple[Platform, ...] = ("custom", "magento", "shopify", "woocommerce")
        same = {"merchant_id": str(merchant_id(1))}
        first = [row(n, platform_name=name, **same) for n, name in enumerate(platforms)]
        await take(importer, *first)
        for _ in range(5):
            again = [
                replaced(n, platform_name=name, **same) if n % 2 else row(n, **first[n])
                for n, name in enumerate(platforms)
            ]
            batch = OlderBatch(rows=again[::-1], after=None, restart=True)
            await asyncio.gather(
                importer.take(batch, accessor=OPERATOR),
                *(vault.read(merchant_id(1), platform=None, accessor=READER) for _ in range(8)),
            )

    async def test_a_dry_run_says_it_and_changes_nothing(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        await take(importer, row(1))
        tried = await take(importer, replaced(1), restart=True, dry_run=True)
        assert some(tried) == {"updated": 1}
        assert await secret_of(vault, 1) != NEWER


class TestRenewal:
    """The older service still uses what was imported: its refresh tokens must not be used up."""

    async def test_a_token_that_was_imported_is_not_renewed_for_as_long_as_it_is_held(
        self, importer: Importer, vault: PlatformTokens, database: Database, clock: SettableClock
    ) -> None:
        await take(importer, row(1, expires_at="2025-11-12T10:00:00Z"), row(2, token_type="bearer"))
        held = await vault.connection(merchant_id(1), "shopify")
        assert held.refresh_not_before == clock.now() + timedelta(hours=24)
        assert (await vault.connection(merchant_id(2), "shopify")).refresh_not_before is None
        assert await claim(database, clock) == ()
        clock.advance(24 * 3600 - 1)
        assert await claim(database, clock) == ()
        clock.advance(1)
        assert len(await claim(database, clock)) == 1

    async def test_the_run_after_the_cut_over_lets_renewals_begin(
        self, importer: Importer, vault: PlatformTokens, database: Database, clock: SettableClock
    ) -> None:
        await take(importer, row(1), row(2), row(3))
        rows = (row(1), replaced(2), row(3), row(4))
        await database.execute(
            "UPDATE glam.platform_tokens SET refresh_failures = 1, refresh_error = 'TIMEOUT'"
            " WHERE merchant_id = $1",
            merchant_id(3),
        )
        again = await take(importer, *rows, after=None, restart=True, hold_renewal=timedelta(0))
        assert some(again) == {"already": 2, "updated": 1, "taken": 1}
        for number, is_held in ((1, False), (2, False), (3, True), (4, False)):
            found = await vault.connection(merchant_id(number), "shopify")
            assert (found.refresh_not_before is not None) is is_held, number

    async def test_a_token_that_was_changed_here_is_not_held(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        await take(importer, row(1))
        await vault.store(refreshable(merchant_id(1)), accessor=READER)
        await take(importer, row(1), after=None, restart=True)
        assert (await vault.connection(merchant_id(1), "shopify")).refresh_not_before is None

    def test_a_hold_is_never_so_long_that_it_is_taken_for_a_clock_that_went_wrong(self) -> None:
        assert timedelta(hours=service.HOLD_LIMIT_H) < refresh.BACK_OFF_MAX


class TestSources:
    """A position in one source is none in another."""

    async def test_a_batch_of_another_source_does_not_go_on_from_there(
        self, importer: Importer, database: Database
    ) -> None:
        assert (await importer.progress()).source is None
        assert (await take(importer, row(1), source="file:a")).source == "file:a"
        assert await refusal(importer, row(2), source="file:b") == "IMPORT_MOVED"
        assert await count(database) == 1
        await take(importer, row(2), source="file:a")
        again = await take(importer, row(3), source="file:b", after=None, restart=True)
        assert (again.source, dict(again.counts)["taken"]) == ("file:b", 1)
        assert await refusal(importer, row(4), source="file:a") == "IMPORT_MOVED"

    async def test_two_sources_without_a_position_are_two_all_the_same(
        self, importer: Importer
    ) -> None:
        assert (await take(importer, {"id": None}, source="file:a")).position is None
        assert await refusal(importer, row(1), source="file:b") == "IMPORT_MOVED"


class TestBreakingOff:
    """Whatever ends a batch, all of it is there or nothing, and the next one goes on."""

    @pytest.mark.parametrize("lost", ["question", "answer"])
    async def test_a_connection_that_breaks_anywhere_costs_nothing_but_a_repetition(
        self,
        database: Database,
        keyring: Keyring[DataKey],
        clock: SettableClock,
        importer: Importer,
        lost: str,
    ) -> None:
        broke, half_known, message = True, 0, 0
        while broke:
            message += 1
            rows = (row(message), row(1000 + message, domain="x"))
            before = await importer.progress()
            async with DatabaseProxy(await url_of(database)) as proxy:
                through = await Database.connect(proxy.url, pool_size=1)
                fragile = Importer(through, keyring=keyring, key_text=KEY_TEXT, clock=clock)
                setattr(proxy, f"lose_{lost}", message)
                batch = OlderBatch(rows=rows, after=before.position)
                try:
                    await fragile.take(batch, accessor=OPERATOR)
                    broke = False
                except UnavailableError:
                    broke = True
                await through.close()
            after = await importer.progress()
            assert after.position in (before.position, str(older_id(1000 + message)))
            if after.position == before.position:
                assert broke
                assert after.counts == before.counts
                await take(importer, *rows)
            else:
                half_known += broke
            assert await count(database) == message
            assert await count(database, "glam.token_access_log") == 2 * message
            counts = (await importer.progress()).counts
            assert (counts["taken"], counts["invalid"]) == (message, message)
        # Only the answer to the commit, when it is lost, leaves a batch taken and nobody told.
        assert half_known == (1 if lost == "answer" else 0)
        assert message > 10

    async def test_a_batch_that_is_sent_again_after_it_was_committed_is_refused(
        self, importer: Importer, database: Database
    ) -> None:
        await take(importer, row(1), after=None)
        assert await refusal(importer, row(1), after=None) == "IMPORT_MOVED"
        assert (await importer.progress()).counts["taken"] == 1
        assert await count(database, "glam.token_access_log") == 1

    async def test_of_two_imports_at_once_one_goes_on(
        self,
        importer: Importer,
        database: Database,
        keyring: Keyring[DataKey],
        clock: SettableClock,
    ) -> None:
        other = Importer(database, keyring=keyring, key_text=KEY_TEXT, clock=clock)
        await other.progress()
        rows = [row(number) for number in range(50)]
        results = await asyncio.gather(
            *(take(one, *rows, after=None) for one in (importer, other, importer, other)),
            return_exceptions=True,
        )
        assert sum(isinstance(result, Progress) for result in results) == 1
        codes = {result.code for result in results if isinstance(result, ConflictError)}
        assert codes == {"IMPORT_MOVED"}
        assert await count(database) == 50
        assert await count(database, "glam.token_access_log") == 50

    async def test_a_restart_goes_through_all_again_and_counts_anew(
        self, importer: Importer, database: Database
    ) -> None:
        await take(importer, row(1), row(2), row(3, domain="x"))
        again = await take(importer, row(1), row(2), row(4), after=None, restart=True)
        assert some(again) == {"taken": 1, "already": 2}
        assert dict(again.counts) == dict(again.batch)
        assert await count(database) == 3

    async def test_a_dry_run_says_what_would_be_and_leaves_no_trace(
        self, importer: Importer, database: Database, vault: PlatformTokens
    ) -> None:
        await vault.store(new_token(merchant_id(2)), accessor=READER)
        rows = (row(1), row(2), row(3, domain="x"), row(4, encrypted_token="x"))
        tried = await take(importer, *rows, dry_run=True, after="anything")
        assert some(tried) == {"taken": 1, "superseded": 1, "invalid": 1, "undecryptable": 1}
        assert (tried.position, sum(tried.counts.values())) == (None, 0)
        assert await count(database) == 1
        assert await count(database, "glam.token_access_log") == 1
        assert await count(database, "glam.imports") == 0


class TestTaken:
    """What was taken is what the older service had."""

    async def test_a_token_has_its_id_its_times_its_counters_and_opens(
        self, importer: Importer, vault: PlatformTokens, keyring: Keyring[DataKey]
    ) -> None:
        assert some(await take(importer, row(7), row(8, scopes=None, expires_at=None))) == {
            "taken": 2
        }
        found = await vault.connection(merchant_id(7), "shopify")
        assert found.token_id == older_id(7)
        assert (found.platform_shop_id, found.domain) == ("10007", "shop-7.myshopify.com")
        assert found.scopes == ("read_products", "write_orders")
        assert found.key_version == keyring.active.version
        assert found.refreshable
        assert found.expires_at == datetime(2030, 1, 1, 12, 0, 0, 123_000, tzinfo=UTC)
        assert found.created_at == datetime(2024, 5, 1, 8, tzinfo=UTC)
        assert found.updated_at == datetime(2024, 6, 1, 9, 30, tzinfo=UTC)
        assert found.last_accessed_at == datetime(2024, 7, 1, 10, tzinfo=UTC)
        assert (found.last_accessed_by, found.access_count) == ("catalog-service", 7)
        reading = await vault.read(merchant_id(7), platform=None, accessor=READER)
        assert reading.tokens[0].secret.data == {
            "access_token": f"{CANARY}-7",
            "refresh_token": f"{CANARY}-refresh-7",
        }
        plain = await vault.connection(merchant_id(8), "shopify")
        assert (plain.scopes, plain.expires_at) == ((), None)

    async def test_the_first_and_the_last_times_of_the_calendar_can_be_kept(
        self, importer: Importer, vault: PlatformTokens
    ) -> None:
        never = row(1, expires_at="9999-12-31T23:59:59.999999", created_at="0001-01-01T00:00:00")
        assert some(await take(importer, never)) == {"taken": 1}
        found = await vault.connection(merchant_id(1), "shopify")
        assert found.expires_at is not None
        assert found.expires_at.year == 9999

    async def test_the_progress_is_that_of_all_batches(self, importer: Importer) -> None:
        for number in range(5):
            await take(importer, row(number), row(100 + number, domain="x"))
        now_at = await importer.progress()
        assert now_at.position == str(older_id(104))
        assert (now_at.counts["taken"], now_at.counts["invalid"]) == (5, 5)

    async def test_a_whole_batch_is_taken_while_the_loop_goes_on(
        self, importer: Importer, database: Database
    ) -> None:
        rows = [row(number) for number in range(service.BATCH_LIMIT)]
        assert some(await take(importer, *rows)) == {"taken": service.BATCH_LIMIT}
        ids = {
            row["token_id"] for row in await database.fetch("SELECT * FROM glam.platform_tokens")
        }
        assert ids == {older_id(number) for number in range(service.BATCH_LIMIT)}


def replaced(number: int, **changes: Any) -> dict[str, Any]:
    """The older row after the merchant connected its shop there again."""
    usual = {"updated_at": "2024-08-01T00:00:00", "encrypted_token": sealed(NEWER)}
    return row(number, **(usual | changes))


async def secret_of(vault: PlatformTokens, number: int) -> object:
    """What opens the shop of the row with this number."""
    reading = await vault.read(merchant_id(number), platform="shopify", accessor=READER)
    (token,) = reading.tokens
    return token.secret.data


async def claim(database: Database, clock: SettableClock) -> tuple[refresh.Claimed, ...]:
    """What a node would renew by now, were a token due ten years before it expires."""
    due = refresh.Due(
        platform="shopify",
        now=clock.now(),
        before=timedelta(days=3650),
        assumed_lifetime=timedelta(hours=1),
    )
    return await refresh.claim_due(database, due, limit=9, takes_over=False, monotonic_s=0.0)


async def url_of(database: Database) -> str:
    """The URL that a database was connected with, for a way around it."""
    connector: Any = database._connector
    return str(connector._url)
