"""Key-set files: what is wrong with one is told by file and kid, never by key."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from structlog.testing import capture_logs

from glamd.errors import ConfigError
from glamd.http.jwks import MAX_FILE_BYTES, MAX_KEYS, read_jwks
from tests.support.jwt_keys import (
    ALL,
    SETTING,
    SigningKey,
    b64,
    eddsa,
    es256,
    rs256,
    write_jwks,
)

EC, ED, RSA = es256().jwk(), eddsa().jwk(), rs256().jwk()
WEAK = rs256("weak", 1024).jwk()


def mistake(path: Path) -> str:
    """What is said of a file that cannot be used."""
    with pytest.raises(ConfigError) as caught:
        read_jwks(path, setting=SETTING)
    message = caught.value.message
    assert message.startswith(f"{SETTING}: {path}: ")
    assert [error.field for error in caught.value.fields] == [SETTING]
    return message


def flipped(text: str) -> str:
    """Another base64url text of the same length."""
    return ("B" if text[0] == "A" else "A") + text[1:]


def oct_key() -> dict[str, Any]:
    """A secret where public keys belong."""
    return {"kty": "oct", "kid": "hmac-1", "k": b64(b"the secret of everything, 32 bytes")}


BROKEN = {
    "oct": (oct_key(), "'hmac-1' is private or symmetric"),
    "oct without k": ({"kty": "oct", "kid": "hmac-1"}, "'hmac-1' is private or symmetric"),
    "k on another": (EC | {"k": "AAAA"}, "private or symmetric"),
    "private EC": (es256().private_jwk(), "'ec-1' is private or symmetric"),
    "private Ed25519": (eddsa().private_jwk(), "'ed-1' is private or symmetric"),
    "private RSA": (rs256().private_jwk(), "'rsa-1' is private or symmetric"),
    "private RSA, d alone": (RSA | {"d": rs256().private_jwk()["d"]}, "private or symmetric"),
    "a prime of RSA": (RSA | {"p": rs256().private_jwk()["p"]}, "private or symmetric"),
    "private, for encryption": (es256().private_jwk() | {"use": "enc"}, "private or symmetric"),
    "a later kind's secret": ({"kty": "AKP", "kid": "x", "priv": "AA"}, "private or symmetric"),
    "no kid": (es256().jwk(kid=None), "number 2 has no kid"),
    "kid empty": (EC | {"kid": ""}, "number 2 has no kid"),
    "kid number": (EC | {"kid": 7}, "number 2 has no kid"),
    "kid long": (EC | {"kid": "k" * 257}, "number 2 has no kid"),
    "kid with a line end": (EC | {"kid": "a\nb"}, "number 2 has no kid"),
    "kid twice": (EC | {"kid": "good"}, "the kid 'good' twice"),
    "kid twice, unused": (EC | {"kid": "good", "use": "enc"}, "the kid 'good' twice"),
    "kty number": (EC | {"kty": 1}, "kty that is no text"),
    "alg list": (EC | {"alg": ["ES256"]}, "alg that is no text"),
    "alg of another key": (EC | {"alg": "RS256"}, "'ec-1' is of a type that does not fit its alg"),
    "HS256 with RSA": (RSA | {"alg": "HS256"}, "'rsa-1' is of a type that does not fit its alg"),
    "weak RSA": (WEAK, "'weak' is broken or weak: n has 1024 bits"),
    "huge RSA": (RSA | {"n": b64(b"\xff" * 1025)}, "n has 8200 bits"),
    "RSA without n": (rs256().jwk(n=None), "n is missing"),
    "RSA, n number": (RSA | {"n": 65537}, "n is missing"),
    "RSA, even": (RSA | {"e": "Ag"}, "n and e make no key"),
    "RSA, e one": (RSA | {"e": "AQ"}, "n and e make no key"),
    "RSA, e long": (RSA | {"e": b64(b"\x01" * 9)}, "e has more than 32 bits"),
    "padded": (EC | {"x": EC["x"] + "="}, "x is not base64url"),
    "the other alphabet": (EC | {"x": "+" + EC["x"][1:]}, "x is not base64url"),
    "spaces": (EC | {"x": " " + EC["x"][1:]}, "x is not base64url"),
    "EC, off the curve": (EC | {"x": flipped(EC["x"])}, "not a point of the curve"),
    "EC, zero": (EC | {"x": b64(bytes(32)), "y": b64(bytes(32))}, "not a point"),
    "EC, short": (EC | {"x": b64(bytes(31))}, "x and y are 32 bytes"),
    "EC, long": (EC | {"x": b64(b"\0" + base64.urlsafe_b64decode(EC["x"] + "="))}, "32 bytes"),
    "Ed25519, short": (ED | {"x": b64(bytes(31))}, "no Ed25519 key of 32 bytes"),
}

NO_KEY_SETS = {
    "empty": b"",
    "no JSON": b"-----BEGIN PUBLIC KEY-----",
    "a list": b"[]",
    "a bare key": json.dumps(EC).encode(),
    "keys no list": b'{"keys": {}}',
    "keys null": b'{"keys": null}',
    "keys of text": b'{"keys": ["x"]}',
    "keys twice": b'{"keys": [], "keys": []}',
    "a member twice": json.dumps({"keys": [EC]}).replace('"kid"', '"x":1,"x":2,"kid"').encode(),
    "no UTF-8": b'{"keys": ["\xff"]}',
    "UTF-16": json.dumps({"keys": [EC]}).encode("utf-16"),
    "deep": b'{"keys": ' + b"[" * 5000,
    "a long number": b'{"keys": [], "x": ' + b"9" * 5000 + b"}",
}

UNUSED = {
    "for encryption": EC | {"use": "enc"},
    "for signing only": EC | {"key_ops": ["sign"]},
    "operations no list": EC | {"key_ops": "verify"},
    "RS512": RSA | {"alg": "RS512"},
    "PS256": RSA | {"alg": "PS256"},
    "RSA-OAEP": RSA | {"alg": "RSA-OAEP", "use": "enc"},
    "P-384": SigningKey("ec-2", "ES384", ec.generate_private_key(ec.SECP384R1())).jwk(),
    "Ed448": SigningKey("ed-2", "EdDSA", ed448.Ed448PrivateKey.generate()).jwk(),
    "X25519": ED | {"crv": "X25519"},
    "EC without a curve": es256().jwk(crv=None),
    "a kind of the future": {"kty": "AKP", "kid": "pq-1", "alg": "ML-DSA-44", "pub": "AAAA"},
    "no kind": es256().jwk(kty=None),
}


class TestMistakes:
    """Each ends the reading."""

    @pytest.mark.parametrize(("jwk", "message"), BROKEN.values(), ids=BROKEN)
    def test_a_key_that_cannot_be_meant_ends_the_reading(
        self, tmp_path: Path, jwk: dict[str, Any], message: str
    ) -> None:
        good = es256("good").jwk()
        said = mistake(write_jwks(tmp_path / "keys.json", good, jwk))
        assert message in said
        for name in ("x", "y", "n", "d", "p", "k"):
            assert len(str(jwk.get(name, ""))) < 8 or jwk[name] not in said

    @pytest.mark.parametrize("content", NO_KEY_SETS.values(), ids=NO_KEY_SETS)
    def test_a_file_that_is_no_key_set_is_refused(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "keys.json"
        path.write_bytes(content)
        said = mistake(path)
        assert "is not a JSON object" in said or 'no list of objects "keys"' in said

    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        assert "No such file" in mistake(tmp_path / "nowhere.json")

    def test_neither_a_directory_nor_a_pipe_holds_the_start_up(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        assert "not a regular file" in mistake(pipe)
        assert "Is a directory" in mistake(tmp_path) or "not a regular" in mistake(tmp_path)

    def test_only_so_much_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.json"
        path.write_bytes(b" " * (MAX_FILE_BYTES + 1))
        assert f"longer than {MAX_FILE_BYTES} bytes" in mistake(path)

    def test_only_so_many_keys_are_taken(self, tmp_path: Path) -> None:
        keys = [EC | {"kid": f"k{n}"} for n in range(MAX_KEYS + 1)]
        assert f"more than {MAX_KEYS} keys" in mistake(write_jwks(tmp_path / "keys.json", *keys))

    def test_a_set_without_a_key_for_us_is_refused(self, tmp_path: Path) -> None:
        assert "no key for ES256" in mistake(write_jwks(tmp_path / "keys.json"))
        assert "no key for ES256" in mistake(
            write_jwks(tmp_path / "keys.json", EC | {"use": "enc"})
        )


class TestReading:
    """What an issuer publishes is read as it is meant."""

    def test_each_algorithm_is_its_keys(self, tmp_path: Path) -> None:
        path = write_jwks(tmp_path / "keys.json", *(key.jwk() for key in ALL.values()))
        found = read_jwks(path, setting=SETTING)
        assert [(key.kid, key.algorithm) for key in found] == [
            ("ec-1", "ES256"),
            ("ed-1", "EdDSA"),
            ("rsa-1", "RS256"),
        ]

    @pytest.mark.parametrize(
        "changes", [{"alg": None}, {"use": None}, {"key_ops": ["verify"]}, {"x5t": "AA", "iss": 1}]
    )
    def test_what_is_not_said_is_not_asked_for(
        self, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        for key in ALL.values():
            path = write_jwks(tmp_path / "keys.json", key.jwk(**changes))
            assert [found.kid for found in read_jwks(path, setting=SETTING)] == [key.kid]

    @pytest.mark.parametrize("jwk", UNUSED.values(), ids=UNUSED)
    def test_a_key_for_something_else_is_left_out_with_a_word(
        self, tmp_path: Path, jwk: dict[str, Any]
    ) -> None:
        path = write_jwks(tmp_path / "keys.json", jwk, es256("good").jwk())
        with capture_logs() as logs:
            assert [key.kid for key in read_jwks(path, setting=SETTING)] == ["good"]
        assert [(line["event"], line.get("kid")) for line in logs] == [
            ("jwks_key_unused", jwk["kid"]),
            ("jwks_read", None),
        ]

    def test_a_repr_shows_no_key(self, tmp_path: Path) -> None:
        (key,) = read_jwks(write_jwks(tmp_path / "keys.json", EC), setting=SETTING)
        assert repr(key) == "PublicKey(kid='ec-1', algorithm='ES256')"
