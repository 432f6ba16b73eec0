"""Detokenizing, from outside over mutual TLS: what comes back, what is refused, what is audited."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest

from device_gateway.terminal_card import DemoCard
from glamd.crypto import x509
from glamd.db import Database
from glamd.payments.model import Format
from tests.support.looks import (
    CLEAR,
    GOOD,
    Reply,
    audited,
    authorized,
    look,
    outcomes,
    read,
    tap,
    taps,
    verified,
    worker_named,
    worker_with,
)
from tests.support.postgres import eventually
from tests.support.proxy import proxied
from tests.support.site import VISA, Site, running_site

ALL = ["pan", "expiry", "cardholder_name", "service_code", "track2", "emv"]
UNKNOWN = "ptk_" + "0" * 26


def reveals_nothing(reply: Reply) -> bool:
    """Whether no part of the card is in the answer."""
    return not any(text in reply.body for text in (VISA.encode(), VISA[:8].encode(), b"TESTER"))


def grant(name: str = "settler", **changes: object) -> dict[str, object]:
    """A worker's grant for settlement of everybody's cards, changed as said."""
    whole: dict[str, object] = {
        "name": name,
        "purposes": ["settlement"],
        "fields": ["pan", "expiry"],
        "merchants": "*",
        "rate_per_s": 1000,
    }
    return whole | changes


def granting(*grants: dict[str, object]) -> dict[str, dict[str, object]]:
    """Settings with these grants and no other."""
    return {"worker": {"grants": list(grants)}}


async def waits_for_a_lock(site: Site) -> None:
    """Return once a statement of the daemon waits for a lock."""

    async def waiting() -> object:
        return await site.database.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND wait_event_type = 'Lock'"
        )

    await eventually(waiting)


# ---- what comes back


@pytest.mark.parametrize("key_set", ["tdes", "aes"])
async def test_each_field_comes_back_from_every_format_and_null_for_what_was_not_there(
    site: Site, key_set: str
) -> None:
    device = await site.enroll(key_set)
    whole = {
        "pan": "5555555555554444",
        "expiry": "3102",
        "cardholder_name": "MUSTER/MAX",
        "service_code": "121",
        # Sensitive authentication data was dropped when it was read.
        "track2": None,
        "emv": None,
    }
    lacking: dict[Format, tuple[str, ...]] = {
        "track1": (),
        "track2": ("cardholder_name",),
        "emv-tlv": (),
        "pan": ("cardholder_name", "service_code"),
        "json": ("service_code",),
    }
    card = DemoCard(pan="5555555555554444", expiry="3102", name="MUSTER/MAX", service_code="121")
    async with site.wire(device) as wire:
        for form, missing in lacking.items():
            answer = await wire.ask(taps(device, card=card, form=form))
            body = {"purpose": "refund", "fields": ALL}
            reply = await look(site.worker, answer.text("token"), body)
            assert reply.status == 200
            assert reply.data == whole | dict.fromkeys(missing), form


async def test_only_the_fields_asked_for_are_answered_and_the_answer_is_not_cached(
    site: Site,
) -> None:
    reply = await look(site.worker, await tap(site), {"purpose": "support", "fields": ["expiry"]})
    assert reply.data == {"expiry": "4912"}
    assert reply.headers["Cache-Control"] == "no-store"
    assert reveals_nothing(reply)


# ---- who may look


def nameless(site: Site, directory: Path) -> Path:
    """A certificate of the workers' authority without an alternative name, and its key."""
    key, public_key = x509.generate_key()
    authority = site.certificates.worker_ca
    certificate = x509.issue_device(
        "demo",
        public_key=public_key,
        ca_certificate=authority.certificate,
        ca_key=authority.key,
        now=datetime.now(UTC),
        validity=timedelta(days=1),
    )
    file = directory / "nameless.pem"
    file.write_text(x509.certificate_pem(certificate) + x509.private_key_pem(key))
    return file


async def test_without_a_certificate_there_is_no_way_in(site: Site) -> None:
    token = await tap(site)
    async with worker_with(site, None) as session:
        # With TLS 1.3 a client learns of its refusal with its first read.
        with pytest.raises(aiohttp.ClientError):
            await look(session, token)
    # It is the certificate that was missing.
    assert (await look(site.worker, token)).status == 200
    assert await outcomes(site) == ["ok"]


