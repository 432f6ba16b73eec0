"""The older service's rows: every way in which one can be wrong, and what a right one becomes."""

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st

from glamd.credentials.importing import older
from glamd.credentials.importing.older import LIMITS, OlderKey, OlderToken, read_row
from glamd.errors import CryptoError, InputError
from tests.support.older_service import (
    CANARY,
    KEY_TEXT,
    derived,
    fernet,
    merchant_id,
    older_id,
    row,
    sealed,
)

KEY = OlderKey(KEY_TEXT)
TOKEN = "encrypted_token"
OPTIONAL = ("expires_at", "scopes", "updated_at", *(name for name in LIMITS if "access" in name))
DATA = {"access_token": CANARY, "nested": {"scopes": ["a", "b"], "ünïcode": "ß"}, "n": 1.5}


def code_of(stored: str, key: OlderKey = KEY) -> str:
    """The code that this is refused with."""
    with pytest.raises(CryptoError) as raised:
        key.open(stored)
    assert CANARY not in str(raised.value)
    return raised.value.code


def wrong_fields(**changes: object) -> list[str]:
    """The fields that a row is refused for."""
    with pytest.raises(InputError) as raised:
        read_row(row(7, **changes), KEY)
    told = [(field.field, field.message) for field in raised.value.fields]
    for value in changes.values():
        assert not value or str(value)[:40] not in str(told) + str(raised.value)
    return [field for field, _ in told]


def read(**changes: object) -> OlderToken:
    """What becomes of a row."""
    return read_row(row(7, **changes), KEY)


class TestSealedTokens:
    """What does not open, and what does."""

    def test_another_key_is_told_from_a_text_of_another_form(self) -> None:
        assert code_of(sealed(DATA), OlderKey("another key text")) == older.UNDECRYPTABLE

    @pytest.mark.parametrize("position", [0, 1, 9, 25, -33, -1])
    def test_every_damaged_part_of_the_fernet_token_is_refused(self, position: int) -> None:
        raw = bytearray(base64.urlsafe_b64decode(fernet(json.dumps(DATA).encode())))
        raw[position] ^= 1
        damaged = base64.urlsafe_b64encode(base64.urlsafe_b64encode(raw)).decode()
        assert code_of(damaged) in (older.UNDECRYPTABLE, older.MALFORMED)

    @pytest.mark.parametrize(
        "stored",
        [
            "",
            "=",
            "A",
            "not base64 at all",
            "Zm9v",
            base64.urlsafe_b64encode(b"\x80" * 80).decode(),
            base64.urlsafe_b64encode(b"gAAAAA\xff\xfe").decode(),
            base64.urlsafe_b64encode(b"gAAAAA not base64").decode(),
            "gAAAAA not base64",
            sealed(DATA)[:40] + "!" + sealed(DATA)[40:],
            "\ud800",
        ],
        ids=range(11),
    )
    def test_what_is_of_neither_form_is_malformed(self, stored: str) -> None:
        assert code_of(stored) == older.MALFORMED

    def test_a_cut_token_is_refused(self) -> None:
        whole = sealed(DATA)
        codes = {code_of(whole[:cut]) for cut in range(0, len(whole) - 3, 5)}
        assert codes <= {older.MALFORMED, older.UNDECRYPTABLE}

    def test_a_text_that_is_too_long_is_not_even_decoded(self) -> None:
        assert code_of("Z" * (older.SEALED_LIMIT + 1)) == older.TOO_LARGE

    def test_what_is_too_large_in_the_clear_is_refused_though_its_text_is_not(self) -> None:
        assert code_of(sealed({"a": "x" * 66_000})) == older.TOO_LARGE
        assert KEY.open(sealed({"a": "x" * 65_000})).data["a"] == "x" * 65_000

    @pytest.mark.parametrize(
        "clear",
        [
            b"",
            b"\xff\xfe\x00",
            b"not json",
            b"[]",
            b'"text"',
            b"null",
            b"7",
            b"{}",
            b'{"a": NaN}',
            b'{"a": Infinity}',
            b'{"a": 1e400}',
            b'{"a": 9223372036854775808}',
            b'{"a": [-9223372036854775809]}',
            b'{"a": "\\ud800"}',
            b'{"a":' * 17 + b"1" + b"}" * 17,
            b"[" * 50_000,
        ],
        ids=range(16),
    )
    def test_what_is_no_object_that_can_be_kept_is_told(self, clear: bytes) -> None:
        assert code_of(sealed(clear)) == older.NO_OBJECT

    def test_the_deepest_and_the_largest_that_can_be_kept_are(self) -> None:
        clear = b'{"a":' * 16 + b"-9223372036854775808" + b"}" * 16
        assert KEY.open(sealed(clear)).data

    def test_what_the_older_service_stored_opens(self) -> None:
        assert KEY.open(sealed(DATA)).data == DATA

    def test_missing_padding_is_no_damage_in_either_layer(self) -> None:
        for spaces in range(4):
            inner = fernet(json.dumps(DATA).encode() + b" " * spaces * 16).rstrip("=")
            outer = base64.urlsafe_b64encode(inner.encode()).decode().rstrip("=")
            assert KEY.open(outer).data == DATA
            assert KEY.open(f" {outer}\n").data == DATA

    def test_a_bare_fernet_token_opens_too(self) -> None:
        assert KEY.open(fernet(json.dumps(DATA).encode())).data == DATA

    def test_what_the_library_itself_sealed_opens(self) -> None:
        library = Fernet(base64.urlsafe_b64encode(derived(KEY_TEXT)))
        stored = base64.urlsafe_b64encode(library.encrypt(json.dumps(DATA).encode())).decode()
        assert KEY.open(stored).data == DATA

    @given(
        st.dictionaries(
            st.text(max_size=8),
            st.text(max_size=30) | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.none(),
            min_size=1,
            max_size=5,
        )
    )
    def test_any_object_comes_back_as_it_was(self, data: dict[str, Any]) -> None:
        assert KEY.open(sealed(data)).data == data

    def test_neither_the_key_nor_the_token_shows_itself(self) -> None:
        assert repr(KEY) == "<OlderKey, masked>"
        assert CANARY not in repr(read())


