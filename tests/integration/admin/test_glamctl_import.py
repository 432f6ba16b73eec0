"""`glamctl credentials import`: a real older table, a daemon's socket, runs that break off."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from click.testing import Result

import glamd.logs
from glamd.credentials.importing.service import Importer
from glamd.credentials.service import PlatformTokens
from glamd.db import Database
from tests.support.admin_world import AdminWorld
from tests.support.at_terminal import at_terminal
from tests.support.import_site import LONG_S, Gate, Site, fill
from tests.support.keys import local_provider
from tests.support.older_service import (
    CANARY,
    KEY_TEXT,
    TABLE,
    merchant_id,
    older_id,
    row,
    sealed,
)
from tests.support.platform_vault import READER, load_keyring, new_token
from tests.support.postgres import PostgresServer, eventually, execute

TABLES = "glam.platform_tokens, glam.token_access_log, glam.imports, glam.encryption_keys"
MANY = 2_000
AT = "SELECT nullif(counts->>'taken', '700') FROM glam.imports"


@pytest.fixture(scope="module")
def older_server(postgres_server: PostgresServer) -> Iterator[str]:
    """The older service's database."""
    url = postgres_server.create_database(migrated=False)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="module")
def kek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the key-encryption key of this module's database is."""
    return tmp_path_factory.mktemp("kek")


