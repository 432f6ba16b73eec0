"""Bearer tokens: what an honest signature says is read as the contract says, and remembered.

The tricks are in `test_auth_tricks`, keys, their rotation and revocation in `test_auth_keys`.
"""

import json
from typing import Any
from uuid import UUID

import jwt
import pytest

from glamd.errors import UnauthenticatedError, UnavailableError
from glamd.http.auth import MAX_CACHED_S
from glamd.http.identity import Client, Internal
from tests.support.http_fakes import (
    CLIENT_SECRET,
    INTERNAL_SECRET,
    MERCHANT,
    NOW,
    OTHER_MERCHANT,
    claims,
    client_jwt,
    internal_jwt,
)
from tests.support.jwt_keys import PREVIOUS_SECRET, Door, signed_with

EPOCH = int(NOW.timestamp())


@pytest.fixture
def door() -> Door:
    """A door with the tests' secrets."""
    return Door()


class TestSecrets:
    """Which secret fits says what the bearer is."""

    async def test_each_of_several_secrets_is_believed(self, door: Door) -> None:
        assert (await door.knock(client_jwt(secret=PREVIOUS_SECRET))).kind == "client"
        assert (await door.knock(client_jwt(secret=CLIENT_SECRET))).kind == "client"

    async def test_the_secret_tells_the_kind_whatever_the_claims_say(self, door: Door) -> None:
        assert isinstance(await door.knock(client_jwt(service="settler")), Client)
        assert isinstance(await door.knock(internal_jwt(merchant_id=str(MERCHANT))), Internal)


class TestTimes:
    """exp, nbf, iat by the injected clock, with a leeway of 60 s and a life of 24 h."""

    @pytest.mark.parametrize(
        "change",
        [
            {"exp": None},
            {"exp": EPOCH - 60},
            {"exp": EPOCH - 10**9},
            {"exp": -1},
            {"exp": 0},
            {"exp": EPOCH + 24 * 3600 + 61},
            {"exp": 10**30},
            {"exp": 10**400},
            {"exp": -(10**400)},
            {"exp": 1e308},
            {"exp": float("inf")},
            {"exp": float("-inf")},
            {"exp": float("nan")},
            {"exp": str(EPOCH + 60)},
            {"exp": True},
            {"exp": [EPOCH + 60]},
            {"exp": {}},
            {"nbf": EPOCH + 61},
            {"nbf": 10**30},
            {"nbf": float("nan")},
            {"nbf": "soon"},
            {"iat": EPOCH + 61},
            {"iat": 10**400},
            {"iat": []},
        ],
        ids=str,
    )
    async def test_a_time_that_does_not_fit_is_refused(
        self, door: Door, change: dict[str, object]
    ) -> None:
        payload = json.dumps(claims(**change)).encode()
        with pytest.raises(UnauthenticatedError):
            await door.knock(signed_with({}, payload))

    @pytest.mark.parametrize(
        "change",
        [
            {"exp": EPOCH - 59},
            {"exp": EPOCH + 24 * 3600},
            {"exp": EPOCH + 24 * 3600 + 60},
            {"exp": EPOCH + 0.5},
            {"nbf": EPOCH + 60},
            {"nbf": 0},
            {"iat": EPOCH + 60},
        ],
        ids=str,
    )
    async def test_a_time_within_the_leeway_fits(self, door: Door, change: dict[str, Any]) -> None:
        assert (await door.knock(client_jwt(**change))).kind == "client"

    async def test_a_number_too_long_to_be_read_is_refused(self, door: Door) -> None:
        payload = b'{"exp": ' + b"9" * 2500 + b', "sub": "shop.example"}'
        with pytest.raises(UnauthenticatedError):
            await door.knock(signed_with({}, payload))

    async def test_an_honest_signature_over_junk_is_refused(self, door: Door) -> None:
        for payload in (b"", b"[]", b"7", b"null", b"\xff", b"[" * 1500, b"{"):
            with pytest.raises(UnauthenticatedError):
                await door.knock(signed_with({}, payload))