async def test_a_device_is_no_worker_whatever_it_asks_and_each_attempt_is_a_row(
    site: Site,
) -> None:
    device = await site.enroll()
    token = await tap(site, device)
    async with worker_with(site, device.cert, device.key) as session:
        for reply in (await look(session, token), await authorized(session, token)):
            assert reply.outcome == (403, "FORBIDDEN")
            assert reveals_nothing(reply)
    assert (await look(site.worker, token)).status == 200
    assert [(row["actor"], row["outcome"]) for row in await audited(site)] == [
        (f"device:{device.device_id}", "FORBIDDEN"),
        ("demo", "ok"),
    ]
    assert [(row["actor"], row["outcome"]) for row in await audited(site, "authorized")] == [
        (f"device:{device.device_id}", "FORBIDDEN")
    ]


async def test_a_certificate_that_names_no_worker_of_ours_sees_nothing(
    site: Site, tmp_path: Path
) -> None:
    token = await tap(site)
    async with worker_with(site, nameless(site, tmp_path)) as session:
        bearer = await look(session, token, headers=site.internal("payment:read"))
        assert bearer.outcome == (401, "UNAUTHENTICATED")
    async with worker_named(site, "spiffe://elsewhere/worker/elsewhere") as session:
        assert (await look(session, token)).outcome == (401, "UNAUTHENTICATED")
    async with worker_named(site, "spiffe://glamd/service/connector") as session:
        assert (await look(session, token)).outcome == (403, "FORBIDDEN")
    rows = await audited(site)
    assert [row["outcome"] for row in rows] == ["UNAUTHENTICATED", "UNAUTHENTICATED", "FORBIDDEN"]
    # Nobody that has a name here, but a certificate each that can be found again.
    assert {row["actor"] for row in rows} == {"-"}
    assert len({row["certificate_sha256"] for row in rows}) == 3
    metrics = await (await site.http.get("/metrics")).text()
    for reason in ("certificate_name", "trust_domain", "no_worker"):
        assert f'glamd_http_auth_total{{kind="unknown",outcome="{reason}"}}' in metrics


async def test_outside_its_grant_a_worker_sees_nothing_and_each_attempt_is_a_row(
    state_dir: Path, database_url: str
) -> None:
    grants = granting(grant(), grant("elsewhere", merchants=[str(uuid4())]))
    async with running_site(state_dir, database_url, changes=grants) as site:
        token = await tap(site)
        async with worker_named(site, "spiffe://glamd/worker/settler") as settler:
            assert (await look(settler, token)).status == 200
            refused = [
                await look(settler, token, {"purpose": "refund", "fields": ["pan"]}),
                await look(settler, token, {"purpose": "settlement", "fields": ["pan", "emv"]}),
                # The grant is checked before anybody asks whether there is such a token.
                await look(settler, UNKNOWN, {"purpose": "refund", "fields": ["pan"]}),
                await look(site.worker, token),  # "demo" has no grant here
            ]
        async with worker_named(site, "spiffe://glamd/worker/elsewhere") as elsewhere:
            refused.append(await look(elsewhere, token))
            assert (await look(elsewhere, UNKNOWN)).outcome == (404, "TOKEN_NOT_FOUND")
        assert {reply.outcome for reply in refused} == {(403, "FORBIDDEN")}
        assert all(reveals_nothing(reply) for reply in refused)
        rows = await audited(site)
        assert [(row["actor"], row["outcome"]) for row in rows] == [
            ("settler", "ok"),
            ("settler", "FORBIDDEN"),
            ("settler", "FORBIDDEN"),
            ("settler", "FORBIDDEN"),
            ("demo", "FORBIDDEN"),
            ("elsewhere", "FORBIDDEN"),
            ("elsewhere", "TOKEN_NOT_FOUND"),
        ]
        assert [row["purpose"] for row in rows[1:4]] == ["refund", "settlement", "refund"]
        assert rows[2]["fields"] == ["pan", "emv"]
        assert (await verified(site))["ok"] is True


