"""`authorized` and the grants, from outside: what is erased when, what stays, who may say so."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest

from device_gateway.terminal_card import clear_form
from glamd import config
from glamd.clock import SystemClock
from glamd.embedded.certificates import DevelopmentCertificates
from glamd.embedded.settings import Ports, development_settings
from glamd.errors import ConfigError
from tests.support.looks import (
    CARD,
    CLEAR,
    audited,
    authorized,
    look,
    outcomes,
    read,
    tap,
    verified,
    worker_named,
)
from tests.support.site import NOBODY, VISA, Site, running_site

UNKNOWN = "ptk_" + "0" * 26
SENSITIVE = {"purpose": "settlement", "fields": ["pan", "track2"]}
TRACK2 = clear_form(CARD, "track2").decode().strip(";?")


async def keeping(site: Site) -> None:
    """Have the merchant's tokens keep what is sensitive until they are authorized."""
    await site.database.execute("UPDATE cde.merchants SET sensitive_data = 'until-authorized'")


async def shown(site: Site, token: str) -> Mapping[str, object]:
    """A token's metadata, as its merchant sees it."""
    path = f"/api/v1/payment-tokens/{token}"
    return cast(
        "Mapping[str, object]", (await read(await site.http.get(path, headers=site.client()))).data
    )


def grants(name: str, /, **changes: object) -> dict[str, dict[str, object]]:
    """Settings with one worker's grant and no other."""
    whole = {
        "name": name,
        "purposes": ["settlement"],
        "fields": ["pan", "expiry"],
        "merchants": "*",
        "rate_per_s": 1000,
    }
    return {"worker": {"grants": [whole | changes]}}


def settings_of(
    state_dir: Path, database_url: str, changes: Mapping[str, Mapping[str, object]]
) -> config.Settings:
    """The site's settings with other grants."""
    return development_settings(
        state_dir,
        DevelopmentCertificates(state_dir, SystemClock()),
        database_url=database_url,
        nats_url=NOBODY,
        ports=Ports(http=0, worker=0, mqtt=0),
        changes=changes,
    )


# ---- who may not, and what cannot be


async def test_outside_a_grant_nothing_is_erased_and_each_attempt_is_a_row(
    state_dir: Path, database_url: str
) -> None:
    elsewhere = grants("settler", merchants=[str(uuid4())])
    async with running_site(state_dir, database_url, changes=elsewhere) as site:
        await keeping(site)
        token = await tap(site)
        assert (await authorized(site.worker, token)).outcome == (403, "FORBIDDEN")
        async with worker_named(site) as settler:
            assert (await authorized(settler, token)).outcome == (403, "FORBIDDEN")
        assert (await shown(site, token))["has_sensitive_data"] is True
        rows = await audited(site, "authorized")
        assert [(row["actor"], row["outcome"]) for row in rows] == [
            ("demo", "FORBIDDEN"),
            ("settler", "FORBIDDEN"),
        ]


async def test_unknown_revoked_and_expired_tokens_and_bad_bodies_are_told_apart_each_with_a_row(
    site: Site,
) -> None:
    device = await site.enroll()
    revoked, expired = await tap(site, device), await tap(site, device)
    path = f"/api/v1/payment-tokens/{revoked}"
    assert (await site.http.delete(path, headers=site.client())).status == 200
    await site.database.execute(
        "UPDATE cde.payment_tokens SET expires_at = now() - interval '1 ms' WHERE token = $1",
        expired,
    )
    json = {"Content-Type": "application/json"}
    replies = [
        *[await authorized(site.worker, token) for token in (UNKNOWN, VISA, revoked, expired)],
        await authorized(site.worker, UNKNOWN, b"{", **json),
        await authorized(site.worker, UNKNOWN, b'{"fields": ["pan"]}', **json),
        await authorized(site.worker, UNKNOWN, b"{}"),
    ]
    assert [reply.outcome for reply in replies] == [
        (404, "TOKEN_NOT_FOUND"),
        (404, "TOKEN_NOT_FOUND"),
        (410, "TOKEN_REVOKED"),
        (410, "TOKEN_EXPIRED"),
        (400, "MALFORMED_JSON"),
        (422, "VALIDATION_ERROR"),
        (415, "UNSUPPORTED_MEDIA_TYPE"),
    ]
    rows = await audited(site, "authorized")
    assert [row["outcome"] for row in rows] == [reply.outcome[1] for reply in replies]
    assert VISA not in str(rows)
    assert await outcomes(site) == []


