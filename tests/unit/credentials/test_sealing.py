"""What was sealed for one row opens there and nowhere else, and no error shows what was in it."""

import os
from dataclasses import replace
from typing import Any, cast
from uuid import UUID, uuid4

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glamd.credentials import sealing
from glamd.credentials.model import PLATFORMS, Platform, Secret
from glamd.crypto.aead import Sealer
from glamd.errors import CryptoError
from glamd.keys.keyrings import DataKey, Keyring
from tests.support.platform_vault import CANARY, new_token

MERCHANT = UUID("6f1d0a52-5b0e-4a54-9f0a-0d7c0a1f2b3c")
SECRET = Secret({"access_token": CANARY})
PLACE = new_token(MERCHANT)


class OneKey(Keyring[DataKey]):
    """A keyring with one version, which no database knows."""

    def __init__(self, version: str = "v1") -> None:
        self.key = DataKey(version, Sealer(os.urandom(32)), "A1B2C3")

    @property
    def active(self) -> DataKey:
        """The one version."""
        return self.key

    async def version(self, version: str) -> DataKey:
        """The one version, or an error for another."""
        if version != self.key.version:
            raise CryptoError("there is no such version")
        return self.key


def sealed(ring: OneKey, secret: Secret = SECRET) -> bytes:
    """The secret of MERCHANT's shopify token."""
    ciphertext, version = sealing.seal(ring, secret, PLACE)
    assert version == ring.key.version
    return ciphertext


@pytest.mark.parametrize("merchant_id", [uuid4(), UUID(int=MERCHANT.int ^ 1)])
def test_another_merchants_row_does_not_open_it(merchant_id: UUID) -> None:
    ring = OneKey()
    with pytest.raises(CryptoError):
        sealing.open_under(ring.key, sealed(ring), replace(PLACE, merchant_id=merchant_id))


@pytest.mark.parametrize("platform", [each for each in PLATFORMS if each != "shopify"])
def test_another_platforms_row_does_not_open_it(platform: Platform) -> None:
    ring = OneKey()
    with pytest.raises(CryptoError):
        sealing.open_under(ring.key, sealed(ring), replace(PLACE, platform=platform))


@pytest.mark.parametrize(
    ("shop_id", "domain"),
    [
        (PLACE.platform_shop_id, "thief.example"),
        ("thief.example", PLACE.domain),
        (PLACE.domain, PLACE.platform_shop_id),
        # The same letters in a row, divided in another way.
        (PLACE.platform_shop_id + PLACE.domain[:1], PLACE.domain[1:]),
        ("", PLACE.platform_shop_id + PLACE.domain),
    ],
)
def test_a_row_that_names_another_shop_does_not_open_it(shop_id: str, domain: str) -> None:
    ring = OneKey()
    elsewhere = replace(PLACE, platform_shop_id=shop_id, domain=domain)
    with pytest.raises(CryptoError):
        sealing.open_under(ring.key, sealed(ring), elsewhere)


def test_the_same_key_under_another_versions_name_does_not_open_it() -> None:
    ring = OneKey()
    renamed = DataKey("v2", ring.key.sealer, ring.key.kcv)
    with pytest.raises(CryptoError):
        sealing.open_under(renamed, sealed(ring), PLACE)


async def test_a_version_that_is_gone_is_a_crypto_error() -> None:
    ring = OneKey()
    with pytest.raises(CryptoError):
        await sealing.open_sealed(ring, sealed(ring), PLACE, key_version="v0")


@given(st.data())
def test_no_flipped_bit_and_no_cut_goes_unnoticed(data: st.DataObject) -> None:
    ring = OneKey()
    whole = bytearray(sealed(ring))
    if data.draw(st.booleans(), label="cut"):
        broken = bytes(whole[: data.draw(st.integers(0, len(whole) - 1), label="length")])
    else:
        bit = data.draw(st.integers(0, len(whole) * 8 - 1), label="bit")
        whole[bit // 8] ^= 1 << bit % 8
        broken = bytes(whole)
    with pytest.raises(CryptoError) as caught:
        sealing.open_under(ring.key, broken, PLACE)
    assert CANARY not in repr(caught.value)


@pytest.mark.parametrize("clear", [b'["%s"]', b'"%s"', b"null", b'{"%s', b"", b"\xff%s", b"1"])
def test_what_is_sealed_well_and_is_no_token_shows_nothing_of_itself(clear: bytes) -> None:
    ring = OneKey()
    parts = (
        b"platform-token",
        str(MERCHANT).encode(),
        b"shopify",
        b"67890",
        b"shop.example",
        b"v1",
    )
    place = b"".join(len(part).to_bytes(4) + part for part in parts)
    text = clear % CANARY.encode() if b"%s" in clear else clear
    ciphertext = ring.key.sealer.seal(text, associated_data=place)
    with pytest.raises(CryptoError, match="is none") as caught:
        sealing.open_under(ring.key, ciphertext, PLACE)
    # A JSON error carries the document that it could not read.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def json_values() -> st.SearchStrategy[Any]:
    """Whatever may stand in `token_data`."""
    leaf = (
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text()
    )
    return st.recursive(
        leaf,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )


@settings(max_examples=50)
@given(st.dictionaries(st.text(), json_values(), min_size=1, max_size=4))
def test_what_is_sealed_comes_back_as_it_was(data: dict[str, Any]) -> None:
    ring = OneKey()
    opened = sealing.open_under(ring.key, sealed(ring, Secret(data)), PLACE)
    assert orjson.dumps(dict(opened.data)) == orjson.dumps(data)


def test_the_same_secret_is_never_sealed_alike_twice() -> None:
    ring = OneKey()
    assert len({sealed(ring) for _ in range(100)}) == 100
    assert CANARY.encode() not in sealed(ring)


def test_no_secret_shows_in_a_repr() -> None:
    token = new_token(MERCHANT)
    assert CANARY not in repr(token) + str(token) + repr(token.secret) + f"{token.secret}"


@pytest.mark.parametrize("refresh_token", [None, "", 5, ["x"], {"x": "y"}])
def test_a_refresh_token_that_is_no_text_is_none(refresh_token: object) -> None:
    secret = Secret({"refresh_token": refresh_token})
    assert secret.refresh_token is None
    assert not new_token(MERCHANT, secret=secret).refreshable


@pytest.mark.parametrize("token_type", ["api_key", "basic_auth", "bearer"])
def test_only_oauth_tokens_are_renewed(token_type: str) -> None:
    secret = Secret({"refresh_token": "r"})
    changed = new_token(MERCHANT, secret=secret, token_type=cast("Any", token_type))
    assert not changed.refreshable
    assert new_token(MERCHANT, secret=secret).refreshable