async def test_a_worker_over_its_rate_is_told_when_to_come_again_and_the_others_are_served(
    state_dir: Path, database_url: str
) -> None:
    grants = granting(grant(rate_per_s=0.01), grant("other"))
    async with running_site(state_dir, database_url, changes=grants) as site:
        token = await tap(site)
        async with worker_named(site) as settler:
            # What the grant forbids costs nothing of its rate.
            wrong = {"purpose": "refund", "fields": ["pan"]}
            assert (await look(settler, token, wrong)).status == 403
            assert (await look(settler, token)).status == 200
            refused = await look(settler, token)
        assert refused.outcome == (429, "RATE_LIMITED")
        assert reveals_nothing(refused)
        assert 90 <= int(refused.headers["Retry-After"]) <= 100
        async with worker_named(site, "spiffe://glamd/worker/other") as other:
            assert (await look(other, token)).status == 200
        assert await outcomes(site) == ["FORBIDDEN", "ok", "RATE_LIMITED", "ok"]


# ---- tokens that cannot be opened


async def test_unknown_expired_purged_and_revoked_tokens_are_told_apart(site: Site) -> None:
    device = await site.enroll()
    expired, purged, revoked, good = [await tap(site, device) for _ in range(4)]
    await site.database.execute(
        "UPDATE cde.payment_tokens SET expires_at = now() - interval '1 ms' WHERE token = $1",
        expired,
    )
    await site.database.execute("DELETE FROM cde.token_secrets WHERE token = $1", purged)
    deleted = await site.http.delete(f"/api/v1/payment-tokens/{revoked}", headers=site.client())
    assert deleted.status == 200
    replies = [await look(site.worker, each) for each in (UNKNOWN, expired, purged, revoked)]
    assert [reply.outcome for reply in replies] == [
        (404, "TOKEN_NOT_FOUND"),
        (410, "TOKEN_EXPIRED"),
        (410, "TOKEN_EXPIRED"),
        (410, "TOKEN_REVOKED"),
    ]
    assert all(reveals_nothing(reply) for reply in replies)
    assert (await look(site.worker, good)).data == CLEAR
    rows = await audited(site)
    assert [row["subject"] for row in rows] == [UNKNOWN, expired, purged, revoked, good]
    assert [row["outcome"] for row in rows] == [reply.outcome[1] for reply in replies] + ["ok"]


async def test_a_ciphertext_that_was_damaged_swapped_or_renamed_opens_for_nobody_and_is_audited(
    site: Site,
) -> None:
    device = await site.enroll()
    bad = [await tap(site, device) for _ in range(5)]
    good = await tap(site, device)
    database = site.database
    column, table = "card_ciphertext", "cde.token_secrets"
    # One bit of the ciphertext; the tag gone; two rows swapped; a key version that nobody has.
    await database.execute(
        f"UPDATE {table} SET {column} = set_bit({column}, 160, 1 - get_bit({column}, 160))"
        " WHERE token = $1",
        bad[0],
    )
    await database.execute(
        f"UPDATE {table} SET {column} = substr({column}, 1, 20) WHERE token = $1", bad[1]
    )
    await database.execute(
        f"UPDATE {table} a SET {column} = b.{column} FROM {table} b"
        " WHERE (a.token, b.token) IN (($1, $2), ($2, $1))",
        *bad[2:4],
    )
    await database.execute(f"UPDATE {table} SET key_version = 'v9' WHERE token = $1", bad[4])
    for token in bad:
        reply = await look(site.worker, token)
        assert reply.outcome == (500, "INTERNAL_ERROR")
        assert reveals_nothing(reply)
    assert (await look(site.worker, good)).data == CLEAR
    rows = await audited(site)
    assert [row["subject"] for row in rows] == [*bad, good]
    assert "ok" not in {row["outcome"] for row in rows[:-1]}


# ---- requests that are none


WRONG_BODIES: list[tuple[object, str, tuple[int, str], str | None]] = [
    (b"{", "application/json", (400, "MALFORMED_JSON"), None),
    ({**GOOD, "why": VISA}, "application/json", (422, "VALIDATION_ERROR"), "why"),
    ({"purpose": "refund"}, "application/json", (422, "VALIDATION_ERROR"), "fields"),
    ({**GOOD, "fields": ["cvv"]}, "application/json", (422, "VALIDATION_ERROR"), "fields.0"),
    (b" " * (256 * 1024 + 1), "application/json", (413, "BODY_TOO_LARGE"), None),
    (GOOD, "text/plain", (415, "UNSUPPORTED_MEDIA_TYPE"), None),
]


