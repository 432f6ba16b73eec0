"""Sensitive data until authorized, on a real database: who may end it, what is gone, what stays."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import orjson
import pytest

from glamd.db import Database
from glamd.errors import (
    ForbiddenError,
    GlamError,
    GoneError,
    NotFoundError,
    RateLimitedError,
    UnavailableError,
)
from glamd.keys.keyrings import Keyrings
from glamd.payments import store
from glamd.payments.cipher import associated_data, sensitive_associated_data
from glamd.payments.detokenize import Detokenizer
from glamd.payments.life import store as life_store
from glamd.payments.model import DECRYPT_FIELDS, Grant, Look, SealedToken
from glamd.payments.tokens import Tokens
from tests.support.kept_audit import KeptAudit
from tests.support.keys import load_keyrings
from tests.support.settable_clock import SettableClock
from tests.support.stored_tokens import put_merchant, put_token

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
TRACK2 = ";4242424242424242=4912?"
CARD = {"pan": "4242424242424242", "expiry": "4912"}


class World:
    """A token with sensitive data, and a detokenizer over it."""

    def __init__(self, database: Database, keyrings: Keyrings) -> None:
        self.database = database
        self.clock = SettableClock(NOW)
        self.audit = KeptAudit()
        self.key = keyrings.payment_tokens.active
        self.merchant_id = UUID(int=0)
        self.token = ""
        self.grant = Grant(
            worker="settler",
            purposes=frozenset({"settlement"}),
            fields=frozenset(DECRYPT_FIELDS),
            merchants=frozenset(),
            rate_per_s=100.0,
        )
        self.detokenizer = Detokenizer(
            database,
            find=self._find,
            audit=self.audit,
            keyring=keyrings.payment_tokens,
            grants=[self.grant],
            clock=self.clock,
        )

    async def _find(self, token: str) -> SealedToken | None:
        async with self.database.connection() as connection:
            return (await store.sealed(connection, [token]))[0]

    async def keep(self) -> None:
        """Store the token, then what is sealed of it, which is bound to its name."""
        self.merchant_id = await put_merchant(self.database)
        self.token = await put_token(
            self.database, self.merchant_id, expires_at=NOW + DAY, sensitive=b"-"
        )
        seal, version = self.key.sealer.seal, self.key.version
        await self.database.execute(
            "UPDATE cde.token_secrets SET card_ciphertext = $2, sensitive_ciphertext = $3,"
            " key_version = $4 WHERE token = $1",
            self.token,
            seal(orjson.dumps(CARD), associated_data=associated_data(self.token, version)),
            seal(
                orjson.dumps({"track2": TRACK2, "emv": None}),
                associated_data=sensitive_associated_data(self.token, version),
            ),
            version,
        )

    def look(self, *fields: str) -> Look:
        return Look(
            worker="settler",
            certificate_sha256="ab" * 32,
            ip="192.0.2.7",
            token=self.token,
            fields=fields,
            purpose="settlement" if fields else "",
            correlation_id="order-7",
        )

    async def refused(self, look: Look) -> GlamError:
        """The error of a report that must not succeed, with its row as the last one."""
        before = len(self.audit.entries)
        with pytest.raises(GlamError) as caught:
            await self.detokenizer.authorized(look)
        [row] = self.audit.entries[before:]
        assert (row.action, row.outcome) == ("authorized", caught.value.code)
        return caught.value

    async def has_sensitive(self) -> bool:
        found: bool = await self.database.fetchval(
            "SELECT sensitive_ciphertext IS NOT NULL FROM cde.token_secrets"
        )
        return found


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> World:
    made = World(database, await load_keyrings(database, tmp_path, SettableClock(NOW)))
    await made.keep()
    return made


async def test_whoever_may_not_leaves_everything_as_it_was_and_a_row(world: World) -> None:
    look = world.look()
    assert isinstance(await world.refused(replace(look, worker="other")), ForbiddenError)
    assert isinstance(await world.refused(replace(look, token="ptk_" + "0" * 26)), NotFoundError)
    world.detokenizer.replace_grants([replace(world.grant, merchants=frozenset({uuid4()}))])
    assert isinstance(await world.refused(look), ForbiddenError)
    world.detokenizer.replace_grants([replace(world.grant, rate_per_s=0.5)])
    await world.detokenizer.decrypt(world.look("pan"))
    assert isinstance(await world.refused(look), RateLimitedError)
    assert await world.has_sensitive()


async def test_of_a_token_that_has_ended_there_is_nothing_to_report(world: World) -> None:
    world.clock.advance(DAY.total_seconds())
    assert (await world.refused(world.look())).code == "TOKEN_EXPIRED"
    world.clock.set(NOW)
    await Tokens(world.database, clock=world.clock).revoke(
        world.token, merchant_id=None, correlation_id="c"
    )
    error = await world.refused(world.look())
    assert isinstance(error, GoneError)
    assert error.code == "TOKEN_REVOKED"


async def test_without_its_row_it_is_not_answered_and_reporting_again_is(world: World) -> None:
    world.audit.fails = True
    with pytest.raises(UnavailableError):
        await world.detokenizer.authorized(world.look())
    world.audit.fails = False
    assert not (await world.detokenizer.authorized(world.look())).has_sensitive_data
    assert not await world.has_sensitive()


async def test_what_is_sensitive_is_there_until_then_and_the_rest_after_it(world: World) -> None:
    both = world.look("pan", "track2", "emv")
    before = await world.detokenizer.decrypt(both)
    assert before == {"pan": CARD["pan"], "track2": TRACK2, "emv": None}
    for _ in range(2):
        shown = await world.detokenizer.authorized(world.look())
        assert (shown.token, shown.status, shown.has_sensitive_data) == (
            world.token,
            "active",
            False,
        )
    assert await world.detokenizer.decrypt(both) == before | {"track2": None}
    assert [(row.action, row.outcome) for row in world.audit.entries] == [
        ("decrypt", "ok"),
        ("authorized", "ok"),
        ("authorized", "ok"),
        ("decrypt", "ok"),
    ]
    [dirty] = await life_store.dirty(world.database)
    assert dirty.partition == "token_secrets_other"


async def test_reports_and_revocations_at_once_never_wait_for_one_another_in_a_circle(
    world: World,
) -> None:
    tokens = Tokens(world.database, clock=world.clock)
    done = await asyncio.gather(
        *(world.detokenizer.authorized(world.look()) for _ in range(10)),
        tokens.revoke(world.token, merchant_id=None, correlation_id="c"),
        return_exceptions=True,
    )
    assert all(not isinstance(one, Exception) or isinstance(one, GoneError) for one in done)
    assert await world.database.fetchval("SELECT count(*) FROM cde.token_secrets") == 0