@pytest.fixture
async def site(
    admin: AdminWorld,
    older_server: str,
    module_database_url: str,
    kek: Path,
    logs: list[MutableMapping[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Site]:
    """All of it, empty and running; at the end no secret is in what was logged."""
    # A command in this process must not turn this process's logging round.
    monkeypatch.setattr(glamd.logs, "configure", lambda *_args: None)
    await execute(older_server, f"DROP TABLE IF EXISTS platform_tokens CASCADE; {TABLE}")
    await execute(module_database_url, f"TRUNCATE {TABLES}")
    database = await Database.connect(module_database_url, pool_size=4)
    clock = admin.world.clock
    keyring = await load_keyring(database, local_provider(kek), clock)
    vault = PlatformTokens(database, keyring=keyring, clock=clock)
    gate = Gate(Importer(database, keyring=keyring, key_text=KEY_TEXT, clock=clock))
    admin.credentials, admin.importer = vault, gate
    async with admin.running():
        yield Site(admin, database, older_server, gate, vault)
    await database.close()
    assert CANARY not in json.dumps(logs, default=str)


def one_line(result: Result, status: int = 1) -> str:
    """The one line on stderr of a command that failed, without a password or a secret in it."""
    assert result.exit_code == status, result.output
    assert result.stderr.count("\n") == 1, result.output
    assert CANARY not in result.output
    assert "secret-password" not in result.output
    return result.stderr.rstrip("\n")


def answer(result: Result, status: int = 0) -> Any:
    """The final object of a command that came to its end."""
    assert (result.exit_code, result.stderr) == (status, ""), result.output
    assert CANARY not in result.stdout
    return json.loads(result.stdout)


def some(found: Any) -> dict[str, int]:
    """The counts that are not 0."""
    return {name: count for name, count in found["counts"].items() if count}


class TestSources:
    """What cannot be read is one line, and nothing is brought over."""

    async def test_columns_that_are_not_there_are_named_with_those_that_are_and_a_mapping_mends_it(
        self, site: Site
    ) -> None:
        await fill(site, row(1))
        await execute(
            site.older_url,
            'ALTER TABLE platform_tokens RENAME domain TO "shop ""domain";'
            " ALTER TABLE platform_tokens DROP access_count",
        )
        line = one_line(await site.run())
        assert line.startswith("COLUMNS_MISSING: There is nothing for domain, access_count.")
        assert "platform_shop_id" in line
        line = one_line(await site.run("--column", "domain=nope", "--column", "id="))
        assert "for id, domain (no column nope), access_count" in line
        assert not site.gate.sizes
        mapping = ("--column", 'domain=shop "domain', "--column", "access_count=")
        assert some(answer(await site.run(*mapping, "--json"))) == {"taken": 1}
        found = await site.vault.connection(merchant_id(1), "shopify")
        assert (found.domain, found.access_count) == ("shop-1.myshopify.com", 0)

    async def test_a_table_that_is_not_there_is_named(self, site: Site) -> None:
        line = one_line(await site.run("--table", "public.tokens; DROP TABLE platform_tokens"))
        assert line.startswith("NO_TABLE: ")
        assert some(answer(await site.run("--table", "public.platform_tokens", "--json"))) == {}

    async def test_a_table_whose_ids_are_numbers_is_refused(self, site: Site) -> None:
        await execute(
            site.older_url,
            "ALTER TABLE platform_tokens ALTER id TYPE bigint USING 1",
        )
        assert one_line(await site.run()).startswith("NO_UUID: The ids are of type bigint")

    @pytest.mark.parametrize(
        ("url", "code"),
        [
            ("postgresql://nobody:secret-password@127.0.0.1:1/none", "UNAVAILABLE"),
            ("mysql://nobody:secret-password@127.0.0.1/none", "CONFIG_ERROR"),
        ],
    )
    async def test_a_database_that_is_not_there_is_one_line_without_its_password(
        self, site: Site, url: str, code: str, tmp_path: Path
    ) -> None:
        file = tmp_path / "url"
        file.write_text(f"{url}\n")
        for source in (("--from-url", url), ("--from-url-file", file)):
            line = one_line(await site.run(*source))
            assert line.startswith(f"{code}: The older database: ")

    async def test_a_login_that_may_not_read_the_table_is_told_so(self, site: Site) -> None:
        await execute(
            site.older_url,
            "CREATE FUNCTION refuse() RETURNS SETOF platform_tokens LANGUAGE plpgsql"
            " AS 'BEGIN RAISE insufficient_privilege; END';"
            " CREATE VIEW refused AS SELECT * FROM refuse()",
        )
        assert one_line(await site.run("--table", "refused")).startswith("REFUSED: ")

    async def test_lines_that_are_no_rows_are_named_and_the_others_taken(
        self, site: Site, tmp_path: Path
    ) -> None:
        file = tmp_path / "rows.jsonl"
        good = json.dumps(row(1) | {"scopes": ["a", "b"], "access_count": 7, "more": [1]})
        lines = [
            good,
            "",
            "not json " + CANARY,
            "[]",
            '{"a": "' + "x" * 1_100_000 + '"}',
            json.dumps(row(2) | {"scopes": {"a": 1e300}, "domain": "\ud800"}),
            json.dumps(row(3, encrypted_token="Z" * 900_000)),
            json.dumps(row(4)),
        ]
        file.write_text("\n".join(lines))
        found = answer(await site.run("--from-file", file, "--json"), status=1)
        assert some(found) == {"taken": 2, "undecryptable": 1, "invalid": 1}
        assert {one["id"]: one["code"] for one in found["refused"]} == {
            "line 3": "NO_ROW",
            "line 4": "NO_ROW",
            "line 5": "NO_ROW",
            str(older_id(2)): "VALIDATION_ERROR",
            str(older_id(3)): "OLDER_TOKEN_TOO_LARGE",
        }
        assert await site.taken() == {older_id(1), older_id(4)}
        taken = await site.vault.connection(merchant_id(1), "shopify")
        assert (taken.scopes, taken.access_count) == (("a", "b"), 7)
        again = answer(await site.run("--from-file", file, "--json"), status=1)
        assert (again["rows"], some(again)) == (0, some(found))

    async def test_a_file_whose_rows_lack_a_field_is_refused_at_once(
        self, site: Site, tmp_path: Path
    ) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps({"uid": 1, "domain": "a.example"}))
        line = one_line(await site.run("--from-file", file))
        assert line.startswith("COLUMNS_MISSING: ")
        assert "There are the columns uid, domain" in line


class TestAnotherSource:
    """The place where an import stands is one in its source, and means nothing in another."""

    async def test_a_database_after_a_file_is_gone_through_from_its_beginning(
        self, site: Site, tmp_path: Path
    ) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(json.dumps(row(number)) for number in range(5)))
        assert "another source" not in (await site.run("--from-file", file)).stdout
        await fill(site, *(row(number) for number in range(5, 45)))
        tried = answer(await site.run("--dry-run", "--json"))
        assert (some(tried), tried["other_source"]) == ({"taken": 40}, True)
        result = await site.run()
        assert (result.exit_code, result.stderr) == (0, "")
        assert "another source" in result.stdout
        assert await site.taken() == {older_id(number) for number in range(45)}
        again = answer(await site.run("--json"))
        assert (again["rows"], again["other_source"]) == (0, False)

    async def test_another_table_of_the_same_database_is_another_source(self, site: Site) -> None:
        await execute(
            site.older_url,
            "DROP TABLE IF EXISTS more; CREATE TABLE more (LIKE platform_tokens INCLUDING ALL)",
        )
        await fill(site, *(row(number) for number in range(20)))
        await fill(site, *(row(number) for number in range(20, 40)), table="more")
        for table in ("platform_tokens", "more"):
            assert some(answer(await site.run("--table", table, "--json"))) == {"taken": 20}

    async def test_a_file_that_grew_or_changed_is_gone_through_again(
        self, site: Site, tmp_path: Path
    ) -> None:
        file = tmp_path / "rows.jsonl"
        rows = [row(number) for number in range(1, 8)]
        file.write_text("\n".join(json.dumps(one) for one in rows[:2]))
        assert some(answer(await site.run("--from-file", file, "--json"))) == {"taken": 2}
        # The last row of the first run stands again behind those that it has not seen.
        file.write_text("\n".join(json.dumps(one) for one in [*rows, rows[1]]))
        found = answer(await site.run("--from-file", file, "--batch", "2", "--json"))
        assert some(found) == {"taken": 5, "already": 3}
        assert await site.taken() == {older_id(number) for number in range(1, 8)}

    async def test_an_id_that_stands_twice_in_a_file_hides_no_row_from_a_run_that_goes_on(
        self, site: Site, tmp_path: Path
    ) -> None:
        file = tmp_path / "rows.jsonl"
        rows = [row(number) for number in range(1, 8)]
        file.write_text("\n".join(json.dumps(one) for one in [*rows, rows[1]]))
        site.gate.lose_answer_at = 1
        one_line(await site.run("--from-file", file, "--batch", "2"))
        site.gate.lose_answer_at = None
        found = answer(await site.run("--from-file", file, "--batch", "2", "--json"))
        assert some(found) == {"taken": 7, "already": 1}


