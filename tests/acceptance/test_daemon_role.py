"""A whole daemon whose database login is a member of `glamd_daemon` and owns nothing.

What it does every day it may, and nothing of what it has written down can it take back.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from glamd.db import Database
from glamd.errors import ConfigError
from tests.support.looks import look, read, tap, verified
from tests.support.site import Site, running_site

FORBIDDEN = [
    "UPDATE cde.decrypt_audit_log SET outcome = 'ok'",
    "DELETE FROM cde.decrypt_audit_log",
    "TRUNCATE cde.decrypt_audit_log",
    "DROP TABLE cde.decrypt_audit_log",
    "ALTER TABLE cde.decrypt_audit_log DISABLE TRIGGER ALL",
    "DELETE FROM cde.audit_heads",
    "TRUNCATE cde.audit_heads",
    "UPDATE {part} SET outcome = 'ok'",
    "DELETE FROM {part}",
    "TRUNCATE {part}",
    "INSERT INTO {part} SELECT * FROM cde.decrypt_audit_log",
    "DROP TABLE {part}",
    "ALTER TABLE cde.decrypt_audit_log DETACH PARTITION {part}",
    "ALTER TABLE {part} OWNER TO CURRENT_USER",
    "CREATE TABLE cde.mine (x int)",
    "CREATE TABLE public.mine (x int)",
    "CREATE SCHEMA mine",
    "UPDATE public.glamd_schema_version SET version_num = '0001'",
    "ALTER FUNCTION cde.drop_audit_partition(date) RESET ALL",
]
PARTS = """
SELECT inhrelid::regclass::text AS name FROM pg_inherits
WHERE inhparent = 'cde.decrypt_audit_log'::regclass ORDER BY 1
"""


@pytest.fixture
async def site(state_dir: Path, daemon_url: str) -> AsyncIterator[Site]:
    async with running_site(state_dir, daemon_url) as running:
        yield running


async def test_a_token_a_look_and_a_debit_need_no_more_than_the_role_has(site: Site) -> None:
    token = await tap(site)
    assert (await look(site.worker, token)).status == 200
    assert (await verified(site))["ok"]
    ledger = f"/v1/ledger/{site.merchant_id}"
    for step, path in enumerate(("grant", "consume")):
        body = {"amount": 10, "reference_type": "manual", "reference_id": str(step)}
        moved = await read(await site.admin.post(f"{ledger}/{path}", json=body))
        assert moved.status in (200, 201), moved.body


async def test_nothing_of_the_audit_log_can_be_changed_by_the_daemons_login(
    site: Site, database: Database, daemon_url: str
) -> None:
    token = await tap(site)
    assert (await look(site.worker, token)).status == 200
    later = "2199-01-01"
    assert await site.database.fetchval("SELECT cde.make_audit_partition($1::text::date)", later)
    parts = [row["name"] for row in await database.fetch(PARTS)]
    assert "cde.decrypt_audit_log_2199_01" in parts
    connection = await asyncpg.connect(daemon_url)
    try:
        for sql in FORBIDDEN:
            for part in (parts[0], parts[-1]):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(sql.format(part=part))
    finally:
        await connection.close()
    assert (await verified(site))["ok"]


async def test_the_daemon_says_that_its_role_cannot_change_the_log(site: Site) -> None:
    async with site.admin.get("/v1/audit/status") as answer:
        status = await answer.json()
    assert (status["append_only"], status["login_owns_the_log"]) == (True, False)


async def test_without_the_right_to_insert_an_audit_row_there_is_no_answer(
    site: Site, database: Database
) -> None:
    token = await tap(site)
    assert (await look(site.worker, token)).status == 200
    await database.execute("REVOKE INSERT ON cde.decrypt_audit_log FROM glamd_daemon")
    reply = await look(site.worker, token)
    assert reply.status == 503
    assert b"4242" not in reply.body
    await database.execute("GRANT INSERT ON cde.decrypt_audit_log TO glamd_daemon")
    assert (await look(site.worker, token)).status == 200
    assert (await verified(site))["ok"]


async def test_a_role_that_the_login_may_not_take_on_is_a_setting_to_mend(daemon_url: str) -> None:
    with pytest.raises(ConfigError):
        await Database.connect(daemon_url, pool_size=1, role="postgres")
