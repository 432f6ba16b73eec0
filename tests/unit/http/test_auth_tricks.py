"""Every known trick with a JWT is a 401, for the reason that it is meant to be one.

A trick is told by the reason of its refusal, so that none passes for refused only because the test
got something else wrong.
"""

import base64
import contextlib
import json
from collections.abc import Mapping

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import assume, given
from hypothesis import strategies as st

from glamd.errors import UnauthenticatedError
from glamd.http.jws import MAX_TOKEN_CHARS, RefusedTokenError
from tests.support.http_fakes import (
    CLIENT_SECRET,
    MERCHANT,
    claims,
    client_jwt,
    forged_jwt,
    internal_jwt,
)
from tests.support.jwt_keys import (
    ALL,
    Door,
    SigningKey,
    b64,
    eddsa,
    es256,
    hs256,
    public_keys,
    request_with,
    rs256,
    signed_with,
)

P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
GOOD = json.dumps(claims()).encode()
HS = b'{"alg":"HS256","typ":"JWT"}'


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Door:
    """A door that believes secrets and one key of each algorithm."""
    return Door(client_keys=public_keys(tmp_path_factory.mktemp("door"), *ALL.values()))


async def reason(door: Door, token: str) -> str:
    """Why it is refused."""
    with pytest.raises(RefusedTokenError) as caught:
        await door.knock(token)
    assert caught.value.code == "UNAUTHENTICATED"
    assert token not in caught.value.message or not token.strip(".")
    return caught.value.reason


def unsigned(header: dict[str, object]) -> str:
    """Good claims under this header, unsigned."""
    return forged_jwt(header, claims()).rsplit(".", 1)[0] + "."


def with_embedded_key(header: str) -> str:
    """Signed with a key that the token itself brings."""
    secret = b"the attacker's own secret, 32 bytes"
    jwk = {"kty": "oct", "k": base64.urlsafe_b64encode(secret).decode()}
    return hs256(json.dumps({"alg": "HS256", header: jwk}).encode(), GOOD, secret)


def attackers(header: Mapping[str, object]) -> str:
    """Signed with a key of the attacker's own, which the header brings or names."""
    return SigningKey("mine", "ES256", ec.generate_private_key(ec.SECP256R1())).token(header)


def resigned(token: str, signature: bytes) -> str:
    """The token with another signature."""
    return f"{token.rsplit('.', 1)[0]}.{b64(signature)}"


def signature_of(token: str) -> bytes:
    """Its bytes."""
    return base64.urlsafe_b64decode(token.rsplit(".", 1)[1] + "==")


def der(token: str) -> bytes:
    """An ES256 signature as TLS would write it."""
    raw = signature_of(token)
    return encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))


SPELLINGS = {
    "empty parts": "..",
    "one part": "abc",
    "two parts": "e30.e30",
    "four parts": client_jwt() + ".abc",
    "five parts, a JWE": "a.b.c.d.e",
    "a JSON serialization": '{"payload":"e30","signatures":[]}',
    "no signature": unsigned({"alg": "HS256"}),
    "junk base64": "!!!.???.***",
    "letters too many": client_jwt() + "AA",
    "padded": client_jwt() + "=",
    "padded in the middle": client_jwt().replace(".", "=.", 1),
    "padded too much": client_jwt() + "====",
    "space inside": client_jwt().replace(".", ". ", 1),
    "line feed at the end": client_jwt() + "\n",
    "line feed inside": client_jwt().replace(".", "\n.", 1),
    "tab at the end": client_jwt() + "\t",
    "NUL at the end": client_jwt() + "\x00",
    "the other alphabet": client_jwt().replace("-", "+").replace("_", "/") + "+",
    "not ascii": "a\u00e9.b.c",
    "a byte that is no text": "a\udcff.b.c",
    "other digits": client_jwt() + "\u0661",
    "long": "a" * (MAX_TOKEN_CHARS + 1),
    "long, three parts": client_jwt(padding="x" * MAX_TOKEN_CHARS),
    "header no object": forged_jwt([1], claims()),  # type: ignore[arg-type]
    "header nested deep": f"{b64(b'[' * 1500)}.e30.AA",
    "header nested deep in an object": b64(b'{"a":' * 340) + ".e30.AA",
    "header in UTF-16": hs256('{"alg":"HS256"}'.encode("utf-16"), GOOD),
    "header in UTF-16, no mark": hs256('{"alg":"HS256"}'.encode("utf-16-le"), GOOD),
    "header with a mark": hs256(b"\xef\xbb\xbf" + HS, GOOD),
    "header no UTF-8": hs256(b'{"alg":"HS256","a":"\xff"}', GOOD),
    "header with NaN": hs256(b'{"alg":"HS256","a":NaN}', GOOD),
    "header and more": hs256(HS + b"{}", GOOD),
    "alg twice": hs256(b'{"alg":"none","alg":"HS256"}', GOOD),
    "alg twice, the other order": hs256(b'{"alg":"HS256","alg":"none"}', GOOD),
    "alg twice, escaped": hs256(b'{"alg":"HS256","\\u0061lg":"HS256"}', GOOD),
    "kid twice": hs256(b'{"alg":"HS256","kid":"a","kid":"b"}', GOOD),
    "twice, further in": hs256(b'{"alg":"HS256","x":{"a":1,"a":2}}', GOOD),
}

