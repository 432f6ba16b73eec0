"""Who is believed, from outside: keys that rotate while the daemon runs, JWTs that are revoked."""

import time
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest

from glamd.clock import SystemClock
from glamd.embedded.certificates import DevelopmentCertificates
from glamd.embedded.settings import Ports, development_settings
from glamd.errors import ConfigError
from tests.support.jwt_keys import SigningKey, es256, rs256, write_jwks
from tests.support.looks import Reply, read
from tests.support.site import DOMAIN, NOBODY, Site, running_site

LIST = "/api/v1/payment-tokens"


async def ask(site: Site, token: str) -> tuple[int, str]:
    """What this bearer gets."""
    answer = await site.http.get(LIST, headers={"Authorization": f"Bearer {token}"})
    return (await read(answer)).outcome


def token_of(site: Site, key: SigningKey, *, jti: str | None = None) -> str:
    """A client's token of the site's merchant by this key."""
    exp = int(time.time()) + 600
    return key.token(merchant_id=str(site.merchant_id), shop=DOMAIN, exp=exp, jti=jti)


async def test_keys_rotate_by_kid_while_the_daemon_runs_and_a_bad_file_changes_nothing(
    state_dir: Path, database_url: str, tmp_path: Path
) -> None:
    old, new = es256("2026-10"), rs256("2026-11")
    file = write_jwks(tmp_path / "client.jwks", old.jwk())
    changes = {"auth": {"client_jwks_file": file}}
    async with running_site(state_dir, database_url, changes=changes) as site:
        settings = development_settings(
            state_dir,
            DevelopmentCertificates(state_dir, SystemClock()),
            database_url=database_url,
            nats_url=NOBODY,
            ports=Ports(http=0, worker=0, mqtt=0),
            changes=changes,
        )
        by_old, by_new = token_of(site, old), token_of(site, new)
        assert await ask(site, by_old) == (200, "ok")
        assert await ask(site, by_new) == (401, "UNAUTHENTICATED")

        write_jwks(file, old.jwk(), new.jwk())
        await site.daemon.reload(settings)
        assert await ask(site, by_old) == await ask(site, by_new) == (200, "ok")

        write_jwks(file, new.jwk())
        await site.daemon.reload(settings)
        assert await ask(site, by_old) == (401, "UNAUTHENTICATED"), "also out of the cache"
        assert await ask(site, by_new) == (200, "ok")

        file.write_text('{"keys": [')
        with pytest.raises(ConfigError, match="client_jwks_file"):
            await site.daemon.reload(settings)
        assert await ask(site, by_new) == (200, "ok")
        secret = site.client()["Authorization"].removeprefix("Bearer ")
        assert await ask(site, secret) == (200, "ok"), "secrets hold beside keys"


async def test_what_an_operator_revokes_is_refused_at_once_though_it_was_believed_before(
    state_dir: Path, database_url: str, tmp_path: Path
) -> None:
    leaked, good = es256("leaked"), es256("good")
    file = write_jwks(tmp_path / "client.jwks", leaked.jwk(), good.jwk())
    async with running_site(
        state_dir, database_url, changes={"auth": {"client_jwks_file": file}}
    ) as site:
        jti = str(uuid4())
        named, other, by_leaked = (
            token_of(site, good, jti=jti),
            token_of(site, good, jti=str(uuid4())),
            token_of(site, leaked),
        )
        for token in (named, other, by_leaked):
            assert await ask(site, token) == (200, "ok")
        for body in ({"jti": jti}, {"kid": "leaked"}):
            reply = await read(await site.admin.post("/v1/jwt/revocations", json=body))
            assert reply.status < 300, reply.body
        assert await ask(site, named) == await ask(site, by_leaked) == (401, "UNAUTHENTICATED")
        assert await ask(site, other) == (200, "ok")
        listed = await read(await site.admin.get("/v1/jwt/revocations"))
        assert {each["value"] for each in revocations(listed)} == {jti, "leaked"}


def revocations(reply: Reply) -> list[dict[str, str]]:
    """The list that operators get."""
    return cast("list[dict[str, str]]", reply.json["revocations"])
