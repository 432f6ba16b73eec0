"""Keys come and go while tokens are in use: rotation, reload, revocation, what is remembered."""

import asyncio
import base64
import json
from pathlib import Path
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from glamd.errors import ConfigError
from glamd.http.auth import Authenticator
from glamd.http.auth_metrics import OUTCOMES
from glamd.http.identity import Client, Identity, Internal
from glamd.http.jws import RefusedTokenError
from glamd.http.signers import MAX_TRIED
from glamd.merchants.store import Merchant
from tests.support.http_fakes import (
    CLIENT_SECRET,
    INTERNAL_SECRET,
    MERCHANT,
    SHORT_S,
    ManualClock,
    client_jwt,
    merchant,
)
from tests.support.http_world import nothing_is_revoked
from tests.support.jwt_keys import (
    ALL,
    Door,
    Shops,
    SigningKey,
    b64,
    es256,
    hs256,
    public_keys,
    request_with,
    rs256,
    signed_with,
)

P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
KEYS = pytest.mark.parametrize("key", ALL.values(), ids=ALL)


async def reason(door: Door, token: str) -> str:
    """Why it is refused."""
    with pytest.raises(RefusedTokenError) as caught:
        await door.knock(token)
    return caught.value.reason


def count(kind: str, outcome: str) -> float:
    """The metric of this moment."""
    labels = {"kind": kind, "outcome": outcome}
    return REGISTRY.get_sample_value("glamd_http_auth_total", labels) or 0.0


def other_half(token: str) -> str:
    """The same ES256 signature with n - s for s, which verifies as well."""
    signed, _, signature = token.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    s = P256_ORDER - int.from_bytes(raw[32:], "big")
    return f"{signed}.{b64(raw[:32] + s.to_bytes(32, 'big'))}"


class TestPublicKeys:
    """ES256, EdDSA and RS256."""

    @KEYS
    async def test_the_file_tells_the_kind_whatever_the_claims_say(
        self, tmp_path: Path, key: SigningKey
    ) -> None:
        keys = public_keys(tmp_path, key)
        token = key.token(service="settler")
        assert isinstance(await Door(client_keys=keys).knock(token), Client)
        assert isinstance(await Door(internal_keys=keys).knock(token), Internal)

    @KEYS
    async def test_the_audience_has_to_be_ours(self, tmp_path: Path, key: SigningKey) -> None:
        door = Door(client_keys=public_keys(tmp_path, key))
        assert await reason(door, key.token(aud=None)) == "audience"
        assert await reason(door, key.token(aud="other")) == "audience"
        assert (await door.knock(key.token(aud=["other", "glamd"]))).kind == "client"

    @KEYS
    async def test_without_a_kid_the_keys_that_fit_are_asked(
        self, tmp_path: Path, key: SigningKey
    ) -> None:
        keys = public_keys(tmp_path, es256("other"), rs256("rsa-2"), key)
        door = Door(client_keys=keys)
        assert (await door.knock(key.token({"kid": None}))).kind == "client"

    async def test_only_so_many_keys_are_asked(self, tmp_path: Path) -> None:
        keys = [es256(f"many-{n}") for n in range(MAX_TRIED + 1)]
        enough = Door(client_keys=public_keys(tmp_path, *keys[:MAX_TRIED]))
        assert (await enough.knock(keys[0].token({"kid": None}))).kind == "client"
        too_many = Door(client_keys=public_keys(tmp_path, *keys))
        assert await reason(too_many, keys[0].token({"kid": None})) == "unknown_key"
        assert (await too_many.knock(keys[0].token())).kind == "client"

    async def test_a_kid_of_both_files_finds_the_key_that_signed(self, tmp_path: Path) -> None:
        mine, theirs = es256("one"), rs256("two")
        named_alike = SigningKey("one", "RS256", theirs.private)
        door = Door(
            client_keys=public_keys(tmp_path, mine),
            internal_keys=public_keys(tmp_path, named_alike),
        )
        assert (await door.knock(mine.token())).kind == "client"
        assert (await door.knock(named_alike.token(service="settler"))).kind == "internal"

    async def test_a_kid_is_compared_character_by_character(self, tmp_path: Path) -> None:
        key = es256("schl\u00fcssel-1")
        door = Door(client_keys=public_keys(tmp_path, key))
        assert (await door.knock(key.token())).kind == "client"
        assert await reason(door, key.token({"kid": "schlu\u0308ssel-1"})) == "unknown_key"

    async def test_one_key_is_of_one_kind_and_one_name(self, tmp_path: Path) -> None:
        key = public_keys(tmp_path, es256("one"))
        again = public_keys(tmp_path, SigningKey("two", "ES256", es256("one").private))
        for pair in ((key, key), (key, again), (key + again, ()), ((), again + key)):
            with pytest.raises(ConfigError, match="one and the same"):
                Door(client_keys=pair[0], internal_keys=pair[1])