HEADERS = {
    "alg absent": unsigned({"typ": "JWT"}) + "AAAA",
    "alg null": signed_with({"alg": None}),
    "alg list": signed_with({"alg": ["HS256"]}),
    "alg object": signed_with({"alg": {"HS256": 1}}),
    "alg number": signed_with({"alg": 256}),
    "embedded jwk": with_embedded_key("jwk"),
    "embedded jwk, our signature": signed_with({"jwk": {"kty": "oct", "k": "AA"}}),
    "embedded jwk, our kid": attackers({"kid": "ec-1", "jwk": es256().jwk()}),
    "jwk null": signed_with({"jwk": None}),
    "jku": signed_with({"jku": "https://evil.example/jwks"}),
    "jku, our kid": attackers({"kid": "ec-1", "jku": "https://evil.example/jwks"}),
    "x5u": signed_with({"x5u": "https://evil.example/x5u"}),
    "x5c": signed_with({"x5c": ["AA"]}),
    "crit unknown": signed_with({"crit": ["exp"]}),
    "crit known": signed_with({"crit": ["alg"]}),
    "crit empty": signed_with({"crit": []}),
    "crit text": signed_with({"crit": "b64"}),
    "crit null": signed_with({"crit": None}),
    "crit b64": signed_with({"crit": ["b64"], "b64": True}),
    "b64 false": signed_with({"crit": ["b64"], "b64": False}),
    "b64 false, not critical": signed_with({"b64": False}),
    "b64 true": signed_with({"b64": True}),
    "zip": signed_with({"zip": "DEF"}),
    "enc": signed_with({"enc": "A256GCM"}),
    "nested": signed_with({"cty": "JWT"}, client_jwt().encode()),
    "nested by name only": signed_with({"cty": "JWT"}),
    "typ null": signed_with({"typ": None}),
    "typ number": signed_with({"typ": 1}),
    "typ list": signed_with({"typ": ["JWT"]}),
    "typ empty": signed_with({"typ": ""}),
    "typ JWE": signed_with({"typ": "JWE"}),
    "typ of a logout": signed_with({"typ": "logout+jwt"}),
    "typ of a proof": signed_with({"typ": "dpop+jwt"}),
    "typ of twice the prefix": signed_with({"typ": "application/application/jwt"}),
    "kid number": signed_with({"kid": 7}),
    "kid null": signed_with({"kid": None}),
    "kid empty": signed_with({"kid": ""}),
    "kid list": signed_with({"kid": ["ec-1"]}),
    "kid with NUL": signed_with({"kid": "ec-1\x00"}),
    "kid half a character": signed_with({"kid": "\ud800"}),
    "kid long": signed_with({"kid": "k" * 257}),
}

