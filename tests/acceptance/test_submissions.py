"""Submission over HTTP, from outside: every code of MQTT with its status, and one effect."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import aiohttp
import orjson
import pytest

from device_gateway.terminal_card import DemoCard, clear_form
from device_gateway.terminal_device import Device
from tests.support.looks import CLEAR, Reply, look, read, worker_with
from tests.support.proxy import proxied
from tests.support.site import VISA, Site, reader, running_site

PATH = "/api/v1/payment-tokens"
TRACK = clear_form(DemoCard(pan=VISA, expiry="4912"), "track2")
UNPROCESSABLE, CONFLICT, FORBIDDEN = 422, 409, 403


def request(device: Device, /, *, clear: bytes = TRACK, **changes: object) -> dict[str, object]:
    """A good request of this device, with some fields changed after it was made."""
    made: dict[str, object] = orjson.loads(
        reader(device).request(secrets.token_hex(8), clear, "track2")
    )
    return made | changes


async def submit(
    session: aiohttp.ClientSession, body: object, headers: Mapping[str, str] | None = None
) -> Reply:
    """A submission of this body."""
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    sent = {"Content-Type": "application/json", **(headers or {})}
    return await read(await session.post(PATH, data=raw, headers=sent))


class Way:
    """Two ways for one device: with its own certificate, and by a service that names it."""

    def __init__(self, site: Site, device: Device, session: aiohttp.ClientSession) -> None:
        self.site = site
        self.device = device
        self.session = session

    async def by_device(self, body: object) -> Reply:
        """Over mutual TLS."""
        return await submit(self.session, body)

    async def by_service(self, body: dict[str, object]) -> Reply:
        """With a JWT."""
        named = body | {"device_id": self.device.device_id}
        return await submit(self.site.http, named, self.site.internal("payment:tokenize"))

    async def both(self, body: dict[str, object]) -> tuple[int, str]:
        """What is answered both ways, which must be the same."""
        one, other = await self.by_device(body), await self.by_service(body)
        assert one.outcome == other.outcome
        assert VISA.encode() not in one.body + other.body
        return one.outcome


@asynccontextmanager
async def ways(site: Site, device: Device | None = None) -> AsyncIterator[Way]:
    """Ways for this device, or for a new one."""
    device = device or await site.enroll()
    async with worker_with(site, device.cert, device.key) as session:
        yield Way(site, device, session)


@pytest.fixture
async def way(site: Site) -> AsyncIterator[Way]:
    """Ways for a device of the site's merchant."""
    async with ways(site) as found:
        yield found


async def tokens(site: Site) -> object:
    """How many tokens there are."""
    return await site.database.fetchval("SELECT count(*) FROM cde.payment_tokens")


async def spent(site: Site) -> object:
    """How many counters were spent."""
    return await site.database.fetchval("SELECT sum(version)::int FROM cde.device_counters")


# ---- what is wrong with the request


async def test_a_malformed_field_is_named_and_its_value_is_not_repeated(way: Way) -> None:
    for reply in (
        await way.by_device(request(way.device, ksn="4242424242424242zz")),
        await way.by_service(request(way.device, ksn="4242424242424242zz")),
    ):
        assert reply.outcome == (UNPROCESSABLE, "MALFORMED")
        assert [each["field"] for each in cast("list[dict[str, str]]", reply.json["errors"])] == [
            "ksn"
        ]
        assert b"4242" not in reply.body


@pytest.mark.parametrize(
    "changes",
    [
        *({"v": 2}, {"type": "settle"}, {"scheme": "rsa"}, {"format": "track3"}),
        *({"type": "ping"}, {"type": "heartbeat"}, {"type": "batch", "items": []}),
    ],
)
async def test_what_is_not_served_is_unsupported(way: Way, changes: dict[str, object]) -> None:
    assert await way.both(request(way.device) | changes) == (UNPROCESSABLE, "UNSUPPORTED")


async def test_more_than_16_kib_or_too_many_levels_is_malformed(way: Way) -> None:
    deep: object = 1
    for _ in range(9):
        deep = [deep]
    for newer in ("x" * 16_384, deep):
        assert await way.both(request(way.device, newer=newer)) == (UNPROCESSABLE, "MALFORMED")


