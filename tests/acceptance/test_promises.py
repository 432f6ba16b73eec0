"""The promises of the payment path, from outside: answered after the commit, done once."""

import asyncio
import secrets
from pathlib import Path
from uuid import uuid4

import orjson
import pytest

from device_gateway.terminal_card import DemoCard, clear_form
from device_gateway.terminal_device import Device
from glamd.db import Database
from tests.support.postgres import eventually
from tests.support.proxy import proxied
from tests.support.site import VISA, Site, reader, running_site

CLEAR = clear_form(DemoCard(pan=VISA), "track2")


def request(device: Device) -> bytes:
    """A good request."""
    return reader(device).request(secrets.token_hex(8), CLEAR, "track2")


async def test_nothing_is_answered_or_acknowledged_before_the_commit(
    site: Site, database: Database
) -> None:
    device = await site.enroll()
    async with site.wire(device) as wire:
        async with database.transaction() as holder:
            await holder.execute("LOCK TABLE cde.payment_tokens IN SHARE MODE")
            asked = asyncio.create_task(wire.ask(request(device)))

            async def waits_for_the_lock() -> object:
                return await site.database.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND wait_event_type = 'Lock'"
                )

            await eventually(waits_for_the_lock)
            # `ask` publishes with QoS 1, so neither the PUBACK nor the answer has come.
            assert not asked.done()
        assert (await asked).ok


async def test_with_the_database_away_a_request_is_unavailable_and_its_resend_gets_one_token(
    state_dir: Path, database_url: str, database: Database
) -> None:
    async with (
        proxied(database_url) as (proxy, url),
        running_site(state_dir, url) as site,
    ):
        device = await site.enroll()
        payload = request(device)
        async with site.wire(device) as wire:
            assert (await wire.ask(request(device))).ok
            proxy.cut()
            refused = await wire.ask(payload)
            assert refused.code == "UNAVAILABLE"
            assert refused.fields["retryable"] is True
            ready = await site.http.get("/readyz")
            assert ready.status == 503
            proxy.mend()

            async def answered() -> bool:
                return (await wire.ask(payload)).ok

            await eventually(answered)
        assert await database.fetchval("SELECT count(*) FROM cde.payment_tokens") == 2


async def test_without_the_database_of_everything_but_cards_it_is_not_ready_and_taps_go_on(
    state_dir: Path, database_url: str, module_database_url: str
) -> None:
    changes = {"database": {"cde_url": module_database_url}}
    async with (
        proxied(database_url) as (proxy, url),
        running_site(state_dir, url, changes=changes) as site,
    ):
        device = await site.enroll()
        assert (await site.http.get("/readyz")).status == 200
        proxy.cut()

        async def unready() -> bool:
            return (await site.http.get("/readyz")).status == 503

        await eventually(unready)
        assert (await site.ask(device, request(device))).ok
        proxy.mend()

        async def ready() -> bool:
            return (await site.http.get("/readyz")).status == 200

        await eventually(ready)


async def test_a_commit_whose_outcome_got_lost_is_found_by_the_resend(
    state_dir: Path, database_url: str, database: Database
) -> None:
    # One connection, which has prepared the statement when it matters: what waits for the lock is
    # its execution.
    one = {"payments": {"commit_connections": 1}}
    async with (
        proxied(database_url) as (proxy, url),
        running_site(state_dir, url, changes=one) as site,
    ):
        device = await site.enroll()
        payload = request(device)
        async with site.wire(device) as wire:
            assert (await wire.ask(request(device))).ok
            async with database.transaction() as holder:
                await holder.execute("LOCK TABLE cde.payment_tokens IN SHARE MODE")
                asked = asyncio.create_task(wire.ask(payload))

                async def commit_is_under_way() -> object:
                    return await database.fetchval(
                        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                        " AND datname = current_database()"
                    )

                await eventually(commit_is_under_way)
                # The server has the statement and will commit it; the answer will not get through.
                proxy.hold()

            async def committed() -> bool:
                count = await database.fetchval("SELECT count(*) FROM cde.payment_tokens")
                return bool(count == 2)

            await eventually(committed)
            proxy.cut()
            assert (await asked).code == "UNAVAILABLE"
            proxy.mend()

            async def answered() -> bool:
                answer = await wire.ask(payload)
                assert answer.code in {"ok", "UNAVAILABLE"}
                return answer.ok and answer.replayed

            await eventually(answered)
        assert await database.fetchval("SELECT count(*) FROM cde.payment_tokens") == 2


async def test_a_resend_gets_its_first_answer_also_from_a_daemon_that_was_started_again(
    state_dir: Path, database_url: str
) -> None:
    async with running_site(state_dir, database_url) as site:
        device = await site.enroll()
        payload = request(device)
        first = await site.ask(device, payload)
        assert first.ok
        assert not first.replayed
    async with running_site(state_dir, database_url) as site:
        again = await site.ask(device, payload)
        assert again.replayed
        assert again.fields == first.fields | {"replayed": True}
        other = orjson.dumps(orjson.loads(payload) | {"id": "other"})
        assert (await site.ask(device, other)).code == "KSN_REPLAYED"


