"""The daemon's database role: who makes it, what later tables give it, what taking it on leaves."""

from pathlib import Path

import asyncpg
import pytest

from glamd.admin import migrate
from glamd.db import Database
from glamd.embedded.postgres import EmbeddedPostgres
from glamd.errors import ConfigError, InputError
from glamd.payments.auditing import store
from tests.support.postgres import execute

TABLE_RIGHTS = """
SELECT string_agg(privilege_type, ',' ORDER BY privilege_type)
FROM information_schema.role_table_grants
WHERE grantee = 'glamd_daemon' AND table_schema = $1 AND table_name = $2
"""


async def test_without_the_role_a_login_that_may_not_make_it_is_told_what_has_to_be_run(
    tmp_path: Path,
) -> None:
    server = EmbeddedPostgres(tmp_path)
    try:
        urls = await server.start()
        await execute(urls.admin, "DROP ROLE glamd_daemon")
        with pytest.raises(InputError, match="CREATE ROLE glamd_daemon NOLOGIN") as refused:
            await migrate.upgrade(urls.app)
        assert "\n" not in refused.value.message
        assert await migrate.current(urls.app) is None
        # Who may make roles needs nobody to do it first.
        await execute(urls.admin, "ALTER ROLE glamd CREATEROLE")
        await migrate.upgrade(urls.app)
    finally:
        await server.stop()


async def test_what_a_later_migration_makes_is_the_daemons_too_but_for_months_of_the_log(
    database: Database, database_url: str
) -> None:
    await execute(
        database_url,
        "CREATE TABLE cde.later (x bigint GENERATED ALWAYS AS IDENTITY);"
        "CREATE TABLE glam.later (x bigint GENERATED ALWAYS AS IDENTITY);"
        "SELECT cde.make_audit_partition('2031-01-01')",
    )
    for schema in ("cde", "glam"):
        rights = await database.fetchval(TABLE_RIGHTS, schema, "later")
        assert rights == "DELETE,INSERT,SELECT,UPDATE"
    assert await database.fetchval(TABLE_RIGHTS, "cde", "decrypt_audit_log_2031_01") is None
    assert await database.fetchval(TABLE_RIGHTS, "cde", "decrypt_audit_log") == "INSERT,SELECT"


async def test_only_the_functions_that_keep_a_rule_may_be_called_and_by_the_daemon_only(
    database: Database,
) -> None:
    rows = await database.fetch(
        "SELECT p.proname AS name, prosecdef AS keeps,"
        " has_function_privilege('glamd_daemon', p.oid, 'EXECUTE') AS daemon,"
        " coalesce(array_to_string(proacl, ' '), '=X') ~ '(^| )=X' AS everybody"
        " FROM pg_proc p WHERE pronamespace::regnamespace::text IN ('cde', 'glam')"
    )
    assert {"make_audit_partition", "drop_audit_partition"} <= {row["name"] for row in rows}
    for row in rows:
        assert (row["daemon"], row["everybody"]) == (row["keeps"], False), row["name"]


async def test_a_month_before_christ_does_not_drop_the_one_that_has_its_name(
    database: Database, database_url: str, daemon_url: str
) -> None:
    await execute(database_url, "SELECT cde.make_audit_partition('2031-01-01')")
    for sql in (
        "SELECT cde.drop_audit_partition('2031-01-01 BC')",
        "SELECT cde.make_audit_partition('2031-02-01 BC')",
    ):
        with pytest.raises(asyncpg.InvalidParameterValueError):
            await execute(daemon_url, sql)
    there = "SELECT to_regclass('cde.decrypt_audit_log_2031_01') IS NOT NULL"
    assert await database.fetchval(there)
    await execute(daemon_url, "SELECT cde.make_audit_partition('2031-02-01')")
    assert await database.fetchval(there.replace("2031_01", "2031_02"))


@pytest.mark.parametrize("month", ["2025-11-02", "2025-11-30", "-infinity", "infinity"])
async def test_a_month_is_named_by_its_first_day(database_url: str, month: str) -> None:
    for function in ("make_audit_partition", "drop_audit_partition"):
        with pytest.raises(asyncpg.InvalidParameterValueError):
            await execute(database_url, f"SELECT cde.{function}('{month}')")


async def test_who_takes_on_the_role_can_change_nothing_of_the_log_and_is_told_about_its_login(
    tmp_path: Path,
) -> None:
    server = EmbeddedPostgres(tmp_path)
    try:
        urls = await server.start()
        await migrate.upgrade(urls.owner)
        for url, role, expected in (
            (urls.admin, None, (False, True)),
            (urls.admin, "glamd_daemon", (True, True)),
            (urls.app, None, (False, True)),
            (urls.app, "glamd_daemon", (True, True)),
        ):
            database = await Database.connect(url, pool_size=1, role=role)
            try:
                rights = await store.rights(database)
            finally:
                await database.close()
            assert (rights.append_only, rights.login_owns) == expected
            assert role is None or rights.role == role
        with pytest.raises(ConfigError):
            await Database.connect(urls.app, pool_size=1, role="postgres")
    finally:
        await server.stop()