ALGORITHMS = {
    "none": unsigned({"alg": "none"}) + "AAAA",
    "None": unsigned({"alg": "None"}) + "AAAA",
    "nOnE, our signature": signed_with({"alg": "nOnE"}),
    "empty": signed_with({"alg": ""}),
    "hs256": signed_with({"alg": "hs256"}),
    "HS256 and a space": signed_with({"alg": "HS256 "}),
    "HS384": jwt.encode(claims(), CLIENT_SECRET * 2, algorithm="HS384"),
    "HS512": jwt.encode(claims(), CLIENT_SECRET * 2, algorithm="HS512"),
    "es256": es256().token({"alg": "es256"}),
    "RS384": rs256().token({"alg": "RS384"}),
    "RS512": rs256().sign(b'{"alg":"RS512","kid":"rsa-1"}', GOOD, algorithm="RS512"),
    "PS256": rs256().sign(b'{"alg":"PS256","kid":"rsa-1"}', GOOD, algorithm="PS256"),
    "ES384": SigningKey("x", "ES384", ec.generate_private_key(ec.SECP384R1())).token(),
    "ES256K": SigningKey("x", "ES256K", ec.generate_private_key(ec.SECP256K1())).token(),
    "Ed25519 by its newer name": eddsa().token({"alg": "Ed25519"}),
    "RSA1_5": signed_with({"alg": "RSA1_5"}),
    "dir": signed_with({"alg": "dir"}),
}

MIXED = {
    "an RSA key named by ES256": rs256().token({"alg": "ES256"}),
    "an EC key named by EdDSA": es256().token({"alg": "EdDSA"}),
    "an EC key named by RS256": es256().token({"alg": "RS256"}),
    "HS256's signature named RS256": hs256(b'{"alg":"RS256","kid":"ec-1"}', GOOD),
    "an unknown kid": es256().token({"kid": "ec-2"}),
    "a kid with a space": es256().token({"kid": "ec-1 "}),
    "a kid in other letters": es256().token({"kid": "EC-1"}),
    "a kid that is a path": es256().token({"kid": "../../dev/null"}),
    "a kid that is SQL": es256().token({"kid": "x' OR '1'='1"}),
}

SECRETS = {
    "the RSA key's PEM": rs256().public_bytes(Encoding.PEM),
    "the RSA key's PEM, no line end": rs256().public_bytes(Encoding.PEM).strip(),
    "the RSA key's DER": rs256().public_bytes(Encoding.DER),
    "the RSA key's JWK": json.dumps(rs256().jwk()).encode(),
    "the RSA key's modulus": base64.urlsafe_b64decode(rs256().jwk()["n"] + "=="),
    "the EC key's PEM": es256().public_bytes(Encoding.PEM),
    "the Ed25519 key's bytes": base64.urlsafe_b64decode(eddsa().jwk()["x"] + "=="),
    "the Ed25519 key's text": eddsa().jwk()["x"].encode(),
    "the kid": b"rsa-1",
    "nothing": b"",
    "another secret": b"x" * 32,
}

ES = es256().token()
ED = eddsa().token()
RS = rs256().token()
SIGNATURES = {
    "wrong": forged_jwt({"alg": "HS256"}, claims()),
    "HS256, cut short": resigned(client_jwt(), signature_of(client_jwt())[:16]),
    "HS256, longer": resigned(client_jwt(), signature_of(client_jwt()) + b"\0"),
    "ES256, all zero": resigned(ES, bytes(64)),
    "ES256, r zero": resigned(ES, bytes(32) + signature_of(ES)[32:]),
    "ES256, the order for both": resigned(ES, P256_ORDER.to_bytes(32, "big") * 2),
    "ES256, all ones": resigned(ES, b"\xff" * 64),
    "ES256, DER": resigned(ES, der(ES)),
    "ES256, longer": resigned(ES, signature_of(ES) + b"\0"),
    "ES256, one half": resigned(ES, signature_of(ES)[:32]),
    "ES256, the hash of an empty text": resigned(ES, signature_of(es256().sign(b"", b""))),
    "ES256, another curve": SigningKey(
        "ec-1", "ES384", ec.generate_private_key(ec.SECP384R1())
    ).token({"alg": "ES256"}),
    "ES256, a key of the same name": attackers({"kid": "ec-1"}),
    "EdDSA, all zero": resigned(ED, bytes(64)),
    "EdDSA, s and the order": resigned(
        ED,
        signature_of(ED)[:32]
        + (int.from_bytes(signature_of(ED)[32:], "little") + ED25519_ORDER).to_bytes(32, "little"),
    ),
    "EdDSA, Ed448": SigningKey("ed-1", "EdDSA", ed448.Ed448PrivateKey.generate()).token(),
    "EdDSA, cut short": resigned(ED, signature_of(ED)[:63]),
    "RS256, all zero": resigned(RS, bytes(256)),
    "RS256, one": resigned(RS, (1).to_bytes(256, "big")),
    "RS256, leading zero": resigned(RS, b"\0" + signature_of(RS)),
    "RS256, by PSS": rs256().sign(b'{"alg":"RS256","kid":"rsa-1"}', GOOD, algorithm="PS256"),
    "RS256, by SHA-512": rs256().sign(b'{"alg":"RS256","kid":"rsa-1"}', GOOD, algorithm="RS512"),
    "RS256, a key of the same name": rs256("rsa-2").token({"kid": "rsa-1"}),
    "ES256's signature on RS256": resigned(RS, signature_of(ES)),
}