class TestSecrets:
    """What cannot be a secret is told before the first token."""

    def door(self, client: str, internal: str = INTERNAL_SECRET) -> Authenticator:
        """With these secrets."""
        return Authenticator(
            client_secrets=[client],
            internal_secrets=[internal],
            require_audience=False,
            merchant_by_domain=Shops(),
            clock=ManualClock(),
            is_revoked=nothing_is_revoked,
        )

    @pytest.mark.parametrize(
        "secret",
        [
            "",
            "x" * 31,
            rs256().public_bytes(Encoding.PEM).decode(),
            rs256().private_pem().decode(),
            es256().public_bytes(Encoding.PEM).decode(),
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            json.dumps(rs256().jwk()),
            json.dumps({"keys": [rs256().jwk()]}),
        ],
        ids=["empty", "short", "PEM", "private PEM", "EC PEM", "SSH", "JWK", "JWKS"],
    )
    def test_a_key_of_another_kind_is_no_secret(self, secret: str) -> None:
        # Otherwise whoever has the public key could sign with it.
        with pytest.raises(ConfigError, match="client JWT secret") as caught:
            self.door(secret)
        assert not secret or secret not in caught.value.message

    def test_one_secret_is_of_one_kind(self) -> None:
        with pytest.raises(ConfigError, match="either"):
            self.door(INTERNAL_SECRET)


class TestRotation:
    """By kid, while the daemon runs."""

    async def test_old_and_new_are_valid_at_once_and_then_only_the_new(
        self, tmp_path: Path
    ) -> None:
        old, new = es256("old"), rs256("new")
        door = Door(client_keys=public_keys(tmp_path, old))
        before = old.token()
        assert (await door.knock(before)).kind == "client"
        assert await reason(door, new.token()) == "algorithm"
        door.replace(public_keys(tmp_path, old, new))
        assert (await door.knock(before)).kind == "client"
        assert (await door.knock(new.token())).kind == "client"
        door.replace(public_keys(tmp_path, new))
        assert await reason(door, before) == "algorithm"
        assert (await door.knock(new.token())).kind == "client"

    async def test_a_removed_key_stops_at_once_though_its_token_is_cached(
        self, tmp_path: Path
    ) -> None:
        old, new = es256("old"), es256("new")
        door = Door(client_keys=public_keys(tmp_path, old, new))
        token = old.token()
        await door.knock(token)
        assert door.cached(token) is not None
        door.replace(public_keys(tmp_path, new))
        assert door.cached(token) is None
        assert await reason(door, token) == "unknown_key"
        assert await reason(door, old.token({"kid": None})) == "signature"
        assert await reason(door, old.token({"kid": "new"})) == "signature"

    async def test_a_removed_secret_stops_at_once(self) -> None:
        door = Door()
        token = client_jwt()
        await door.knock(token)
        door.authenticator.replace_keys(
            client_secrets=["the-secret-after-this-one-32-bytes!!"],
            internal_secrets=[INTERNAL_SECRET],
        )
        assert await reason(door, token) == "signature"

    async def test_the_order_of_secrets_does_not_matter(self) -> None:
        door = Door()
        secrets = ["a-secret-that-comes-before-32-bytes!", CLIENT_SECRET]
        for order in (secrets, secrets[::-1]):
            door.authenticator.replace_keys(client_secrets=order, internal_secrets=[])
            for secret in secrets:
                assert (await door.knock(client_jwt(secret=secret))).kind == "client"

    async def test_a_mistake_leaves_everything_as_it_was(self, tmp_path: Path) -> None:
        key = es256()
        door = Door(client_keys=public_keys(tmp_path, key))
        token = key.token()
        await door.knock(token)
        with pytest.raises(ConfigError):
            door.authenticator.replace_keys(
                client_secrets=["short"], internal_secrets=[], client_keys=()
            )
        assert door.cached(token) is not None
        assert (await door.knock(key.token(jti="another"))).kind == "client"
        assert (await door.knock(client_jwt())).kind == "client"