async def test_two_nodes_never_make_two_tokens_of_one_tap(
    state_dir: Path, database_url: str, tmp_path: Path
) -> None:
    second_node = {"admin": {"socket": tmp_path / "second.sock"}}
    async with (
        running_site(state_dir, database_url) as one,
        running_site(state_dir, database_url, changes=second_node) as two,
    ):
        device = await one.enroll()
        async with one.wire(device) as here, two.wire(device) as there:
            for _ in range(10):
                payload = request(device)
                answers = await asyncio.gather(here.ask(payload), there.ask(payload))
                assert {answer.code for answer in answers} == {"ok"}
                assert len({answer.text("token") for answer in answers}) == 1
        assert await one.database.fetchval("SELECT count(*) FROM cde.payment_tokens") == 10


async def test_a_revoked_terminal_is_cut_off_and_stays_out(site: Site) -> None:
    device = await site.enroll()
    terminal = await site.terminal(device)
    await site.daemon.registry.revoke(device.device_id)

    async def is_cut_off() -> bool:
        return not terminal.connected.is_set()

    async with asyncio.timeout(5.0):
        await eventually(is_cut_off)
    shown = await site.daemon.registry.show(device.device_id)
    assert shown.status == "revoked"
    with pytest.raises(Exception, match=r"(?i)not authorized"):
        await site.ask(device, request(device))


async def test_a_terminal_that_another_node_revoked_is_cut_off_within_the_contracts_5_s(
    site: Site, database: Database
) -> None:
    device = await site.enroll()
    terminal = await site.terminal(device)
    await database.execute(
        "UPDATE cde.devices SET status = 'revoked', changed_at = clock_timestamp()"
    )

    async def is_cut_off() -> bool:
        return not terminal.connected.is_set()

    async with asyncio.timeout(5.0):
        await eventually(is_cut_off)


async def test_a_certificate_that_was_replaced_opens_nothing(site: Site) -> None:
    device = await site.enroll()
    await site.database.execute("UPDATE cde.devices SET certificate_sha256 = repeat('0', 64)")
    with pytest.raises(Exception, match=r"(?i)not authorized"):
        await site.ask(device, request(device))


async def test_presence_follows_the_connection(site: Site) -> None:
    device = await site.enroll()

    async def presence() -> str:
        return (await site.daemon.registry.show(device.device_id)).presence

    assert await presence() == "offline"
    async with site.wire(device):

        async def online() -> bool:
            return await presence() == "online"

        await eventually(online)

    async def offline() -> bool:
        return await presence() == "offline"

    await eventually(offline)


async def test_no_card_number_is_in_the_log_the_metrics_or_the_database(
    site: Site, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    device = await site.enroll()
    source = reader(device)
    pan, bad_pan = "5555555555554444", "5555555555554445"
    async with site.wire(device) as wire:
        assert (await wire.ask(request(device))).ok
        good = source.request("good", clear_form(DemoCard(pan=pan), "track1"), "track1")
        assert (await wire.ask(good)).ok
        bad = source.request("bad", clear_form(DemoCard(pan=bad_pan), "emv-tlv"), "emv-tlv")
        assert (await wire.ask(bad)).code == "DECRYPT_FAILED"
    metrics = await (await site.http.get("/metrics")).text()
    output = capfd.readouterr()
    haystack = [caplog.text, output.out, output.err, metrics]
    tables = await site.database.fetch(
        "SELECT quote_ident(schemaname) || '.' || quote_ident(tablename) FROM pg_tables"
        " WHERE schemaname IN ('cde', 'glam')"
    )
    for (table,) in tables:
        rows = await site.database.fetch(f"SELECT t::text FROM {table} t")
        haystack += [row[0] for row in rows]
    for number in (pan, bad_pan, VISA):
        hexed = number.encode().hex()
        assert not [text for text in haystack if number in text or hexed in text]


async def test_access_rows_that_are_over_age_go_and_younger_ones_stay(
    state_dir: Path, database_url: str, database: Database
) -> None:
    await database.execute(
        "INSERT INTO glam.token_access_log (at, merchant_id, action, actor_kind, actor, success,"
        " request_id, correlation_id, ip) SELECT now() - make_interval(days => age), $1, 'read',"
        " 'internal', 'catalog-service', true, 'r', 'r', '-' FROM unnest($2::int[]) AS age",
        uuid4(),
        [399, 401],
    )

    async def is_one() -> bool:
        left: int = await database.fetchval("SELECT count(*) FROM glam.token_access_log")
        return left == 1

    async with running_site(state_dir, database_url):
        await eventually(is_one)