class TestCutOver:
    """The older service runs on while its rows are imported, and is switched off then."""

    async def test_what_was_replaced_there_meanwhile_comes_with_the_second_run(
        self, site: Site
    ) -> None:
        await fill(site, row(1), row(2))
        first = await site.run()
        assert "renewal waits for 24 hours" in first.stdout
        held = await site.vault.connection(merchant_id(2), "shopify")
        assert held.refresh_not_before is not None
        await execute(
            site.older_url,
            f"UPDATE platform_tokens SET encrypted_token = '{sealed({'access_token': CANARY})}',"
            f" updated_at = now() WHERE id = '{older_id(1)}'",
        )
        last = await site.run("--restart", "--hold-renewal", "0", "--json")
        assert some(answer(last)) == {"updated": 1, "already": 1}
        reading = await site.vault.read(merchant_id(1), platform=None, accessor=READER)
        assert reading.tokens[0].secret.data == {"access_token": CANARY}
        free = await site.vault.connection(merchant_id(2), "shopify")
        assert free.refresh_not_before is None


class TestManyRows:
    """2,000 rows, and runs that end before they are through."""

    async def test_a_killed_run_is_gone_on_with_and_no_row_is_taken_twice(self, site: Site) -> None:
        await fill(site, *(row(number) for number in range(MANY)))
        site.gate.hold_at = 8
        process = await site.start("--batch", "100")
        async with asyncio.timeout(LONG_S):
            await site.gate.held.wait()
        process.send_signal(signal.SIGKILL)
        await process.communicate()
        site.gate.go_on.set()
        # What the daemon was at, it ends, though nobody is there to be told.
        assert await eventually(lambda: site.database.fetchval(AT), timeout_s=LONG_S) == "800"

        site.gate.lose_answer_at = len(site.gate.sizes) + 3
        line = one_line(await site.run("--batch", "100"))
        assert line.startswith("UNAVAILABLE: ")
        assert "200 rows are done; the same command, without --restart, goes on from there." in line

        site.gate.lose_answer_at = None
        found = answer(await site.run("--json"))
        assert some(found) == {"taken": MANY}
        assert found["rows"] <= MANY - 1_000
        assert max(site.gate.sizes) > 100
        assert await site.taken() == {older_id(number) for number in range(MANY)}
        log = "SELECT count(*), count(DISTINCT token_id) FROM glam.token_access_log"
        assert tuple(await site.database.fetchrow(log) or ()) == (MANY, MANY)
        reading = await site.vault.read(merchant_id(1234), platform=None, accessor=READER)
        assert reading.tokens[0].secret.data["access_token"] == f"{CANARY}-1234"

        nothing = await site.run()
        assert nothing.exit_code == 0
        assert "There is nothing after" in nothing.stdout
        again = answer(await site.run("--restart", "--json"))
        assert (again["rows"], some(again)) == (MANY, {"already": MANY})

    async def test_an_interrupted_run_says_how_far_it_came(self, site: Site) -> None:
        await fill(site, *(row(number) for number in range(30)))
        site.gate.hold_at = 2
        process = await site.start("--batch", "10")
        async with asyncio.timeout(LONG_S):
            await site.gate.held.wait()
            process.send_signal(signal.SIGINT)
            out, err = await process.communicate()
        site.gate.go_on.set()
        assert process.returncode == 1
        assert err.decode().startswith("INTERRUPTED: Stopped. 10 rows are done;")
        assert b"10 of 30 rows" in out

    async def test_rows_that_do_not_fit_into_one_body_go_in_several(self, site: Site) -> None:
        large = sealed({"a": "x" * 40_000})
        await fill(site, *(row(number, encrypted_token=large) for number in range(9)))
        assert some(answer(await site.run("--json"))) == {"taken": 9}
        assert max(site.gate.sizes) == 3

    async def test_an_id_column_of_type_uuid_is_gone_through_as_well(self, site: Site) -> None:
        await execute(
            site.older_url, "ALTER TABLE platform_tokens ALTER id TYPE uuid USING id::uuid"
        )
        await execute(
            site.older_url, "ALTER TABLE platform_tokens ALTER scopes TYPE text[] USING '{a,b}'"
        )
        connection = await asyncpg.connect(site.older_url, timeout=LONG_S)
        try:
            for number in range(3):
                one = row(number)
                await connection.execute(
                    "INSERT INTO platform_tokens (id, merchant_id, platform_name, platform_shop_id,"
                    " domain, encrypted_token, token_type, scopes, updated_at)"
                    " VALUES ($1, $2, $3, $4, $5, $6, $7, '{a,b}', now())",
                    one["id"],
                    one["merchant_id"],
                    one["platform_name"],
                    one["platform_shop_id"],
                    one["domain"],
                    one["encrypted_token"],
                    one["token_type"],
                )
        finally:
            await connection.close(timeout=LONG_S)
        assert some(answer(await site.run("--batch", "1", "--json"))) == {"taken": 3}
        assert answer(await site.run("--json"))["rows"] == 0
        found = await site.vault.connection(merchant_id(2), "shopify")
        assert found.scopes == ("a", "b")