CLAIMS = {
    "exp twice": b'{"exp":1893502800,"exp":99999999999,"shop":"shop.example"}',
    "merchant twice": GOOD[:-1] + b',"merchant_id":"0e8b3f1c-7d2a-4c1b-8a39-5d6e7f809102"}',
    "merchant twice, escaped": GOOD[:-1] + b',"\\u006derchant_id":"x"}',
    "twice, further in": GOOD[:-1] + b',"x":[{"a":1,"a":1}]}',
    "NaN": GOOD[:-1] + b',"x":NaN}',
    "Infinity": GOOD[:-1] + b',"x":-Infinity}',
    "UTF-16": GOOD.decode().encode("utf-16"),
    "a mark": b"\xef\xbb\xbf" + GOOD,
    "no UTF-8": GOOD[:-1] + b',"x":"\xff"}',
    "and more": GOOD + b"{}",
    "deep": GOOD[:-1] + b',"x":' + b"[" * 1100 + b"]" * 1100 + b"}",
    "a list": b"[" + GOOD + b"]",
    "a text": b'"x"',
    "null": b"null",
    "nothing but a brace": b"{",
}


class TestTricks:
    """One table for each way of being wrong."""

    @pytest.mark.parametrize("token", SPELLINGS.values(), ids=SPELLINGS)
    async def test_what_is_spelled_otherwise_is_no_jwt(self, door: Door, token: str) -> None:
        assert await reason(door, token) == "malformed"

    @pytest.mark.parametrize("token", HEADERS.values(), ids=HEADERS)
    async def test_a_header_that_asks_for_more_is_refused(self, door: Door, token: str) -> None:
        assert await reason(door, token) == "malformed"

    @pytest.mark.parametrize("token", ALGORITHMS.values(), ids=ALGORITHMS)
    async def test_any_other_algorithm_is_refused(self, door: Door, token: str) -> None:
        assert await reason(door, token) == "algorithm"

    @pytest.mark.parametrize("token", MIXED.values(), ids=MIXED)
    async def test_a_kid_names_a_key_of_that_algorithm_or_none(
        self, door: Door, token: str
    ) -> None:
        assert await reason(door, token) == "unknown_key"

    @pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
    @pytest.mark.parametrize("kid", ["rsa-1", "ec-1", None])
    async def test_what_anybody_knows_is_no_secret(
        self, door: Door, secret: bytes, kid: str | None
    ) -> None:
        header = {"alg": "HS256"} | ({} if kid is None else {"kid": kid})
        token = hs256(json.dumps(header).encode(), GOOD, secret)
        assert await reason(door, token) == "signature"

    @pytest.mark.parametrize("token", SIGNATURES.values(), ids=SIGNATURES)
    async def test_a_signature_that_is_not_ours_is_refused(self, door: Door, token: str) -> None:
        assert await reason(door, token) == "signature"

    @pytest.mark.parametrize("payload", CLAIMS.values(), ids=CLAIMS)
    async def test_claims_that_two_readers_may_read_differently_are_refused(
        self, door: Door, payload: bytes
    ) -> None:
        assert await reason(door, signed_with({}, payload)) == "malformed"

    @pytest.mark.parametrize(
        "typ", ["JWT", "jwt", "at+jwt", "AT+JWT", "application/jwt", "application/at+jwt"]
    )
    async def test_an_access_token_may_say_that_it_is_one(self, door: Door, typ: str) -> None:
        assert (await door.knock(signed_with({"typ": typ}))).kind == "client"

    async def test_headers_that_mean_nothing_to_us_do_no_harm(self, door: Door) -> None:
        token = signed_with({"x5t": "AA", "x5t#S256": "AA", "iss": "x", "url": "https://a.example"})
        assert (await door.knock(token)).kind == "client"

    async def test_one_header_is_read_and_no_other(self, door: Door) -> None:
        token = client_jwt()
        for headers in (
            [],
            [""],
            ["Bearer"],
            ["Bearer "],
            [token],
            [f"Basic {token}"],
            [f"Bearer\t{token}"],
            [f"Bearer {token}", f"Bearer {token}"],
            [f"Bearer {token}", "Basic eDp5"],
        ):
            request = request_with(*headers)
            assert door.authenticator.cached(request) is None
            with pytest.raises(UnauthenticatedError):
                await door.authenticator(request)
        with pytest.raises(UnauthenticatedError):
            await door.authenticator(request_with(f"Bearer {token}, Bearer {token}"))

    async def test_the_scheme_may_be_written_in_any_case(self, door: Door) -> None:
        for scheme in ("bearer", "BEARER", "Bearer "):
            found = await door.authenticator(request_with(f"{scheme} {client_jwt()}"))
            assert found.name == str(MERCHANT)


