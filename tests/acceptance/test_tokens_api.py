"""Payment tokens over REST, from outside: who sees which, page by page, and what revoking does."""

import asyncio
import base64
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import cast
from unittest.mock import ANY
from uuid import UUID, uuid4

from device_gateway.terminal import Answer
from device_gateway.terminal_card import CardReader, DemoCard, clear_form
from device_gateway.terminal_device import Counters
from glamd.db import Database
from tests.support.looks import CARD, Reply, read, tap
from tests.support.postgres import eventually
from tests.support.proxy import proxied
from tests.support.site import ANSWER_TIMEOUT_S, VISA, Site, running_site

LIST = "/api/v1/payment-tokens"
UNKNOWN = "ptk_" + "0" * 26


async def get(site: Site, path: str, headers: Mapping[str, str], **query: object) -> Reply:
    """GET on the api listener."""
    params = {name: str(value) for name, value in query.items()}
    return await read(await site.http.get(path, headers=headers, params=params))


async def delete(site: Site, token: str, headers: Mapping[str, str]) -> Reply:
    """Revoke a token."""
    return await read(await site.http.delete(f"{LIST}/{token}", headers=headers))


async def another_merchant(site: Site) -> UUID:
    """A merchant beside the site's own."""
    merchant_id = uuid4()
    await site.daemon.merchants.create(
        platform="custom", shop_id="2", domain="other.example", merchant_id=merchant_id
    )
    return merchant_id


async def tapped(site: Site, count: int, *, broken_every: int = 0) -> list[str]:
    """The tokens of so many taps on one terminal, newest first; some cards may be none."""
    device = await site.enroll()
    # Counters are set aside for all taps at once, which saves a sync to disk for each.
    source = CardReader(device, Counters(device, block=2 * count))
    good = clear_form(CARD, "track2")
    bad = clear_form(DemoCard(pan="4242424242424241"), "track2")
    terminal = await site.terminal(device)
    tokens: list[str] = []

    async def ask(request_id: str, clear: bytes) -> Answer:
        payload = source.request(request_id, clear, "track2")
        return await terminal.ask(request_id, payload, timeout_s=ANSWER_TIMEOUT_S)

    while len(tokens) < count:
        number = len(tokens)
        if broken_every and number % broken_every == 0:
            assert (await ask(f"broken-{number}", bad)).code == "DECRYPT_FAILED"
        tokens.append((await ask(f"good-{number}", good)).text("token"))
    return tokens[::-1]


def names(reply: Reply) -> list[str]:
    """The tokens on a page."""
    assert reply.status == 200, reply.body
    return [item["token"] for item in cast("list[dict[str, str]]", reply.data)]


def pagination(reply: Reply) -> dict[str, object]:
    """What a page says about its list."""
    return cast("dict[str, object]", reply.json["pagination"])


def without_meta(reply: Reply) -> dict[str, object]:
    """An answer but for what differs from request to request."""
    return {name: value for name, value in reply.json.items() if name != "meta"}


# ---- one token


async def test_a_foreign_merchants_token_is_as_unknown_as_one_that_never_was(site: Site) -> None:
    token = await tap(site)
    foreign = site.client(await another_merchant(site))
    shown = await get(site, f"{LIST}/{token}", foreign)
    unknown = await get(site, f"{LIST}/{UNKNOWN}", foreign)
    assert shown.outcome == unknown.outcome == (404, "TOKEN_NOT_FOUND")
    assert without_meta(shown) == without_meta(unknown)
    deleted, never = await delete(site, token, foreign), await delete(site, UNKNOWN, foreign)
    assert deleted.outcome == never.outcome == (404, "TOKEN_NOT_FOUND")
    assert without_meta(deleted) == without_meta(never)
    mine = await get(site, f"{LIST}/{token}", site.client())
    assert cast("dict[str, object]", mine.data)["status"] == "active"


async def test_what_cannot_be_a_token_is_unknown_too(site: Site) -> None:
    for token in ("ptk_", VISA, "ptk_" + "0" * 65, "ptk_%00" + "0" * 26, "%2e%2e"):
        reply = await get(site, f"{LIST}/{token}", site.client())
        assert reply.status == 404
        assert VISA.encode() not in reply.body


async def test_without_a_token_or_without_the_scope_nobody_sees_or_revokes_anything(
    site: Site,
) -> None:
    token = await tap(site)
    for headers in ({}, {"Authorization": "Bearer x.y.z"}, {"Authorization": "Basic eDp5"}):
        for reply in (await get(site, LIST, headers), await delete(site, token, headers)):
            assert reply.outcome == (401, "UNAUTHENTICATED")
            assert reply.headers["WWW-Authenticate"].startswith("Bearer")
    merchant_id = site.merchant_id
    reader, revoker = site.internal("payment:read"), site.internal("payment:revoke")
    for reply in (
        await delete(site, token, reader),
        await get(site, f"{LIST}/{token}", revoker),
        await get(site, LIST, revoker, merchant_id=merchant_id),
        await get(site, LIST, site.internal(""), merchant_id=merchant_id),
    ):
        assert reply.outcome == (403, "FORBIDDEN")
    assert (await get(site, f"{LIST}/{token}", reader)).status == 200
    assert (await delete(site, token, revoker)).status == 200