class TestRows:
    """What is wrong is named by its field, all of it at once, and without its value."""

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *((name, None) for name in LIMITS if name not in OPTIONAL),
            *((name, "") for name in LIMITS if name not in OPTIONAL),
            *((name, "x" * (limit + 1)) for name, limit in LIMITS.items() if name != TOKEN),
            *((name, 7) for name in LIMITS),
            *((name, "a\x00b") for name in LIMITS if name != TOKEN),
            ("id", "7"),
            ("id", "{6f1d0a52-5b0e-4a54-9f0a-0d7c0a1f2b3c}"),
            ("merchant_id", "cjld2cjxh0000qzrmn831i7rn"),
            ("platform_name", "Shopify"),
            ("platform_name", "etsy"),
            ("token_type", "Bearer"),
            ("domain", "localhost"),
            ("domain", "https://shop.example"),
            ("domain", "192.0.2.7"),
            ("domain", "shöp.example"),
            ("domain", "shop.example."),
            ("platform_shop_id", "\u202e7"),
            ("scopes", "read\tproducts"),
            ("scopes", "läsa"),
            ("scopes", " ".join(f"s{n}" for n in range(257))),
            ("scopes", "x" * 256),
            ("expires_at", "infinity"),
            ("expires_at", "tomorrow"),
            ("expires_at", "0001-01-01T00:00:00+14:00"),
            ("expires_at", "44-03-15 BC"),
            ("access_count", "-1"),
            ("access_count", "1.5"),
            ("access_count", "٣"),
            ("access_count", str(2**63)),
        ],
    )
    def test_a_wrong_field_is_the_one_that_is_named(self, field: str, value: object) -> None:
        assert wrong_fields(**{field: value}) == [field]

    def test_everything_that_is_wrong_is_named_at_once(self) -> None:
        named = wrong_fields(id="x", platform_name="etsy", created_at=None, access_count="many")
        assert named == ["id", "platform_name", "created_at", "access_count"]

    def test_a_row_with_nothing_in_it_is_refused(self) -> None:
        with pytest.raises(InputError) as raised:
            read_row({}, KEY)
        assert len(raised.value.fields) == 8

    def test_a_right_row_is_taken_as_it_was(self) -> None:
        found = read()
        assert found.token_id == older_id(7)
        assert found.token.merchant_id == merchant_id(7)
        assert (found.token.platform, found.token.token_type) == ("shopify", "oauth")
        assert found.token.platform_shop_id == "10007"
        assert found.token.domain == "shop-7.myshopify.com"
        assert found.token.scopes == ("read_products", "write_orders")
        assert found.token.secret.data["access_token"] == f"{CANARY}-7"
        assert found.token.refreshable
        assert (found.last_accessed_by, found.access_count) == ("catalog-service", 7)

    def test_a_time_without_an_offset_is_utc_and_one_with_it_becomes_utc(self) -> None:
        found = read(expires_at="2030-01-01T14:00:00+02:00", updated_at="2024-06-01 09:30:00.5")
        assert found.token.expires_at == datetime(2030, 1, 1, 12, tzinfo=UTC)
        assert found.updated_at == datetime(2024, 6, 1, 9, 30, 0, 500_000, tzinfo=UTC)
        assert found.last_accessed_at == datetime(2024, 7, 1, 10, tzinfo=UTC)

    def test_what_was_never_written_is_nothing(self) -> None:
        found = read(
            expires_at=None,
            scopes="",
            updated_at=None,
            last_accessed_by=None,
            last_accessed_at=None,
            access_count=None,
        )
        assert (found.token.expires_at, found.token.scopes) == (None, ())
        assert found.updated_at == found.created_at
        assert (found.last_accessed_by, found.last_accessed_at, found.access_count) == (
            None,
            None,
            0,
        )

    def test_scopes_stand_between_blanks_or_commas_and_once(self) -> None:
        assert read(scopes=" a, b  c,,a ").token.scopes == ("a", "b", "c")

    def test_a_domain_is_lower_cased(self) -> None:
        assert read(domain="Shop-7.MyShopify.com").token.domain == "shop-7.myshopify.com"

    def test_an_expired_token_is_taken(self) -> None:
        assert read(expires_at="2001-01-01").token.expires_at == datetime(2001, 1, 1, tzinfo=UTC)

    def test_fields_that_are_not_ours_are_passed_over(self) -> None:
        assert read(encryption_key_id="key-1").token_id == older_id(7)
