"""A platform token's life, from outside: stored, renewed before it expires, read, and logged."""

import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest

from glamd.embedded.settings import LOOPBACK
from glamd.errors import ConfigError
from tests.support.looks import Reply, read
from tests.support.oauth_platform import Act, OAuthPlatform
from tests.support.older_service import KEY_TEXT, row
from tests.support.postgres import eventually
from tests.support.site import DOMAIN, Site, running_site


def settings_for(platform: OAuthPlatform, folder: Path) -> dict[str, dict[str, object]]:
    """The daemon's settings with this platform's endpoint as that of Shopify."""
    secret = folder / "client-secret"
    secret.write_text(platform.client_secret)
    oauth = {
        "platform": "shopify",
        "token_url": platform.url,
        "client_id": platform.client_id,
        "client_secret_file": secret,
    }
    return {"credentials": {"oauth": [oauth], "refresh_interval_s": 0.1}}


async def store(site: Site, token_data: object, *, expires_in_s: float) -> None:
    """The storefront hands the shop's credentials over."""
    body = {
        "merchant_id": str(site.merchant_id),
        "platform_name": "shopify",
        "platform_shop_id": "1",
        "domain": DOMAIN,
        "token_data": token_data,
        "token_type": "oauth",
        "expires_at": (datetime.now(UTC) + timedelta(seconds=expires_in_s)).isoformat(),
    }
    reply = await read(await site.http.post("/api/v1/tokens", json=body, headers=site.client()))
    assert reply.status == 201, reply.body


async def token(site: Site) -> dict[str, object]:
    """The token as a service reads it."""
    path = f"/api/v1/tokens/{site.merchant_id}"
    reply = await read(await site.http.get(path, headers=site.internal()))
    data = cast("dict[str, list[dict[str, object]]]", reply.data)
    assert data["undecryptable"] == []
    [found] = data["tokens"]
    return found


async def log_of(site: Site) -> list[tuple[str, str | None]]:
    """The access log of the merchant, oldest first, without its reads."""
    rows = await site.database.fetch(
        "SELECT action, error FROM glam.token_access_log WHERE action <> 'read' ORDER BY id"
    )
    return [(row["action"], row["error"]) for row in rows]


async def shown(site: Site) -> Reply:
    """What an operator sees of it."""
    return await read(await site.admin.get(f"/v1/credentials/{site.merchant_id}/shopify"))


async def test_a_token_is_renewed_before_it_expires_and_the_new_pair_is_what_is_read(
    state_dir: Path, database_url: str, tmp_path: Path
) -> None:
    async with (
        OAuthPlatform() as platform,
        running_site(state_dir, database_url, changes=settings_for(platform, tmp_path)) as site,
    ):
        first = platform.grant(DOMAIN)
        await store(site, first, expires_in_s=60)

        async def renewed() -> dict[str, object]:
            found = await token(site)
            return found if found["token_data"] != first else {}

        found = await eventually(renewed)
        assert platform.is_good(cast("dict[str, object]", found["token_data"]))
        assert (found["is_expired"], found["health"]) == (False, "valid")
        assert len(platform.calls) == 1
        assert await log_of(site) == [("store", None), ("refresh", None)]


async def test_a_platform_that_is_down_shows_as_failing_and_costs_the_reader_nothing(
    state_dir: Path, database_url: str, tmp_path: Path
) -> None:
    async with (
        OAuthPlatform() as platform,
        running_site(state_dir, database_url, changes=settings_for(platform, tmp_path)) as site,
    ):
        platform.misbehave(*[Act(answer="error-page")] * 3)
        first = platform.grant(DOMAIN)
        await store(site, first, expires_in_s=60)

        async def failing() -> dict[str, object]:
            found = await token(site)
            return found if found["health"] == "refresh-failing" else {}

        found = await eventually(failing)
        assert found["token_data"] == first, "what is there still serves"
        operator = (await shown(site)).json
        assert operator["refresh_failures"] == 1
        for secret in platform.secrets:
            assert secret not in (await shown(site)).body.decode()
        # The merchant connects anew, which mends it.
        await store(site, platform.grant(DOMAIN), expires_in_s=3600)
        assert (await token(site))["health"] == "valid"


async def test_a_start_that_fails_has_asked_no_platform_for_anything(
    state_dir: Path, database_url: str, tmp_path: Path
) -> None:
    async with OAuthPlatform() as platform:
        async with running_site(state_dir, database_url) as site:
            await store(site, platform.grant(DOMAIN), expires_in_s=-60)
        with socket.create_server((LOOPBACK, 0)) as taken:
            changes = settings_for(platform, tmp_path)
            changes["http"] = {"port": taken.getsockname()[1]}
            with pytest.raises(ConfigError, match="cannot bind"):
                async with running_site(state_dir, database_url, changes=changes):
                    raise AssertionError("it must not start")
        assert platform.calls == []


async def test_what_is_imported_is_not_renewed_while_the_older_service_may_use_it(
    state_dir: Path, database_url: str, tmp_path: Path
) -> None:
    async with OAuthPlatform() as platform:
        changes = settings_for(platform, tmp_path)
        changes["credentials"]["import_key"] = KEY_TEXT
        async with running_site(state_dir, database_url, changes=changes) as site:
            soon = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
            body = {"rows": [row(1, expires_at=soon), row(2, expires_at=None)], "after": None}
            reply = await read(await site.admin.post("/v1/credentials/import", json=body))
            assert cast("dict[str, int]", reply.json["batch"])["taken"] == 2, reply.body
            # One that is due later and renewed shows that the job went past those.
            await store(site, platform.grant(DOMAIN), expires_in_s=90)
            path = f"/v1/credentials/{site.merchant_id}/shopify"

            async def renewed() -> bool:
                return (await read(await site.admin.get(path))).json["refreshed_at"] is not None

            await eventually(renewed)
            assert len(platform.calls) == 1
