"""Renewing platform tokens: what platforms answer, and what comes of it in the vault.

The platform is a stand-in on a real socket, the vault and PostgreSQL are the real ones. What is
about several nodes, a database that goes away, and time stands in `test_oauth_refresh_nodes`.
"""

import logging
import ssl
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from prometheus_client import REGISTRY, generate_latest
from structlog.testing import capture_logs

from glamd.credentials.model import ShopConnection
from glamd.credentials.refresh import service
from glamd.errors import ConfigError
from tests.support.http_certificates import Authority
from tests.support.oauth_platform import SCOPES, Act, Answer, OAuthPlatform
from tests.support.postgres import eventually
from tests.support.refresh_world import FAST_S, NEVER_S, World

NEW_PAIR = {"expires_in": 3600, "refresh_token_expires_in": 90 * 86_400, "scope": SCOPES}


@pytest.fixture
async def world(module_database_url: str, tmp_path: Path) -> AsyncIterator[World]:
    """A platform and an empty vault."""
    async with World.make(module_database_url, tmp_path) as made:
        yield made


# ---- answers that are none


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (Act(answer="cut"), "CONNECTION_FAILED"),
        (Act(answer="500"), "SERVER_ERROR"),
        (Act(answer="error-page"), "NOT_JSON"),
        (Act(answer="not-json"), "NOT_JSON"),
        (Act(answer="huge"), "ANSWER_TOO_LARGE"),
        (Act(answer="redirect"), "REDIRECTED"),
        (Act(fields={"access_token": None}), "BAD_ANSWER"),
        (Act(fields={"token_type": "mac"}), "BAD_ANSWER"),
        (Act(answer="429"), "RATE_LIMITED"),
        (Act(error=(400, "invalid_grant")), "INVALID_GRANT"),
        (Act(error=(401, "invalid_client")), "INVALID_CLIENT"),
        (Act(error=(400, "surprise")), "UNKNOWN"),
    ],
)
async def test_a_bad_answer_changes_nothing_but_makes_the_token_wait_and_is_mended_then(
    world: World, act: Act, code: str
) -> None:
    connection = await world.connect()
    before = await world.data(connection)
    world.platform.misbehave(act)
    async with world.node():
        failed = await world.has_failed(connection)
        assert failed.refresh_error == code
        assert failed.generation == connection.generation
        assert failed.health(world.clock.now()) == "refresh-failing"
        assert failed.refresh_not_before is not None
        assert failed.refresh_not_before > world.clock.now()
        assert not await world.is_claimed(connection)
        assert await world.data(connection) == before
        assert await world.refreshes(connection) == [code]
        assert world.platform.elsewhere == 0
        world.clock.set(failed.refresh_not_before)
        renewed = await world.is_renewed(connection)
    assert renewed.health(world.clock.now()) == "valid"
    assert (renewed.refresh_error, renewed.refresh_not_before) == (None, None)
    assert world.platform.is_good(await world.data(connection))
    assert await world.refreshes(connection) == [code, None]
    assert len(world.platform.calls) == 2


