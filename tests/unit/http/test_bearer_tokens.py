"""Bearer tokens: every known trick is a 401, and what is believed is read as the contract says."""

import base64
import json
from typing import Any
from uuid import UUID

import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from glamd.errors import ConfigError, NotFoundError, UnauthenticatedError, UnavailableError
from glamd.http.auth import MAX_CACHED_S, MAX_TOKEN_CHARS, Authenticator
from glamd.http.identity import Client, Identity, Internal
from glamd.merchants.store import Merchant
from tests.support.http_fakes import (
    CLIENT_SECRET,
    INTERNAL_SECRET,
    MERCHANT,
    NOW,
    OTHER_MERCHANT,
    ManualClock,
    claims,
    client_jwt,
    forged_jwt,
    internal_jwt,
    merchant,
)

EPOCH = int(NOW.timestamp())
PREVIOUS_SECRET = "the-secret-before-this-one-32-bytes!"


class Shops:
    """Which merchant a domain belongs to, and how often that was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.merchants = {"shop.example": MERCHANT}
        self.away = False

    async def __call__(self, domain: str) -> Merchant:
        """Look it up."""
        self.asked.append(domain)
        if self.away:
            raise UnavailableError("The database is away.")
        if domain not in self.merchants:
            raise NotFoundError("There is no such merchant.", code="MERCHANT_NOT_FOUND")
        return merchant(self.merchants[domain], domain)


class Door:
    """An authenticator and a way to knock."""

    def __init__(self, *, require_audience: bool = False, cached: int = 100) -> None:
        self.clock = ManualClock()
        self.shops = Shops()
        self.authenticator = Authenticator(
            client_secrets=[CLIENT_SECRET, PREVIOUS_SECRET],
            internal_secrets=[INTERNAL_SECRET],
            require_audience=require_audience,
            merchant_by_domain=self.shops,
            clock=self.clock,
            cached=cached,
        )

    async def knock(self, token: str) -> Identity:
        """Who this token's bearer is."""
        request: web.Request = make_mocked_request(
            "GET", "/", headers={"Authorization": f"Bearer {token}"}
        )
        return await self.authenticator(request)


@pytest.fixture
def door() -> Door:
    """A door with the tests' secrets."""
    return Door()


def unsigned(header: dict[str, object]) -> str:
    """Good claims under this header, unsigned."""
    return forged_jwt(header, claims()).rsplit(".", 1)[0] + "."


def signed_with(header: dict[str, object], payload: bytes | None = None) -> str:
    """Any header over any payload, honestly signed with our own secret."""
    body = json.dumps(claims()).encode() if payload is None else payload
    token = forged_jwt({"alg": "HS256"} | header, body).rsplit(".", 1)[0]
    algorithm = jwt.get_algorithm_by_name("HS256")
    signature = algorithm.sign(token.encode(), algorithm.prepare_key(CLIENT_SECRET))
    return f"{token}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def rsa_key() -> rsa.RSAPrivateKey:
    """An attacker's key."""
    return rsa.generate_private_key(65537, 2048)


def public_pem(key: rsa.RSAPrivateKey) -> bytes:
    """Its public half."""
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def with_embedded_key(header: str) -> str:
    """Signed with a key that the token itself brings."""
    secret = b"the attacker's own secret, 32 bytes"
    jwk = {"kty": "oct", "k": base64.urlsafe_b64encode(secret).decode()}
    return jwt.encode(claims(), secret, algorithm="HS256", headers={header: jwk})