class SlowShops(Shops):
    """Look-ups that wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()

    async def __call__(self, domain: str) -> Merchant:
        """Say that it was asked, and wait."""
        self.entered.set()
        await self.gate.wait()
        return merchant()


class TestMeanwhile:
    """What changes while a shop is being looked up counts."""

    async def knock_and_wait(self, door: Door, token: str) -> "asyncio.Task[Identity]":
        """A knock that has got as far as the look-up."""
        assert isinstance(door.shops, SlowShops)
        knock = asyncio.create_task(door.knock(token))
        async with asyncio.timeout(SHORT_S):
            await door.shops.entered.wait()
        return knock

    async def test_a_key_that_is_removed_is_not_believed(self, tmp_path: Path) -> None:
        key, shops = es256(), SlowShops()
        door = Door(client_keys=public_keys(tmp_path, key), shops=shops)
        token = key.token(merchant_id=None)
        knock = await self.knock_and_wait(door, token)
        door.replace()
        shops.gate.set()
        with pytest.raises(RefusedTokenError) as caught:
            await knock
        assert caught.value.reason == "algorithm"
        assert door.cached(token) is None

    async def test_a_token_that_is_revoked_is_not_believed(self) -> None:
        shops = SlowShops()
        door = Door(shops=shops)
        token = client_jwt(merchant_id=None, jti="stolen")
        knock = await self.knock_and_wait(door, token)
        door.revoked.jtis.add("stolen")
        shops.gate.set()
        with pytest.raises(RefusedTokenError) as caught:
            await knock
        assert caught.value.reason == "revoked"
        assert door.cached(token) is None


class TestRevocation:
    """By jti, and by the kid of the key that signed."""

    async def test_a_revoked_jti_stops_a_cached_token_at_once(self) -> None:
        door = Door()
        token, other = client_jwt(jti="stolen"), client_jwt(jti="mine")
        await door.knock(token)
        await door.knock(other)
        door.revoked.jtis.add("stolen")
        assert door.cached(token) is None
        assert await reason(door, token) == "revoked"
        assert door.cached(other) is not None

    @KEYS
    async def test_a_revoked_kid_stops_a_cached_token_at_once(
        self, tmp_path: Path, key: SigningKey
    ) -> None:
        door = Door(client_keys=public_keys(tmp_path, key))
        token = key.token()
        await door.knock(token)
        door.revoked.kids.add(key.kid)
        assert door.cached(token) is None
        assert await reason(door, token) == "revoked"

    async def test_leaving_the_kid_out_does_not_help(self, tmp_path: Path) -> None:
        key = es256()
        door = Door(client_keys=public_keys(tmp_path, key))
        token = key.token({"kid": None})
        await door.knock(token)
        door.revoked.kids.add(key.kid)
        assert await reason(door, token) == "revoked"

    async def test_a_kid_that_hs256_names_is_there_to_be_revoked(self) -> None:
        door = Door()
        token, other = signed_with({"kid": "2026-11"}), signed_with({"kid": "2026-12"})
        await door.knock(token)
        door.revoked.kids.add("2026-11")
        assert await reason(door, token) == "revoked"
        assert (await door.knock(other)).kind == "client"
        assert (await door.knock(client_jwt())).kind == "client"

    async def test_a_kid_of_a_public_key_does_not_mend_hs256(self, tmp_path: Path) -> None:
        door = Door(client_keys=public_keys(tmp_path, rs256()))
        pem = rs256().public_bytes(Encoding.PEM)
        assert (
            await reason(door, hs256(b'{"alg":"HS256","kid":"rsa-1"}', b"{}", pem)) == "signature"
        )

    async def test_a_jti_is_no_kid_and_a_kid_no_jti(self) -> None:
        door = Door()
        door.revoked.jtis.add("a")
        door.revoked.kids.add("b")
        assert (await door.knock(signed_with({"kid": "a"}))).kind == "client"
        assert (await door.knock(client_jwt(jti="b"))).kind == "client"

    async def test_another_spelling_of_a_signature_is_revoked_with_it(self, tmp_path: Path) -> None:
        # With every ES256 signature its twin verifies, which anybody can make of it.
        key = es256()
        door = Door(client_keys=public_keys(tmp_path, key))
        token = key.token(jti="stolen")
        twin = other_half(token)
        assert twin != token
        assert await door.knock(twin) == await door.knock(token)
        door.revoked.jtis.add("stolen")
        assert await reason(door, twin) == "revoked"
        assert await reason(door, token) == "revoked"

    async def test_revoked_comes_before_the_shop_is_looked_up(self) -> None:
        door = Door()
        door.shops.away = True
        door.revoked.jtis.add("stolen")
        assert await reason(door, client_jwt(merchant_id=None, jti="stolen")) == "revoked"


class TestOutcomes:
    """What is counted, and what is logged."""

    async def test_the_first_is_verified_and_the_next_cached(self) -> None:
        door = Door()
        verified, cached = count("client", "verified"), count("client", "cached")
        token = client_jwt()
        for _ in range(3):
            await door.knock(token)
        assert count("client", "verified") == verified + 1
        assert count("client", "cached") == cached + 2

    @pytest.mark.parametrize(
        ("token", "outcome"),
        [
            ("", "missing"),
            ("a", "malformed"),
            (signed_with({"alg": "none"}), "algorithm"),
            (es256().token({"kid": "gone"}), "unknown_key"),
            (client_jwt(secret="x" * 32), "signature"),
            (client_jwt(exp=1), "expired"),
            (client_jwt(nbf=2**40), "not_yet_valid"),
            (client_jwt(exp=2**40), "lifetime"),
            (client_jwt(aud="x"), "audience"),
            (client_jwt(shop=7), "claims"),
            (client_jwt(jti="revoked"), "revoked"),
        ],
        ids=lambda value: value if "." not in value else "",
    )
    async def test_a_refusal_is_counted_by_its_reason_and_says_nothing_of_the_token(
        self, tmp_path: Path, token: str, outcome: str
    ) -> None:
        door = Door(client_keys=public_keys(tmp_path, es256()))
        door.revoked.jtis.add("revoked")
        before = count("unknown", outcome)
        with capture_logs() as logs:
            assert await reason(door, token) == outcome
        assert count("unknown", outcome) == before + 1
        assert logs == [{"event": "token_refused", "reason": outcome, "log_level": "debug"}]

    async def test_asking_the_cache_alone_counts_no_refusal_and_raises_nothing(self) -> None:
        door = Door()
        before = [metric.samples for metric in OUTCOMES.collect()]
        for header in ("", "Bearer", "Bearer a\udcffb", "Bearer \u00e9", "x" * 9000):
            assert door.authenticator.cached(request_with(header)) is None
        assert door.authenticator.cached(request_with()) is None
        assert [metric.samples for metric in OUTCOMES.collect()] == before

    async def test_what_the_cache_gives_is_what_was_verified(self) -> None:
        door = Door()
        token = client_jwt()
        found = await door.knock(token)
        assert door.cached(token) is found
        assert isinstance(found, Client)
        assert found.merchant_id == UUID(str(MERCHANT))

    async def test_two_headers_are_never_answered_from_the_cache(self) -> None:
        door = Door()
        await door.knock(client_jwt())
        both = request_with(f"Bearer {client_jwt()}", f"Bearer {client_jwt()}")
        assert door.authenticator.cached(both) is None

    async def test_neither_the_cache_nor_a_repr_holds_a_token(self, tmp_path: Path) -> None:
        door = Door(client_keys=public_keys(tmp_path, es256()))
        token = es256().token(jti="a-secret-looking-jti")
        await door.knock(token)
        held = repr(door.authenticator._cache)
        assert token.split(".")[2] not in held
        assert "a-secret-looking-jti" not in held