async def test_ksn_mac_and_card_are_judged_as_over_mqtt(way: Way) -> None:
    site, device = way.site, way.device
    other = request(await site.enroll())
    assert await way.both(request(device, ksn=other["ksn"])) == (UNPROCESSABLE, "KSN_MISMATCH")
    zero = device.ksn_at(0).hex()
    assert await way.both(request(device, ksn=zero)) == (UNPROCESSABLE, "KSN_INVALID")
    assert await way.both(request(device, mac="00" * 8)) == (UNPROCESSABLE, "MAC_INVALID")
    assert await spent(site) == 0
    no_card = request(device, clear=b"garbage that is no track")
    first = await way.by_device(no_card)
    assert first.outcome == (UNPROCESSABLE, "DECRYPT_FAILED")
    assert "Idempotent-Replayed" not in first.headers
    again = await way.by_service(no_card)
    assert again.outcome == (UNPROCESSABLE, "DECRYPT_FAILED")
    assert again.headers["Idempotent-Replayed"] == "true"
    assert await way.both(no_card | {"id": "other"}) == (CONFLICT, "KSN_REPLAYED")
    assert (await tokens(site), await spent(site)) == (0, 1)


async def test_a_retired_key_set_is_unknown(way: Way) -> None:
    await way.site.database.execute("UPDATE cde.key_sets SET status = 'retired'")
    assert await way.both(request(way.device)) == (UNPROCESSABLE, "KEY_SET_UNKNOWN")


# ---- what contradicts what was


async def test_a_counter_that_is_used_or_behind_the_window_and_an_id_with_other_content(
    site: Site,
) -> None:
    await site.database.execute("UPDATE cde.key_sets SET counter_window = 8")
    async with ways(site) as way:
        taps = [request(way.device) for _ in range(12)]
        assert (await way.by_device(taps[11])).status == 201
        assert await way.both(taps[0]) == (CONFLICT, "KSN_TOO_OLD")
        assert await way.both(taps[11] | {"id": "another"}) == (CONFLICT, "KSN_REPLAYED")
        changed = taps[11] | {"entry_mode": "manual"}
        assert await way.both(changed) == (CONFLICT, "REQUEST_ID_REUSED")
    assert await tokens(site) == 1


# ---- devices that may not


async def test_a_suspended_device_is_refused_and_served_again_after_resume(way: Way) -> None:
    payload = request(way.device)
    registry = way.site.daemon.registry
    await registry.suspend(way.device.device_id)
    assert await way.both(payload) == (FORBIDDEN, "DEVICE_SUSPENDED")
    await registry.resume(way.device.device_id)
    assert (await way.by_device(payload)).status == 201


async def test_a_revoked_device_is_refused_on_a_connection_that_it_has_already(way: Way) -> None:
    assert (await way.by_device(request(way.device))).status == 201
    await way.site.daemon.registry.revoke(way.device.device_id)
    assert await way.both(request(way.device)) == (FORBIDDEN, "DEVICE_REVOKED")
    assert await tokens(way.site) == 1


async def test_a_certificate_whose_time_is_over_is_refused_though_its_connection_lives(
    way: Way,
) -> None:
    assert (await way.by_device(request(way.device))).status == 201
    await way.site.database.execute(
        "UPDATE cde.devices SET certificate_expires_at = now() WHERE device_id = $1",
        way.device.device_id,
    )
    refused = await way.by_device(request(way.device))
    assert refused.outcome == (FORBIDDEN, "DEVICE_CERTIFICATE_EXPIRED")


async def test_a_certificate_that_was_replaced_is_refused_at_once(way: Way) -> None:
    assert (await way.by_device(request(way.device))).status == 201
    await way.site.database.execute(
        "UPDATE cde.devices SET certificate_sha256 = encode(sha256('newer'), 'hex')"
    )
    refused = await way.by_device(request(way.device))
    assert refused.outcome == (FORBIDDEN, "DEVICE_CERTIFICATE_REPLACED")
    # It says nothing of a service, which shows none.
    assert (await way.by_service(request(way.device))).status == 201


async def test_a_certificate_of_ours_without_a_device_is_told_so(way: Way) -> None:
    payload = request(way.device)
    await way.site.database.execute("DELETE FROM cde.devices")
    assert await way.both(payload) == (FORBIDDEN, "DEVICE_UNKNOWN")


async def test_a_device_does_not_speak_for_another_nor_does_a_client_for_any(way: Way) -> None:
    other = await way.site.enroll()
    stolen = request(other, device_id=other.device_id)
    assert (await way.by_device(stolen)).outcome == (FORBIDDEN, "FORBIDDEN")
    for headers in (way.site.client(), way.site.internal("payment:read payment:revoke")):
        refused = await submit(way.site.http, stolen, headers)
        assert refused.outcome == (FORBIDDEN, "FORBIDDEN")
    assert (await submit(way.site.worker, stolen)).outcome == (FORBIDDEN, "FORBIDDEN")
    assert await spent(way.site) == 0


# ---- not now