SIGNATURES = {
    "alg none": unsigned({"alg": "none"}),
    "alg None": unsigned({"alg": "None"}),
    "alg absent": unsigned({"typ": "JWT"}),
    "alg null": unsigned({"alg": None}),
    "alg list": unsigned({"alg": ["HS256"]}),
    "alg object": unsigned({"alg": {"HS256": 1}}),
    "alg number": unsigned({"alg": 256}),
    "no signature": unsigned({"alg": "HS256"}),
    "a wrong signature": forged_jwt({"alg": "HS256"}, claims()),
    "an unknown secret": jwt.encode(claims(), "x" * 32, algorithm="HS256"),
    "HS384": jwt.encode(claims(), CLIENT_SECRET * 2, algorithm="HS384"),
    "HS512": jwt.encode(claims(), CLIENT_SECRET * 2, algorithm="HS512"),
    "embedded jwk": with_embedded_key("jwk"),
    "embedded jwk, our signature": signed_with({"jwk": {"kty": "oct", "k": "AA"}}),
    "jku": signed_with({"jku": "https://evil.example/jwks"}),
    "x5u": signed_with({"x5u": "https://evil.example/x5u"}),
    "x5c": signed_with({"x5c": ["AA"]}),
    "crit unknown": signed_with({"crit": ["exp"]}),
    "crit empty": signed_with({"crit": []}),
    "crit text": signed_with({"crit": "b64"}),
    "crit b64": signed_with({"crit": ["b64"], "b64": True}),
    "b64 false": signed_with({"crit": ["b64"], "b64": False}),
    "kid number": signed_with({"kid": 7}),
    "kid path": forged_jwt({"alg": "HS256", "kid": "../../dev/null"}, claims()),
    "header no object": forged_jwt([1], claims()),  # type: ignore[arg-type]
    "empty parts": "..",
    "one part": "abc",
    "four parts": client_jwt() + ".abc",
    "five parts, a JWE": "a.b.c.d.e",
    "junk base64": "!!!.???.***",
    "padded junk": client_jwt() + "====",
    "header nested deep": "",
    "not ascii": "a\u00e9.b.c",
    "long": "a" * (MAX_TOKEN_CHARS + 1),
}
SIGNATURES["header nested deep"] = (
    base64.urlsafe_b64encode(b"[" * 1500).rstrip(b"=").decode() + ".e30.AA"
)


class TestSignatures:
    """Tokens that are not ours."""

    @pytest.mark.parametrize("token", SIGNATURES.values(), ids=SIGNATURES)
    async def test_a_token_that_is_not_ours_is_refused(self, door: Door, token: str) -> None:
        with pytest.raises(UnauthenticatedError) as caught:
            await door.knock(token)
        assert token[:20] not in caught.value.message or token in ("..", "abc")

    async def test_a_public_key_is_no_secret(self, door: Door) -> None:
        key = rsa_key()
        with pytest.raises(UnauthenticatedError):
            await door.knock(jwt.encode(claims(), key, algorithm="RS256"))

    def test_a_pem_key_as_a_secret_is_a_mistake_of_the_configuration(self) -> None:
        # Otherwise whoever has the public key could sign with it.
        with pytest.raises(ConfigError, match="client JWT secret"):
            Authenticator(
                client_secrets=[public_pem(rsa_key()).decode()],
                internal_secrets=[],
                require_audience=False,
                merchant_by_domain=Shops(),
                clock=ManualClock(),
            )

    async def test_flipping_any_part_breaks_it(self, door: Door) -> None:
        parts = client_jwt().split(".")
        for number in range(3):
            changed = list(parts)
            middle = len(changed[number]) // 2
            letter = "A" if changed[number][middle] != "A" else "B"
            changed[number] = changed[number][:middle] + letter + changed[number][middle + 1 :]
            with pytest.raises(UnauthenticatedError):
                await door.knock(".".join(changed))

    async def test_the_same_signature_spelled_otherwise_is_refused(self, door: Door) -> None:
        # The last character of 43 carries two bits that do not count.
        token = client_jwt()
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        twin = token[:-1] + alphabet[alphabet.index(token[-1]) ^ 1]
        with pytest.raises(UnauthenticatedError):
            await door.knock(twin)

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
        "audience", ["other", "", "Glamd", ["other"], [], [["glamd"]], {"glamd": 1}, 7, False]
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
        ],
        ids=str,
    )
    async def test_a_client_that_is_nobodys_is_refused(
        self, door: Door, change: dict[str, object]
    ) -> None:
        payload = json.dumps(claims(**change)).encode()
        with pytest.raises(UnauthenticatedError):
            await door.knock(signed_with({}, payload))

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