async def test_a_token_is_shown_with_its_metadata_and_never_with_a_card_number(
    site: Site,
) -> None:
    device = await site.enroll()
    token, again = [await tap(site, device) for _ in range(2)]
    replies = [
        await get(site, f"{LIST}/{token}", headers) for headers in (site.client(), site.internal())
    ]
    assert replies[0].data == replies[1].data
    shown = cast("dict[str, str]", replies[0].data)
    created_at, expires_at, fingerprint = (
        shown.pop(name) for name in ("created_at", "expires_at", "fingerprint")
    )
    assert shown == {
        "token": token,
        "brand": "visa",
        "bin": "42424242",
        "last4": "4242",
        "exp_month": 12,
        "exp_year": 2049,
        "entry_mode": "magstripe",
        "device_id": device.device_id,
        "status": "active",
        "has_sensitive_data": False,
    }
    lifetime = datetime.fromisoformat(expires_at) - datetime.fromisoformat(created_at)
    assert lifetime.total_seconds() == 24 * 3600
    assert VISA.encode() not in replies[0].body
    # The same card is known again by its fingerprint, by the same merchant only.
    other = await get(site, f"{LIST}/{again}", site.client())
    assert cast("dict[str, str]", other.data)["fingerprint"] == fingerprint
    stranger = await site.enroll(merchant_id=await another_merchant(site))
    theirs = await get(site, f"{LIST}/{await tap(site, stranger)}", site.internal())
    assert cast("dict[str, str]", theirs.data)["fingerprint"] != fingerprint


# ---- lists


async def test_an_internal_list_needs_a_merchant_and_a_clients_own_is_the_only_one_it_has(
    site: Site,
) -> None:
    token = await tap(site)
    other = await another_merchant(site)
    missing = await get(site, LIST, site.internal())
    assert missing.outcome == (422, "VALIDATION_ERROR")
    assert cast("list[dict[str, str]]", missing.json["errors"])[0]["field"] == "merchant_id"
    assert names(await get(site, LIST, site.internal(), merchant_id=site.merchant_id)) == [token]
    assert names(await get(site, LIST, site.internal(), merchant_id=other)) == []
    assert names(await get(site, LIST, site.internal(), merchant_id=uuid4())) == []
    assert names(await get(site, LIST, site.client())) == [token]
    assert names(await get(site, LIST, site.client(), merchant_id=site.merchant_id)) == [token]
    assert (await get(site, LIST, site.client(), merchant_id=other)).status == 404
    assert names(await get(site, LIST, site.client(other))) == []