async def test_it_is_a_post_on_the_workers_listener_only(site: Site) -> None:
    token = await tap(site)
    path = f"/internal/v1/payment-tokens/{token}/authorized"
    assert (await read(await site.worker.get(path))).outcome == (405, "METHOD_NOT_ALLOWED")
    reply = await read(await site.http.post(path, headers=site.internal("payment:revoke")))
    assert reply.outcome == (404, "NOT_FOUND")
    assert await audited(site, "authorized") == []


# ---- what it does


async def test_what_is_sensitive_goes_with_the_report_and_the_card_number_stays(
    site: Site,
) -> None:
    await keeping(site)
    token = await tap(site)
    assert (await shown(site, token))["has_sensitive_data"] is True
    before = await look(site.worker, token, SENSITIVE)
    assert before.data == {"pan": VISA, "track2": TRACK2}
    for _ in range(2):
        reply = await authorized(site.worker, token)
        assert (reply.status, reply.data) == (
            200,
            {"token": token, "status": "active", "has_sensitive_data": False},
        )
    assert (await shown(site, token))["has_sensitive_data"] is False
    assert (await look(site.worker, token, SENSITIVE)).data == {"pan": VISA, "track2": None}
    assert [row["outcome"] for row in await audited(site, "authorized")] == ["ok", "ok"]
    assert (await verified(site))["ok"] is True


async def test_a_token_that_never_had_any_is_reported_as_well_and_ten_at_once_are_the_same(
    site: Site,
) -> None:
    token = await tap(site)
    replies = await asyncio.gather(*(authorized(site.worker, token) for _ in range(10)))
    assert {reply.status for reply in replies} == {200}
    assert len(await audited(site, "authorized")) == 10
    assert (await look(site.worker, token)).data == CLEAR


# ---- grants that change


async def test_grants_are_others_after_a_reload_without_a_restart(
    state_dir: Path, database_url: str
) -> None:
    before = grants("settler")
    async with running_site(state_dir, database_url, changes=before) as site:
        token = await tap(site)
        async with worker_named(site) as settler:
            assert (await look(settler, token)).data == CLEAR
            narrower = grants("settler", fields=["expiry"])
            await site.daemon.reload(settings_of(state_dir, database_url, narrower))
            # On the connection that it has already.
            assert (await look(settler, token)).outcome == (403, "FORBIDDEN")
            expiry = {"purpose": "settlement", "fields": ["expiry"]}
            assert (await look(settler, token, expiry)).data == {"expiry": CLEAR["expiry"]}

            others = grants("demo")
            await site.daemon.reload(settings_of(state_dir, database_url, others))
            assert (await look(settler, token, expiry)).outcome == (403, "FORBIDDEN")
        assert (await look(site.worker, token)).data == CLEAR
        assert await outcomes(site) == ["ok", "FORBIDDEN", "ok", "FORBIDDEN", "ok"]


async def test_a_reload_that_is_refused_leaves_the_grants_as_they_were(
    state_dir: Path, database_url: str
) -> None:
    before = grants("settler")
    async with running_site(state_dir, database_url, changes=before) as site:
        token = await tap(site)
        common = settings_of(
            state_dir,
            database_url,
            {
                "worker": {
                    **grants("demo")["worker"],
                    "client_ca": site.certificates.device_ca.certificate_file,
                }
            },
        )
        with pytest.raises(ConfigError, match="in common"):
            await site.daemon.reload(common)
        async with worker_named(site) as settler:
            assert (await look(settler, token)).data == CLEAR
        assert (await look(site.worker, token)).outcome == (403, "FORBIDDEN")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"purposes": []}, "worker.grants[0].purposes"),
        ({"fields": ["cvv"]}, "worker.grants[0].fields[0]"),
        ({"merchants": ["shop.example"]}, "worker.grants[0].merchants"),
        ({"rate_per_s": 0}, "worker.grants[0].rate_per_s"),
        ({"feilds": ["pan"]}, "worker.grants[0].feilds"),
        ({"name": ""}, "worker.grants[0].name"),
    ],
)
def test_a_grant_that_is_wrong_is_named_by_its_setting(
    state_dir: Path, changes: dict[str, object], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(state_dir, "postgresql:///", grants("settler", **changes))
    assert any(each.field.startswith(field) for each in caught.value.fields)