class TestOutcome:
    """What a person and a program are told at the end."""

    async def test_rows_that_could_not_be_taken_are_a_table_and_an_exit_status(
        self, site: Site
    ) -> None:
        await site.vault.store(new_token(merchant_id(3)), accessor=READER)
        await fill(
            site,
            row(1),
            row(2, platform_name="etsy"),
            row(3),
            row(4, encrypted_token=sealed({"a": CANARY}, "another key")),
        )
        tried = await site.run("--dry-run")
        assert tried.exit_code == 1
        assert "Nothing was written" in tried.stdout
        assert len(await site.taken()) == 1
        result = await site.run()
        assert (result.exit_code, result.stderr) == (1, "")
        for text in ("4 of 4 rows", "Rows that could not be taken: 2.", str(older_id(4))):
            assert text in result.stdout
        assert "platform_name: It is none of shopify" in result.stdout
        assert CANARY not in result.stdout + tried.stdout
        found = answer(await site.run("--json"), status=1)
        assert some(found) == {"taken": 1, "superseded": 1, "undecryptable": 1, "invalid": 1}
        assert found["failed"] == 0
        assert "--restart names them again" in (await site.run()).stdout

    async def test_at_a_terminal_a_bar_shows_how_far_it_is(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await fill(site, *(row(number) for number in range(40)))
        monkeypatch.setenv("GLAMD_IMPORT_URL", site.older_url)
        monkeypatch.setenv("TERM", "xterm")
        command = site.command("--batch", "10")
        status, shown = await asyncio.to_thread(at_terminal, command, [])
        assert status == 0
        assert "40/40" in shown
        assert "rows/s" in shown
        assert "sealed under a key" in shown

    async def test_the_older_database_is_only_read_and_never_named_to_the_daemon(
        self, site: Site, logs: list[MutableMapping[str, Any]]
    ) -> None:
        await fill(site, row(1))
        digest = "SELECT md5(string_agg(t::text, '' ORDER BY id)) FROM platform_tokens t"
        connection = await asyncpg.connect(site.older_url, timeout=LONG_S)
        try:
            before = await connection.fetchval(digest)
            answer(await site.run("--json"))
            assert await connection.fetchval(digest) == before
        finally:
            await connection.close(timeout=LONG_S)
        assert site.older_url not in json.dumps(logs, default=str)