async def test_a_body_that_is_wrong_is_refused_by_field_and_echoed_to_nobody(site: Site) -> None:
    for body, kind, expected, field in WRONG_BODIES:
        reply = await look(site.worker, UNKNOWN, body, headers={"Content-Type": kind})
        assert reply.outcome == expected
        assert reply.headers["Content-Type"] == "application/problem+json"
        errors = reply.json.get("errors", [])
        assert isinstance(errors, list)
        assert [each["field"] for each in errors] == ([field] if field else [])
        assert reveals_nothing(reply)
    # Whoever may not even ask properly has asked for a card all the same.
    rows = await audited(site)
    assert [row["outcome"] for row in rows] == [expected[1] for _, _, expected, _ in WRONG_BODIES]
    assert {row["subject"] for row in rows} == {UNKNOWN}
    assert VISA not in str(rows)


async def test_a_path_that_no_token_can_have_is_judged_and_recorded_as_an_unknown_one(
    site: Site,
) -> None:
    for token in ("ptk_x", VISA, "ptk_" + "0" * 100):
        assert (await look(site.worker, token)).outcome == (404, "TOKEN_NOT_FOUND")
    outside = {"purpose": "curiosity", "fields": ["pan"]}
    assert (await look(site.worker, "ptk_x", outside)).outcome == (403, "FORBIDDEN")
    rows = await audited(site)
    assert [row["outcome"] for row in rows] == [*["TOKEN_NOT_FOUND"] * 3, "FORBIDDEN"]
    assert VISA not in str(rows)


async def test_decrypt_is_a_post_on_the_workers_listener_only(site: Site) -> None:
    token = await tap(site)
    path = f"/internal/v1/payment-tokens/{token}/decrypt"
    wrong_method = await read(await site.worker.get(path))
    assert wrong_method.outcome == (405, "METHOD_NOT_ALLOWED")
    assert wrong_method.headers["Allow"] == "POST"
    headers = site.internal("payment:read payment:revoke payment:decrypt")
    assert (await look(site.http, token, headers=headers)).outcome == (404, "NOT_FOUND")
    assert await audited(site) == []


# ---- no row, no answer


async def test_with_the_database_away_nothing_is_revealed_and_it_comes_back_by_itself(
    state_dir: Path, database_url: str, database: Database
) -> None:
    async with proxied(database_url) as (proxy, url), running_site(state_dir, url) as site:
        token = await tap(site)
        assert (await look(site.worker, token)).status == 200
        proxy.cut()
        refused = [
            await look(site.worker, token),
            await look(site.worker, token, {"purpose": "none", "fields": ["pan"]}),
        ]
        for reply in refused:
            assert reply.outcome == (503, "UNAVAILABLE")
            assert int(reply.headers["Retry-After"]) >= 1
            assert reveals_nothing(reply)
        proxy.mend()

        async def answered() -> bool:
            return (await look(site.worker, token)).data == CLEAR

        await eventually(answered, errors=(KeyError,))
        assert (await verified(site))["ok"] is True
    looks = await database.fetchval(
        "SELECT count(*) FROM cde.decrypt_audit_log WHERE outcome = 'ok' AND action = 'decrypt'"
    )
    assert looks == 2


async def test_an_audit_log_that_cannot_be_written_lets_nothing_out(site: Site) -> None:
    token = await tap(site)
    assert (await look(site.worker, token)).status == 200
    await site.database.execute("ALTER TABLE cde.decrypt_audit_log RENAME TO away")
    for body in (GOOD, {"purpose": "none", "fields": ["pan"]}):
        reply = await look(site.worker, token, body)
        assert reply.outcome == (503, "UNAVAILABLE")
        assert "Retry-After" in reply.headers
        assert reveals_nothing(reply)
    await site.database.execute("ALTER TABLE cde.away RENAME TO decrypt_audit_log")
    assert (await look(site.worker, token)).data == CLEAR
    assert await outcomes(site) == ["ok", "ok"]
    assert (await verified(site))["ok"] is True