async def test_pages_and_cursors_show_every_token_once_newest_first_and_count_them_right(
    site: Site,
) -> None:
    await tap(site, await site.enroll(merchant_id=await another_merchant(site)))
    expected = await tapped(site, 120, broken_every=10)
    first = await get(site, LIST, site.client())
    assert names(first) == expected[:50]
    assert pagination(first) == {
        "page": 1,
        "limit": 50,
        "total": 120,
        "pages": 3,
        "has_next": True,
        "has_previous": False,
        "next_cursor": pagination(first)["next_cursor"],
    }
    for limit, headers in ((50, site.client()), (40, site.client()), (7, site.internal())):
        query = {"limit": limit, "merchant_id": site.merchant_id}
        by_page, by_cursor = [], []
        pages = -(-120 // limit)
        cursor: dict[str, object] = {}
        for number in range(1, pages + 1):
            paged = await get(site, LIST, headers, page=number, **query)
            followed = await get(site, LIST, headers, **cursor, **query)
            by_page += names(paged)
            by_cursor += names(followed)
            for reply in (paged, followed):
                found = pagination(reply)
                assert (found["total"], found["pages"]) == (120, pages)
                assert found["has_next"] is (number < pages)
                assert found["has_previous"] is (number > 1)
                assert (found["next_cursor"] is not None) is (number < pages)
            cursor = {"cursor": pagination(followed)["next_cursor"]}
        assert by_page == expected
        assert by_cursor == expected
    beyond = await get(site, LIST, site.client(), page=4)
    assert names(beyond) == []
    assert pagination(beyond)["has_next"] is False
    assert pagination(beyond)["total"] == 120


async def test_a_walk_by_cursor_neither_repeats_nor_skips_when_tokens_come_and_go_meanwhile(
    site: Site,
) -> None:
    expected = await tapped(site, 6)
    first = await get(site, LIST, site.client(), limit=3)
    cursor = pagination(first)["next_cursor"]
    await tap(site)
    # Also the token that the cursor stands on may change; it does not disappear.
    await delete(site, expected[2], site.client())
    second = await get(site, LIST, site.client(), limit=3, cursor=cursor)
    assert names(first) + names(second) == expected
    assert pagination(second)["total"] == 7
    assert pagination(second)["next_cursor"] is None


def forged(text: str | bytes) -> str:
    """What looks like a cursor and says this."""
    raw = text if isinstance(text, bytes) else text.encode()
    return base64.urlsafe_b64encode(raw).decode()


WRONG_QUERIES = {
    "limit": ["0", "-1", "201", "ten", "", "1e3", "9" * 40],
    "page": ["0", "-1", "first", "10001", "9" * 40],
    "merchant_id": ["me", "0", VISA],
    "cursor": [
        "x",
        "\u00e4",
        "=" * 600,
        forged("2026-01-01T00:00:00"),
        forged(f"2026-01-01T00:00:00|{UNKNOWN}"),
        forged(f"2026-01-01T00:00:00+00:00|{UNKNOWN}\0"),
        forged("2026-01-01T00:00:00+00:00|\u00e4"),
        forged(b"\xff|" + UNKNOWN.encode()),
        # Moments that exist where they are said to be, and in no year of ours in UTC.
        forged(f"0001-01-01T00:00:00+23:59|{UNKNOWN}"),
        forged(f"9999-12-31T23:59:59-23:59|{UNKNOWN}"),
        forged(f"now|{UNKNOWN}"),
        forged(f"infinity|{UNKNOWN}"),
    ],
}


async def test_a_wrong_query_is_named_and_not_echoed(site: Site) -> None:
    for field, values in WRONG_QUERIES.items():
        for value in values:
            reply = await get(site, LIST, site.client(), **{field: value})
            assert reply.outcome == (422, "VALIDATION_ERROR"), (field, value)
            errors = cast("list[dict[str, str]]", reply.json["errors"])
            assert [error["field"] for error in errors] == [field]
            assert VISA.encode() not in reply.body


async def test_a_page_and_a_cursor_together_and_a_repeated_field_are_refused(site: Site) -> None:
    await tapped(site, 2)
    cursor = pagination(await get(site, LIST, site.client(), limit=1))["next_cursor"]
    both = await get(site, LIST, site.client(), page=1, cursor=cursor)
    assert both.outcome == (422, "VALIDATION_ERROR")
    twice = await get(site, f"{LIST}?limit=1&limit=2", site.client())
    assert twice.outcome == (422, "VALIDATION_ERROR")


# ---- revoking


async def test_a_revoked_token_stays_revoked_its_ciphertext_is_gone_and_its_metadata_stays(
    site: Site,
) -> None:
    token = await tap(site)
    path = f"{LIST}/{token}"
    before = cast("dict[str, object]", (await get(site, path, site.client())).data)
    for headers in (site.client(), site.client(), site.internal("payment:revoke")):
        reply = await delete(site, token, headers)
        assert reply.status == 200
        assert reply.data == {"token": token, "status": "revoked"}
    assert await site.database.fetchval("SELECT count(*) FROM cde.token_secrets") == 0
    await site.database.execute("UPDATE cde.payment_tokens SET expires_at = now()")
    after = cast("dict[str, object]", (await get(site, path, site.client())).data)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"status", "expires_at"}
    assert after["status"] == "revoked"
    listed = await get(site, LIST, site.client())
    assert names(listed) == [token]
    assert pagination(listed)["total"] == 1


async def test_an_expired_token_shows_as_that_and_can_still_be_revoked(site: Site) -> None:
    token = await tap(site)
    await site.database.execute("UPDATE cde.payment_tokens SET expires_at = now()")
    shown = await get(site, f"{LIST}/{token}", site.client())
    assert cast("dict[str, str]", shown.data)["status"] == "expired"
    assert (await delete(site, token, site.client())).data == {"token": token, "status": "revoked"}


async def test_ten_revocations_at_once_are_one_event_under_the_callers_correlation_id(
    site: Site,
) -> None:
    token = await tap(site)
    headers = site.client() | {"X-Correlation-ID": "case-9"}
    replies = await asyncio.gather(*(delete(site, token, headers) for _ in range(10)))
    assert {reply.status for reply in replies} == {200}
    events = await site.database.fetch(
        "SELECT subject, merchant_id, correlation_id, data->>'token' AS token FROM cde.outbox"
        " WHERE subject LIKE '%revoked%'"
    )
    assert [tuple(event) for event in events] == [
        ("evt.payment.token.revoked.v1", site.merchant_id, "case-9", token)
    ]