class TestAudience:
    """`aud` must name us where it is there."""

    @pytest.mark.parametrize(
        "audience",
        [
            *("other", "", "Glamd", " glamd", "glamd ", "glamd\x00", "other glamd"),
            *(["other"], [], [["glamd"]], [7, "glamd"], [None, "glamd"], ["glamd", ["glamd"]]),
            *({"glamd": 1}, 7, False, True),
        ],
        ids=repr,
    )
    async def test_another_audience_is_refused(self, door: Door, audience: object) -> None:
        payload = json.dumps(claims() | {"aud": audience}).encode()
        with pytest.raises(UnauthenticatedError):
            await door.knock(signed_with({}, payload))

    async def test_null_is_an_audience_and_not_ours(self, door: Door) -> None:
        with pytest.raises(UnauthenticatedError):
            await door.knock(signed_with({}, json.dumps(claims() | {"aud": None}).encode()))

    @pytest.mark.parametrize("audience", ["glamd", ["glamd"], ["other", "glamd"]])
    async def test_ours_is_taken_alone_and_among_others(self, door: Door, audience: object) -> None:
        assert (await door.knock(client_jwt(aud=audience))).kind == "client"

    async def test_none_is_taken_unless_the_configuration_asks_for_one(self, door: Door) -> None:
        assert (await door.knock(client_jwt(aud=None))).kind == "client"
        with pytest.raises(UnauthenticatedError):
            await Door(require_audience=True).knock(client_jwt(aud=None))


class TestClaims:
    """Who the bearer is."""

    @pytest.mark.parametrize(
        ("change", "merchant_id", "shop"),
        [
            ({}, MERCHANT, "shop.example"),
            ({"shop": None, "sub": "shop.example"}, MERCHANT, "shop.example"),
            ({"shop": None}, MERCHANT, None),
            ({"merchant_id": None}, MERCHANT, "shop.example"),
            ({"merchant_id": None, "shop": "SHOP.example"}, MERCHANT, "SHOP.example"),
            ({"merchant_id": None, "shop": None, "sub": "shop.example"}, MERCHANT, "shop.example"),
            (
                {"merchant_id": None, "shop": str(OTHER_MERCHANT)},
                OTHER_MERCHANT,
                str(OTHER_MERCHANT),
            ),
            (
                {"merchant_id": None, "shop": None, "sub": str(OTHER_MERCHANT).upper()},
                OTHER_MERCHANT,
                str(OTHER_MERCHANT).upper(),
            ),
            ({"merchant_id": str(OTHER_MERCHANT)}, OTHER_MERCHANT, "shop.example"),
        ],
        ids=str,
    )
    async def test_a_clients_merchant_is_claimed_or_its_shops(
        self, door: Door, change: dict[str, Any], merchant_id: UUID, shop: str | None
    ) -> None:
        found = await door.knock(client_jwt(**change))
        assert isinstance(found, Client)
        assert (found.merchant_id, found.shop) == (merchant_id, shop)

    @pytest.mark.parametrize(
        "change",
        [
            {"merchant_id": "not-a-uuid"},
            {"merchant_id": 7},
            {"merchant_id": [str(MERCHANT)]},
            {"merchant_id": {"$ne": ""}},
            {"merchant_id": "{" + str(MERCHANT) + "}"},
            {"merchant_id": "urn:uuid:" + str(MERCHANT)},
            {"merchant_id": str(MERCHANT) + "\n"},
            {"merchant_id": None, "shop": None},
            {"merchant_id": None, "shop": "unknown.example"},
            {"merchant_id": None, "shop": "shop.example\x00"},
            {"merchant_id": None, "shop": "x" * 300},
            {"shop": 7},
            {"shop": ["shop.example"]},
            {"sub": 7},
            {"scope": ["bff:call"]},
            {"scope": 7},
            {"scope": "bff:call\tadmin"},
            {"shop": "\ud800.example"},
            {"shop": "\u212ashop.example"},
            {"shop": "\u212ashop.example", "merchant_id": None},
            {"shop": "schöner.example", "merchant_id": None},
            {"shop": None, "sub": "\u212ashop.example", "merchant_id": None},
            {"sub": "a\nb"},
            {"jti": 7},
            {"jti": ["a"]},
            {"jti": "\ud800"},
            {"jti": "x" * 257},
        ],
        ids=str,
    )
    async def test_a_client_that_is_nobodys_is_refused(
        self, door: Door, change: dict[str, object]
    ) -> None:
        payload = json.dumps(claims(**change)).encode()
        with pytest.raises(UnauthenticatedError):
            await door.knock(signed_with({}, payload))

    async def test_a_sign_that_becomes_a_letter_is_nobodys_domain(self, door: Door) -> None:
        door.shops.merchants["kshop.example"] = OTHER_MERCHANT
        sign = "\u212ashop.example"
        for token in (
            client_jwt(merchant_id=None, shop=sign),
            client_jwt(merchant_id=None, shop=None, sub=sign),
        ):
            with pytest.raises(UnauthenticatedError):
                await door.knock(token)
        assert door.shops.asked == []
        ascii_only = await door.knock(client_jwt(merchant_id=None, shop="KSHOP.example"))
        assert isinstance(ascii_only, Client)
        assert ascii_only.merchant_id == OTHER_MERCHANT

    async def test_a_subject_that_can_be_no_domain_is_no_shop(self, door: Door) -> None:
        found = await door.knock(client_jwt(shop=None, sub="Zoë"))
        assert isinstance(found, Client)
        assert (found.merchant_id, found.shop) == (MERCHANT, None)

    async def test_a_service_is_claimed_or_the_subject(self, door: Door) -> None:
        assert (await door.knock(internal_jwt())).name == "settler"
        named = await door.knock(internal_jwt(sub="other"))
        assert named.name == "settler"
        whole = claims(merchant_id=None, shop=None, sub="by-subject")
        token = jwt.encode(whole, INTERNAL_SECRET, algorithm="HS256")
        assert (await door.knock(token)).name == "by-subject"

    @pytest.mark.parametrize("service", ["", " ", "a b", "x" * 129, "a\x00", 7, ["a"]])
    async def test_a_service_without_a_name_is_refused(self, door: Door, service: object) -> None:
        whole = claims(merchant_id=None, shop=None) | {"service": service}
        with pytest.raises(UnauthenticatedError):
            await door.knock(jwt.encode(whole, INTERNAL_SECRET, algorithm="HS256"))

    @pytest.mark.parametrize(
        ("scope", "scopes"),
        [
            (None, set()),
            ("", set()),
            ("a", {"a"}),
            ("  a   b ", {"a", "b"}),
            ("a a", {"a"}),
            ("a,b", {"a,b"}),
        ],
    )
    async def test_scopes_are_words_between_spaces(
        self, door: Door, scope: str | None, scopes: set[str]
    ) -> None:
        assert (await door.knock(client_jwt(scope=scope))).scopes == scopes