class TestOneSpelling:
    """No two texts are the same token, so that what is known of one holds for all of it."""

    @pytest.mark.parametrize("token", [client_jwt(), ES, ED, RS], ids=["HS", "ES", "ED", "RS"])
    @pytest.mark.parametrize("part", [0, 1, 2])
    async def test_bits_that_do_not_count_are_zero(self, door: Door, token: str, part: int) -> None:
        parts = token.split(".")
        assert (await door.knock(token)).kind == "client"
        free_bits = {0: 0, 3: 2, 2: 4}[len(parts[part]) % 4]
        for change in range(1, 2**free_bits):
            last = ALPHABET[ALPHABET.index(parts[part][-1]) ^ change]
            twin = ".".join([*parts[:part], parts[part][:-1] + last, *parts[part + 1 :]])
            assert await reason(door, twin) == "malformed"

    @given(data=st.data())
    async def test_no_change_to_a_token_is_believed(self, door: Door, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from([client_jwt(), internal_jwt(), ES, ED, RS]))
        start = data.draw(st.integers(0, len(token)))
        end = data.draw(st.integers(start, min(len(token), start + 8)))
        put = data.draw(st.text(st.sampled_from(ALPHABET + ".=+/ \n\x00\u00e9"), max_size=8))
        changed = token[:start] + put + token[end:]
        assume(changed.strip(" ") != token)
        assert await reason(door, changed) in (
            "malformed",
            "signature",
            "algorithm",
            "unknown_key",
            "missing",
        )

    @given(parts=st.lists(st.binary(max_size=60), min_size=3, max_size=3))
    async def test_no_bytes_at_all_are_more_than_a_refusal(
        self, door: Door, parts: list[bytes]
    ) -> None:
        await reason(door, ".".join(b64(part) for part in parts))

    @given(
        payload=st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        ),
        name=st.sampled_from(
            ["exp", "nbf", "iat", "aud", "sub", "shop", "merchant_id", "scope", "jti"]
        ),
    )
    async def test_no_claim_of_a_trusted_issuer_is_more_than_a_refusal(
        self, door: Door, payload: object, name: str
    ) -> None:
        body = json.dumps(claims() | {name: payload}).encode()
        assume(len(body) < 2000)
        with contextlib.suppress(RefusedTokenError):
            assert (await door.knock(signed_with({}, body))).kind == "client"