# ---- what every answer has


async def test_ids_come_back_on_answers_and_on_errors_and_bad_ones_are_replaced(
    site: Site,
) -> None:
    given = {"X-Request-ID": "req-1", "X-Correlation-ID": "cor-1"}
    for path, headers in ((LIST, site.client()), (LIST, {}), ("/nowhere", {}), ("/healthz", {})):
        reply = await get(site, path, {**headers, **given})
        assert {name: reply.headers[name] for name in given} == given
        meta = cast("dict[str, str]", reply.json["meta"])
        assert (meta["request_id"], meta["correlation_id"]) == ("req-1", "cor-1")
        assert datetime.fromisoformat(meta["timestamp"]).tzinfo is not None
    made = await get(site, LIST, site.client() | {"X-Request-ID": "a b\u00a0" + VISA})
    assert made.headers["X-Request-ID"] == made.headers["X-Correlation-ID"]
    assert VISA not in made.headers["X-Request-ID"]


async def test_a_problem_says_the_same_twice_for_newer_and_for_older_clients(site: Site) -> None:
    reply = await get(site, LIST, site.client(), limit=0)
    assert reply.headers["Content-Type"] == "application/problem+json"
    problem = reply.json
    assert {name: problem[name] for name in ("type", "title", "status", "code")} == {
        "type": "about:blank",
        "title": "Unprocessable Entity",
        "status": 422,
        "code": "VALIDATION_ERROR",
    }
    assert problem["error"] == {
        "code": problem["code"],
        "message": problem["detail"],
        "details": problem["errors"],
    }
    assert set(problem) == {
        *("type", "title", "status", "detail", "code", "errors", "error", "meta")
    }


async def test_a_caller_over_its_rate_is_told_when_to_come_again_and_others_are_served(
    state_dir: Path, database_url: str
) -> None:
    slow = {"http": {"rate_limit_per_s": 0.02, "rate_burst": 2}}
    async with running_site(state_dir, database_url, changes=slow) as site:
        codes = [(await get(site, LIST, site.client())).status for _ in range(2)]
        assert codes == [200, 200]
        refused = await get(site, LIST, site.client())
        assert refused.outcome == (429, "RATE_LIMITED")
        assert 1 <= int(refused.headers["Retry-After"]) <= 50
        headers = site.internal()
        assert (await get(site, LIST, headers, merchant_id=site.merchant_id)).status == 200


async def test_with_the_database_away_the_api_is_unavailable_lives_and_says_so(
    state_dir: Path, database_url: str, database: Database
) -> None:
    async with proxied(database_url) as (proxy, url), running_site(state_dir, url) as site:
        token = await tap(site)
        proxy.cut()
        for reply in (
            await get(site, f"{LIST}/{token}", site.client()),
            await get(site, LIST, site.client()),
            await delete(site, token, site.client()),
            await get(site, "/readyz", {}),
        ):
            assert reply.outcome == (503, "UNAVAILABLE")
            assert int(reply.headers["Retry-After"]) >= 1
        assert (await get(site, "/healthz", {})).status == 200
    revoked = await database.fetchval("SELECT count(revoked_at) FROM cde.payment_tokens")
    assert revoked == 0


async def test_both_listeners_say_that_they_live_are_ready_and_what_they_count(
    site: Site,
) -> None:
    await tap(site)
    for session in (site.http, site.worker):
        for path in ("/healthz", "/health"):
            alive = await read(await session.get(path))
            assert (alive.status, alive.data) == (200, {"status": "ok"})
        ready = await read(await session.get("/readyz"))
        assert ready.status == 200, "it can do without NATS, which is not there"
        assert ready.data == {"status": "degraded", "degraded": {"nats": ANY}}
        metrics = await read(await session.get("/metrics"))
        assert metrics.headers["Content-Type"].startswith("text/plain")
        assert b"glamd_payments_sealed_cards_total" in metrics.body
        head = await read(await session.head("/healthz"))
        assert (head.status, head.body) == (200, b"")


# ---- a merchant's settings


async def test_a_merchants_lifetime_of_tokens_holds_for_its_terminals_within_seconds(
    site: Site,
) -> None:
    device = await site.enroll()
    await tap(site, device)
    await site.daemon.merchants.configure(site.merchant_id, token_ttl_s=3600)

    async def is_known() -> bool:
        reply = await get(site, f"{LIST}/{await tap(site, device)}", site.client())
        shown = cast("dict[str, str]", reply.data)
        ends, began = (datetime.fromisoformat(shown[n]) for n in ("expires_at", "created_at"))
        return (ends - began).total_seconds() == 3600

    await eventually(is_known)