async def test_nothing_is_answered_before_the_audit_row_is_committed(
    site: Site, database: Database
) -> None:
    token = await tap(site)
    async with database.transaction() as holder:
        await holder.execute("LOCK TABLE cde.audit_heads IN SHARE MODE")
        looks = [
            asyncio.create_task(look(site.worker, token)),
            asyncio.create_task(look(site.worker, UNKNOWN)),
        ]
        await waits_for_a_lock(site)
        assert not any(task.done() for task in looks)
        assert await audited(site) == []
    good, unknown = await asyncio.gather(*looks)
    assert good.data == CLEAR
    assert unknown.status == 404
    assert sorted(map(str, await outcomes(site))) == ["TOKEN_NOT_FOUND", "ok"]


async def test_a_worker_that_hangs_up_before_its_answer_has_its_row_all_the_same(
    site: Site, database: Database
) -> None:
    token = await tap(site)
    async with database.transaction() as holder:
        await holder.execute("LOCK TABLE cde.audit_heads IN SHARE MODE")
        leaving = asyncio.create_task(look(site.worker, token))
        await waits_for_a_lock(site)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)

    async def written() -> bool:
        return await outcomes(site) == ["ok"]

    await eventually(written)
    assert (await verified(site))["ok"] is True


async def test_an_audit_log_that_hangs_ends_in_unavailable_and_not_in_an_answer(
    state_dir: Path, database_url: str, database: Database
) -> None:
    impatient = {"database": {"statement_timeout_s": 0.2}}
    async with running_site(state_dir, database_url, changes=impatient) as site:
        token = await tap(site)
        async with database.transaction() as holder:
            await holder.execute("LOCK TABLE cde.audit_heads IN SHARE MODE")
            reply = await look(site.worker, token)
            assert reply.outcome == (503, "UNAVAILABLE")
            assert reveals_nothing(reply)
        assert await audited(site) == []
        assert (await look(site.worker, token)).data == CLEAR
        assert (await verified(site))["ok"] is True


# ---- the rows


async def test_a_row_says_who_looked_from_where_at_what_why_and_under_which_id(
    site: Site, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    token = await tap(site)
    headers = {"X-Correlation-ID": "order-7", "X-Forwarded-For": "192.0.2.1"}
    good = await look(site.worker, token, headers=headers)
    assert good.headers["X-Correlation-ID"] == "order-7"
    unasked = await look(site.worker, token, {"purpose": "audit", "fields": ["track2"]})
    certificate = site.certificates.worker("spiffe://glamd/worker/demo").certificate
    row = {
        "actor": "demo",
        "certificate_sha256": x509.fingerprint(certificate),
        "ip": "127.0.0.1",
        "subject": token,
    }
    assert await audited(site) == [
        row
        | {
            "fields": ["pan", "expiry"],
            "purpose": "settlement",
            "outcome": "ok",
            "correlation_id": "order-7",
        },
        row
        | {
            "fields": ["track2"],
            "purpose": "audit",
            "outcome": "FORBIDDEN",
            "correlation_id": unasked.headers["X-Request-ID"],
        },
    ]
    output = capfd.readouterr()
    metrics = await (await site.http.get("/metrics")).text()
    assert not [text for text in (caplog.text, *output, metrics) if VISA in text]


async def test_fifty_looks_at_once_are_fifty_rows_in_one_unbroken_chain(site: Site) -> None:
    token = await tap(site)
    ids = {f"look-{number}" for number in range(50)}
    replies = await asyncio.gather(
        *(look(site.worker, token, headers={"X-Correlation-ID": each}) for each in ids)
    )
    assert all(reply.data == CLEAR for reply in replies)
    rows = await audited(site)
    assert len(rows) == 50
    assert {row["correlation_id"] for row in rows} == ids
    report = await verified(site)
    assert report["ok"] is True
    # The imports of the two key sets are rows as well, and the making of the four keyrings.
    assert report["rows"] == 56


async def test_an_outcome_that_was_changed_by_hand_is_found_and_looks_go_on(site: Site) -> None:
    token = await tap(site)
    assert (await look(site.worker, UNKNOWN)).status == 404
    assert (await look(site.worker, token)).status == 200
    await site.database.execute(
        "UPDATE cde.decrypt_audit_log SET outcome = 'TOKEN_NOT_FOUND' WHERE outcome = 'ok'"
        " AND action = 'decrypt'"
    )
    assert (await look(site.worker, token)).status == 200
    report = await verified(site)
    assert report["ok"] is False
    broken = report["first_broken"]
    assert isinstance(broken, dict)
    assert (broken["seq"], broken["reason"]) == (8, "changed")