async def test_a_device_over_its_rate_is_told_when_to_come_again(
    state_dir: Path, database_url: str
) -> None:
    slow = {"mqtt": {"rate_limit_per_s": 0.01, "rate_burst": 2}}
    async with running_site(state_dir, database_url, changes=slow) as site, ways(site) as way:
        served = 0
        for send in (way.by_device, way.by_service):
            while (reply := await send(request(way.device))).status == 201:
                served += 1
            assert reply.outcome == (429, "RATE_LIMITED")
            assert int(reply.headers["Retry-After"]) >= 1
        # Its session starts anew, once, when the node hears that the device was enrolled.
        assert 2 <= served <= 4
        assert await spent(site) == served


async def test_a_fault_of_ours_is_internal_and_the_resend_succeeds(way: Way) -> None:
    payload = request(way.device)
    assert (await way.by_device(request(way.device))).status == 201
    await way.site.database.execute("ALTER TABLE cde.payment_tokens RENAME TO away")
    refused = await way.by_device(payload)
    assert refused.outcome == (503, "INTERNAL")
    assert "Retry-After" in refused.headers
    await way.site.database.execute("ALTER TABLE cde.away RENAME TO payment_tokens")
    good = await way.by_service(payload)
    assert (good.status, field(good, "replayed")) == (201, False)


async def test_with_the_database_away_it_is_unavailable_and_nothing_is_used_up(
    state_dir: Path, database_url: str
) -> None:
    async with (
        proxied(database_url) as (proxy, url),
        running_site(state_dir, url) as site,
        ways(site) as way,
    ):
        payload = request(way.device)
        assert (await way.by_device(request(way.device))).status == 201
        proxy.cut()
        assert await way.both(payload) == (503, "UNAVAILABLE")
        proxy.mend()
        async with asyncio.timeout(20):
            while (reply := await way.by_device(payload)).status != 201:
                assert reply.outcome == (503, "UNAVAILABLE")


# ---- one effect


def field(reply: Reply, name: str) -> object:
    """A field of the answer."""
    data = reply.data
    assert isinstance(data, dict)
    return data[name]


async def test_one_request_over_mqtt_and_twice_over_http_is_one_token(way: Way) -> None:
    payload = request(way.device)
    over_mqtt = await way.site.ask(way.device, orjson.dumps(payload))
    assert over_mqtt.ok
    for reply in (await way.by_device(payload), await way.by_service(payload)):
        assert reply.status == 201
        assert reply.data == over_mqtt.fields | {"replayed": True}
        assert reply.headers["Idempotent-Replayed"] == "true"
    assert await tokens(way.site) == 1
    opened = await look(way.site.worker, over_mqtt.text("token"))
    assert opened.data == CLEAR


async def test_one_request_over_http_is_answered_as_before_over_mqtt_and_in_another_spelling(
    way: Way,
) -> None:
    payload = request(way.device)
    first = await way.by_device(payload)
    assert (first.status, field(first, "replayed")) == (201, False)
    over_mqtt = await way.site.ask(way.device, orjson.dumps(payload))
    assert over_mqtt.replayed
    assert over_mqtt.text("token") == field(first, "token")
    spelled = orjson.dumps(payload | {"ksn": str(payload["ksn"]).lower()}, option=2)
    again = await way.by_device(spelled)
    assert (again.status, field(again, "replayed")) == (201, True)
    assert field(again, "token") == field(first, "token")


async def test_ten_at_once_by_all_ways_are_one_token(way: Way) -> None:
    payload = request(way.device)
    async with way.site.wire(way.device) as wire:
        replies, answer = await asyncio.gather(
            asyncio.gather(
                *(way.by_device(payload) for _ in range(5)),
                *(way.by_service(payload) for _ in range(5)),
            ),
            wire.ask(orjson.dumps(payload)),
        )
    assert {reply.status for reply in replies} == {201}
    assert {field(reply, "token") for reply in replies} == {answer.text("token")}
    firsts = [field(reply, "replayed") for reply in replies].count(False) + (not answer.replayed)
    assert firsts == 1
    assert await tokens(way.site) == 1


async def test_fifty_different_ones_at_once_are_fifty_tokens(way: Way) -> None:
    taps = [request(way.device) for _ in range(50)]
    replies = await asyncio.gather(*map(way.by_device, taps))
    assert {reply.status for reply in replies} == {201}
    assert len({field(reply, "token") for reply in replies}) == 50
    assert await spent(way.site) == 50


async def test_nothing_of_a_submission_is_logged(
    way: Way, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    payload = request(way.device)
    good = await way.by_device(payload)
    assert (await way.by_service(payload | {"id": payload["data"]})).status == CONFLICT
    output = capfd.readouterr()
    logged = (caplog.text, *output)
    assert way.device.device_id in "".join(logged)
    for secret in (VISA, str(payload["data"]), str(field(good, "token"))):
        assert not [text for text in logged if secret in text]