async def test_an_answer_that_is_too_slow_is_given_up(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(Act(is_late=True))
    async with world.node(platforms=[world.settings(timeout_s=0.1)]):
        assert (await world.has_failed(connection)).refresh_error == "TIMEOUT"


async def test_a_platform_that_is_not_there_fails_alone(world: World) -> None:
    connection = await world.connect()
    async with OAuthPlatform() as gone:
        url = gone.url
    async with world.node(platforms=[world.settings(token_url=url)]):
        assert (await world.has_failed(connection)).refresh_error == "CONNECTION_FAILED"


@pytest.mark.parametrize("answer", ["cut", "500", "error-page"])
async def test_a_lost_answer_is_mended_by_the_old_refresh_token_where_the_platform_retains_it(
    world: World, answer: Answer
) -> None:
    connection = await world.connect()
    world.platform.misbehave(Act(answer=answer, takes_effect=True))
    async with world.node():
        await world.has_failed(connection)
        world.clock.advance(60)
        await world.is_renewed(connection)
        assert world.platform.is_good(await world.data(connection))
        # The chain goes on from there.
        world.clock.advance(3300)
        await world.is_renewed(await world.now(connection))
    assert world.platform.is_good(await world.data(connection))
    tokens = [call.refresh_token for call in world.platform.calls]
    assert tokens[0] == tokens[1] != tokens[2]


async def test_where_the_old_one_is_dead_only_the_merchant_mends_it_and_nobody_pesters_the_platform(
    world: World,
) -> None:
    world.platform.retains = False
    connection = await world.connect()
    world.platform.misbehave(Act(answer="cut", takes_effect=True))
    async with world.node() as node:
        await world.has_failed(connection)
        world.clock.advance(60)
        dead = await world.has_failed(connection, times=2)
        assert dead.refresh_error == "INVALID_GRANT"
        assert dead.refresh_not_before is not None
        assert dead.refresh_not_before - world.clock.now() > timedelta(hours=5)
        world.clock.advance(3600)
        reading = await world.read(connection, node.renew)
        assert reading.tokens[0].connection.is_expired(world.clock.now())
        assert len(world.platform.calls) == 2

        again = await world.connect(merchant_id=connection.merchant_id)
        assert again.token_id == connection.token_id
        assert again.health(world.clock.now()) == "valid"
        await world.is_renewed(again)
    assert world.platform.is_good(await world.data(connection))


async def test_a_platform_that_asks_for_time_gets_it(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(Act(answer="429", retry_after="900"))
    async with world.node() as node:
        failed = await world.has_failed(connection)
        assert failed.refresh_not_before == world.clock.now() + timedelta(seconds=900)
        world.clock.advance(899)
        assert not await node.renew(connection.token_id)
        assert len(world.platform.calls) == 1
        world.clock.advance(1)
        await world.is_renewed(connection)


async def test_failures_in_a_row_make_it_wait_longer_each_time(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(*[Act(answer="500")] * 5)
    pauses = []
    async with world.node():
        for times in range(1, 6):
            failed = await world.has_failed(connection, times)
            assert failed.refresh_not_before is not None
            pauses.append((failed.refresh_not_before - world.clock.now()).total_seconds())
            world.clock.set(failed.refresh_not_before)
        await world.is_renewed(connection)
    for pause_s, most_s in zip(pauses, (30, 60, 120, 240, 480), strict=True):
        assert most_s / 2 <= pause_s <= most_s


# ---- answers that are odd


async def test_without_a_new_refresh_token_the_old_one_stays(world: World) -> None:
    connection = await world.connect()
    before = await world.data(connection)
    world.platform.misbehave(Act(fields={"refresh_token": None}))
    async with world.node():
        await world.is_renewed(connection)
    data = await world.data(connection)
    assert data["refresh_token"] == before["refresh_token"]
    assert data["access_token"] != before["access_token"]


@pytest.mark.parametrize("expires_in", [None, -1, 0, 1e30, "soon"])
async def test_a_pair_without_a_lifetime_is_taken_and_renewed_in_an_hour(
    world: World, expires_in: object
) -> None:
    connection = await world.connect()
    world.platform.misbehave(Act(fields={"expires_in": expires_in}))
    async with world.node():
        renewed = await world.is_renewed(connection)
        assert renewed.expires_at == world.clock.now() + timedelta(hours=1)
        world.clock.advance(3001)
        await world.is_renewed(renewed)


async def test_tokens_that_hardly_live_are_renewed_at_half_their_life_and_not_all_the_time(
    world: World,
) -> None:
    connection = await world.connect()
    world.platform.misbehave(Act(fields={"expires_in": 1}), Act(fields={"expires_in": 300}))
    async with world.node() as node:
        renewed = await world.is_renewed(connection)
        assert renewed.refresh_not_before == world.clock.now() + timedelta(seconds=30)
        assert not await node.renew(connection.token_id)
        world.clock.advance(30)
        renewed = await world.is_renewed(renewed)
        assert renewed.refresh_not_before == world.clock.now() + timedelta(seconds=150)
        world.clock.advance(150)
        renewed = await world.is_renewed(renewed)
        assert renewed.refresh_not_before is None
    assert len(world.platform.calls) == 3


# ---- what is renewed, and what becomes of it


async def test_a_renewal_replaces_the_pair_and_keeps_the_rest(world: World) -> None:
    connection = await world.connect()
    before = await world.data(connection)
    world.clock.advance(1)
    async with world.node("n1"):
        renewed = await world.is_renewed(connection)
    data = await world.data(connection)
    assert data == {
        **before,
        **NEW_PAIR,
        "access_token": data["access_token"],
        "refresh_token": data["refresh_token"],
    }
    assert data["shop_note"] == "kept"
    assert world.platform.is_good(data)
    assert renewed.generation == connection.generation + 1
    assert renewed.scopes == ("read_products", "write_orders")
    assert renewed.expires_at == world.clock.now() + timedelta(hours=1)
    assert renewed.refreshed_at == renewed.updated_at == world.clock.now()
    assert (renewed.access_count, renewed.last_accessed_by) == (1, "bff")
    access = (await world.vault().access_log(connection.merchant_id))[0]
    assert (access.action, access.error, access.token_id) == ("refresh", None, connection.token_id)
    assert (access.accessor.kind, access.accessor.name, access.accessor.ip) == ("glamd", "n1", "-")


async def test_only_what_is_due_is_renewed(world: World) -> None:
    fresh = await world.connect(expires_in_s=601)
    unset = await world.connect(platform="bigcommerce")
    static = await world.connect(token_type="api_key")
    lonely = await world.connect(changes={"refresh_token": ""})
    due = await world.connect(expires_in_s=600)
    expired = await world.connect(expires_in_s=-86_400)
    left = await world.connect(expires_in_s=-101 * 86_400)
    async with world.node() as node:
        await world.is_renewed(due)
        await world.is_renewed(expired)
        for one in (fresh, unset, static, lonely):
            assert not await node.renew(one.token_id)
            assert await world.now(one) == one
        assert len(world.platform.calls) == 2
        # A merchant that left long ago is not looked for, and is tried once somebody asks.
        assert await node.renew(left.token_id)
    assert len(world.platform.calls) == 3


async def test_a_token_that_does_not_say_when_it_expires_is_taken_for_an_hourly_one(
    world: World,
) -> None:
    connection = await world.connect(expires_in_s=None)
    async with world.node():
        other = await world.connect()
        await world.is_renewed(other)
        assert (await world.now(connection)).generation == 1
        world.clock.advance(3000)
        renewed = await world.is_renewed(connection)
    assert renewed.expires_at == world.clock.now() + timedelta(hours=1)


@pytest.mark.parametrize("auth", ["body", "basic"])
async def test_we_identify_ourselves_in_the_form_or_by_basic(world: World, auth: str) -> None:
    # Both parts must be form-encoded before they are joined, which these characters show.
    secret = "s3cr:t +/%&=ü"
    async with OAuthPlatform(client_id="our:app", client_secret=secret) as platform:
        connection = await world.connect(grantor=platform)
        settings = world.settings(
            token_url=platform.url, client_id="our:app", client_secret=secret, client_auth=auth
        )
        async with world.node(platforms=[settings]):
            await world.is_renewed(connection)
        assert [call.authorization for call in platform.calls] == [auth]


async def test_reading_an_expired_token_mends_what_the_job_could_not(world: World) -> None:
    async with world.node(interval_s=NEVER_S) as node:
        # The job has had its look.
        await eventually(lambda: _is_idle(node))
        connection = await world.connect(expires_in_s=-1)
        reading = await world.read(connection, node.renew)
        (token,) = reading.tokens
        assert not token.connection.is_expired(world.clock.now())
        assert world.platform.is_good(token.secret.data)
        assert len(world.platform.calls) == 1


async def _is_idle(node: service.Refresher) -> bool:
    return node._reached_since_s is not None


async def test_a_rotated_data_key_opens_the_old_pair_and_seals_the_new_one(world: World) -> None:
    connection = await world.connect()
    await world.rotate()
    async with world.node():
        renewed = await world.is_renewed(connection)
    assert (connection.key_version, renewed.key_version) == ("v1", "v2")
    assert world.platform.is_good(await world.data(connection))


async def test_what_does_not_open_is_never_asked_for(world: World) -> None:
    connection = await world.connect()
    await world.rotate(destroy_first=True)
    swapped = await world.connect()
    await world.database.execute(
        "UPDATE glam.platform_tokens SET ciphertext = '\\x00' WHERE token_id = $1",
        swapped.token_id,
    )
    async with world.node():
        for one in (connection, swapped):
            failed = await world.has_failed(one)
            assert failed.refresh_error == "UNDECRYPTABLE"
            assert failed.refresh_not_before is not None
            assert failed.refresh_not_before - world.clock.now() > timedelta(hours=5)
    assert world.platform.calls == []


# ---- where secrets go


class _Names(AbstractResolver):
    """Every name is this machine; what was looked up is remembered."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: object = 0) -> list[ResolveResult]:
        self.asked.append(host)
        return [
            ResolveResult(hostname=host, host="127.0.0.1", port=port, family=2, proto=0, flags=0)
        ]

    async def close(self) -> None:
        """Nothing to do."""


async def test_a_merchants_own_host_never_hears_of_us(world: World) -> None:
    names = _Names()
    settings = world.settings(
        token_url=f"https://{{domain}}:{world.platform.port}/admin/oauth/access_token",
        allowed_hosts=(".myshopify.com",),
    )
    connection = await world.connect(domain="127.0.0.1")
    async with world.node(platforms=[settings], resolver=names):
        assert (await world.has_failed(connection)).refresh_error == "HOST_NOT_ALLOWED"
    assert (names.asked, world.platform.calls) == ([], [])


@pytest.mark.parametrize("column", ["domain", "platform_shop_id"])
async def test_who_can_write_rows_cannot_have_a_secret_sent_to_another_shop(
    world: World, column: str
) -> None:
    names = _Names()
    settings = world.settings(
        token_url=f"http://{{domain}}:{world.platform.port}/admin/oauth/access_token",
        allowed_hosts=(".localhost",),
    )
    connection = await world.connect(domain="cool.example" if column != "domain" else "a.localhost")
    await world.database.execute(f"UPDATE glam.platform_tokens SET {column} = 'thief.localhost'")
    async with world.node(platforms=[settings], resolver=names):
        assert (await world.has_failed(connection)).refresh_error == "UNDECRYPTABLE"
    assert (names.asked, world.platform.calls) == ([], [])


async def test_each_shop_is_asked_at_its_own_host(world: World) -> None:
    names = _Names()
    settings = world.settings(
        token_url=f"http://{{domain}}:{world.platform.port}/admin/oauth/access_token",
        allowed_hosts=(".localhost",),
    )
    shops = [await world.connect(domain=f"shop-{n}.localhost") for n in range(3)]
    async with world.node(platforms=[settings], resolver=names):
        for shop in shops:
            await world.is_renewed(shop)
    port = world.platform.port
    assert {call.host for call in world.platform.calls} == {
        f"shop-{n}.localhost:{port}" for n in range(3)
    }


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_refresh_token_goes_only_to_a_certificate_that_we_trust(
    world: World, tmp_path: Path, *, is_known: bool
) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    files = ours.issue("server")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(files.certificate, files.key)
    trusting = ours.trusting() if is_known else theirs.trusting()
    async with OAuthPlatform(tls=tls) as platform:
        connection = await world.connect(grantor=platform)
        async with world.node(
            platforms=[
                world.settings(token_url=platform.url, client_secret=platform.client_secret)
            ],
            tls=trusting,
        ):
            if is_known:
                await world.is_renewed(connection)
            else:
                assert (await world.has_failed(connection)).refresh_error == "TLS_FAILED"
        assert len(platform.calls) == int(is_known)


async def test_no_secret_is_in_a_log_a_row_or_a_metric_whatever_happens(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    acts = [
        Act(answer="cut", takes_effect=True),
        Act(answer="500", takes_effect=True),
        Act(answer="error-page", takes_effect=True),
        Act(answer="not-json", takes_effect=True),
        Act(fields={"refresh_token": "bad\ntoken"}),
        Act(error=(400, world.platform.client_secret)),
        Act(error=(400, "invalid_grant")),
        Act(answer="redirect"),
        Act(),
    ]
    with capture_logs() as events, caplog.at_level(logging.DEBUG):
        async with world.node(concurrency=1):
            for act in acts:
                world.platform.misbehave(act)
                connection = await world.connect()
                await _is_over(world, connection)
            await world.rotate(destroy_first=True)
            broken = await world.connect()
            await world.database.execute("UPDATE glam.platform_tokens SET ciphertext = ''")
            await _is_over(world, broken)
    rows = await world.database.fetch(
        "SELECT (to_jsonb(t) - 'ciphertext')::text FROM glam.platform_tokens t UNION ALL"
        " SELECT to_jsonb(l)::text FROM glam.token_access_log l"
    )
    assert len(rows) > 2 * len(acts)
    assert {event["event"] for event in events} >= {
        "platform_token_refreshed",
        "platform_token_refresh_failed",
    }
    assert not any(event.get("exc_info") for event in events)
    seen = "\n".join(
        [repr(events), caplog.text, *(row[0] for row in rows), generate_latest(REGISTRY).decode()]
    )
    assert len(world.platform.secrets) > 2 * len(acts)
    for secret in world.platform.secrets:
        assert secret not in seen


async def _is_over(world: World, connection: ShopConnection) -> None:
    async def look() -> bool:
        found = await world.now(connection)
        return found.generation > 1 or found.refresh_failures > 0

    await eventually(look)


# ---- what operators see


async def test_connections_are_counted_by_health_and_what_is_due_by_itself(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "CENSUS_EVERY_S", FAST_S)
    await world.connect(expires_in_s=None)
    await world.connect(expires_in_s=7200)
    await world.connect(expires_in_s=-1, platform="magento")
    await world.connect(expires_in_s=-1, token_type="bearer")
    failing = await world.connect()
    world.platform.misbehave(Act(error=(400, "invalid_grant")), Act(is_late=True))
    async with world.node(concurrency=1):
        await world.has_failed(failing)
        held = await world.connect()
        await world.platform.called(2)

        async def are_counted() -> bool:
            return (
                _value("glamd_credentials_connections", platform="shopify", health="valid") == 3
                and _value("glamd_credentials_connections", platform="shopify", health="expired")
                == 1
                and _value(
                    "glamd_credentials_connections", platform="shopify", health="refresh-failing"
                )
                == 1
                and _value("glamd_credentials_connections", platform="magento", health="expired")
                == 1
                and _value("glamd_credentials_refresh_due") == 1
            )

        await eventually(are_counted)
        world.platform.release()
        await world.is_renewed(held)
        await eventually(lambda: _is_value("glamd_credentials_refresh_due", 0))


async def _is_value(name: str, value: float) -> bool:
    return _value(name) == value


def _value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


async def test_attempts_are_counted_by_their_outcome(world: World) -> None:
    def attempts(outcome: str) -> float:
        name = "glamd_credentials_refreshes_total"
        return _value(name, platform="shopify", outcome=outcome) or 0.0

    good, bad = attempts("ok"), attempts("INVALID_GRANT")
    world.platform.misbehave(Act(error=(400, "invalid_grant")))
    async with world.node(concurrency=1):
        await world.has_failed(await world.connect())
        await world.is_renewed(await world.connect())
    assert (attempts("ok"), attempts("INVALID_GRANT")) == (good + 1, bad + 1)


def test_a_platform_named_twice_is_a_wrong_setting(world: World) -> None:
    with pytest.raises(ConfigError):
        service.Refresher(
            world.database,
            keyring=world.keyring,
            platforms=[world.settings(), world.settings()],
            clock=world.clock,
            node_id="a",
        )