class TestCache:
    """A verified token is believed again without work, for a while, never past its end."""

    async def by_domain(self, door: Door, **changes: Any) -> str:
        """A token whose verification can be counted by its look-ups, already verified once."""
        token = client_jwt(merchant_id=None, **changes)
        await door.knock(token)
        return token

    async def test_the_second_knock_looks_nothing_up(self, door: Door) -> None:
        token = await self.by_domain(door)
        await door.knock(token)
        assert door.shops.asked == ["shop.example"]

    async def test_a_cached_token_ends_with_its_expiry(self, door: Door) -> None:
        token = await self.by_domain(door, exp=EPOCH + 10)
        door.clock.advance(10)
        await door.knock(token)
        await door.knock(token)
        assert len(door.shops.asked) == 3
        door.clock.advance(60)
        with pytest.raises(UnauthenticatedError):
            await door.knock(token)

    async def test_a_shop_that_moves_is_noticed(self, door: Door) -> None:
        token = await self.by_domain(door)
        door.shops.merchants["shop.example"] = OTHER_MERCHANT
        door.clock.advance(MAX_CACHED_S)
        found = await door.knock(token)
        assert isinstance(found, Client)
        assert found.merchant_id == OTHER_MERCHANT

    async def test_an_unknown_shop_is_asked_for_again(self, door: Door) -> None:
        token = client_jwt(merchant_id=None, shop="new.example")
        with pytest.raises(UnauthenticatedError):
            await door.knock(token)
        door.shops.merchants["new.example"] = MERCHANT
        assert (await door.knock(token)).kind == "client"

    async def test_the_database_away_is_not_remembered(self, door: Door) -> None:
        door.shops.away = True
        token = client_jwt(merchant_id=None)
        with pytest.raises(UnavailableError):
            await door.knock(token)
        door.shops.away = False
        assert (await door.knock(token)).kind == "client"

    async def test_the_oldest_is_forgotten_when_the_cache_is_full(self) -> None:
        door = Door(cached=2)
        first = await self.by_domain(door, jti="1")
        for jti in ("2", "3"):
            await self.by_domain(door, jti=jti)
        await door.knock(first)
        assert len(door.shops.asked) == 4

    async def test_refused_tokens_take_no_place(self) -> None:
        door = Door(cached=1)
        token = await self.by_domain(door)
        for n in range(5):
            with pytest.raises(UnauthenticatedError):
                await door.knock(jwt.encode(claims(jti=str(n)), "x" * 32, algorithm="HS256"))
        await door.knock(token)
        assert len(door.shops.asked) == 1
