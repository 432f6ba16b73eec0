"""The redactor: no card number and no key gets past it, wherever it stands; ids do."""

import json
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.redaction import MASK, MAX_DEPTH, MAX_ITEMS, MAX_TEXT_CHARS, redact, redact_text
from tests.support.cost import steps

VISA = "4111111111111111"
HEX_KEY = "0123456789abcdef0123456789ABCDEF"
BASE64_KEY = "q83vEjRWeJCrze8SNFZ4kA=="
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2lnbmF0dXJlLXdpdGgtYnl0ZXM"
PTK = "ptk_7ZK3M9Q2W8X4R6T1V5Y0ABCDEF"


def luhn(digits: str) -> bool:
    """Written another way than the one under test, so that they do not share a mistake."""
    total = 0
    for at, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + at % 2)
        total += value // 10 + value % 10
    return total % 10 == 0


def completed(body: str) -> str:
    return next(body + digit for digit in "0123456789" if luhn(body + digit))


pans = (
    st.integers(11, 18)
    .flatmap(lambda size: st.text("0123456789", min_size=size, max_size=size))
    .map(completed)
)
scheme_pans = (
    st.sampled_from([("4", 16), ("4", 13), ("55", 16), ("2221", 16), ("34", 15), ("6011", 16)])
    .flatmap(
        lambda kind: st.text("0123456789", min_size=kind[1] - 5, max_size=kind[1] - 5).map(
            lambda rest: (kind[0] + rest + "0000")[: kind[1] - 1]
        )
    )
    .map(completed)
)
no_digits = st.text(st.characters(exclude_categories=["Nd", "Cs"]), max_size=20).filter(
    lambda text: not text.endswith((" ", "-")) and not text.startswith((" ", "-"))
)


def spaced(pan: str, gaps: list[str]) -> str:
    return "".join(digit + gap for digit, gap in zip(pan, gaps, strict=False)) + pan[len(gaps) :]


def digits_of(value: object) -> str:
    return "".join(c for c in json.dumps(value, ensure_ascii=False) if c.isascii() and c.isdigit())


# ---- card numbers


@given(pan=pans, before=no_digits, after=no_digits)
def test_a_number_of_any_issuer_is_masked_between_any_words(
    pan: str, before: str, after: str
) -> None:
    assert redact_text(before + pan + after) == redact_text(before) + MASK + redact_text(after)


@given(pan=pans, gaps=st.lists(st.sampled_from(["", " ", "-"]), max_size=11))
def test_a_number_with_any_separators_is_masked(pan: str, gaps: list[str]) -> None:
    written = spaced(pan, gaps)
    assert redact_text(f"card {written}, declined") == f"card {MASK}, declined"


@given(
    pan=scheme_pans,
    before=st.text("0123456789 -", max_size=8),
    after=st.text("0123456789", max_size=8),
)
def test_a_schemes_number_is_masked_inside_a_longer_run_of_digits(
    pan: str, before: str, after: str
) -> None:
    assert pan not in digits_of(redact_text(f"x{before}{pan}{after}x"))


@pytest.mark.parametrize(
    "text",
    [
        f";{VISA}=25121010000?",
        f"%B{VISA}^DOE/JANE^2512101?",
        f"{VISA}|2512",
        f"57114111111111111111D2512101{'0' * 9}F",
        f"amount 100 {VISA} 2512",
        f"2025-11-21 {VISA}",
        f"b'{VISA}'",
        f'{{"pan":"{VISA}"}}',
        f"{VISA}2512",
        f"1{VISA}",
        f"{VISA} {VISA}",
        "4111-1111-1111-1111",
        "4111 1111 1111 1111",
    ],
)
def test_the_forms_in_which_a_number_travels_are_masked(text: str) -> None:
    assert VISA not in digits_of(redact_text(text))
    assert MASK in redact_text(text)


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30),
        st.binary(max_size=30), st.uuids(), st.datetimes(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=8), inner, max_size=3),
    ),
    max_leaves=8,
)  # fmt: skip


@dataclass(frozen=True)
class Careless:
    number: str


@given(
    pan=scheme_pans,
    kind=st.sampled_from(["text", "int", "float", "bytes", "object", "error", "key"]),
    nest=st.lists(
        st.sampled_from(["list", "tuple", "dict", "set", "ordered"]), max_size=MAX_DEPTH + 2
    ),
    name=st.sampled_from(["event", "device_id", "amount", "request_id", "key", "pan", "x"]),
)
def test_a_number_of_any_type_at_any_depth_is_masked(
    pan: str, kind: str, nest: list[str], name: str
) -> None:
    value: object = {
        "text": pan,
        "int": int(pan),
        "float": float(pan) if len(pan) < 16 else pan,  # a float of 16 digits is another number
        "bytes": pan.encode(),
        "object": Careless(pan),
        "error": ValueError(pan),
        "key": {pan: 1},
    }[kind]
    for box in nest:
        if box == "list":
            value = [0, value]
        elif box == "tuple":
            value = (value, "x")
        elif box == "dict":
            value = {"inner": value}
        elif box == "ordered":
            value = OrderedDict(inner=value)
        else:
            value = {repr(value)}
    assert pan not in digits_of(redact(name, value))


@given(name=st.text(max_size=12), value=values)
def test_whatever_is_logged_becomes_something_that_json_can_hold(name: str, value: object) -> None:
    json.dumps(redact(name, value), allow_nan=False)


def test_a_number_that_the_cut_would_halve_goes_with_the_rest() -> None:
    for place in range(20):
        text = "x" * (MAX_TEXT_CHARS - place) + VISA + "y" * 100
        assert VISA[:6] not in redact_text(text)
    long = redact_text("word " * MAX_TEXT_CHARS)
    assert len(long) < MAX_TEXT_CHARS + 40
    assert long.endswith("more characters)")


# ---- keys, tokens, passwords


@pytest.mark.parametrize(
    "name", ["key", "bdk", "kek_hex", "data_key", "ipek", "jwt_secret", "Token", "components"]
)
@pytest.mark.parametrize("key", [HEX_KEY, HEX_KEY * 2, BASE64_KEY, BASE64_KEY.rstrip("="), JWT])
def test_a_key_under_a_name_like_a_key_is_masked_at_any_depth(name: str, key: str) -> None:
    for value in (key, [key], {"value": key}, {"a": {"b": [key]}}):
        shown = json.dumps(redact(name, value))
        assert key not in shown
        assert MASK in shown


def test_a_key_as_a_number_is_masked() -> None:
    assert redact("bdk", int("1" * 38)) == MASK


@pytest.mark.parametrize(
    "name",
    [
        "pan",
        "track2",
        "cvv",
        "pin_block",
        "password",
        "secret",
        "Authorization",
        "cookie",
        "initial_key",
    ],
)
def test_some_names_are_hidden_whatever_stands_under_them(name: str) -> None:
    for value in ("x", 7, ["a"], {"a": 1}, b"z", 1.5):
        assert redact(name, value) == MASK
        assert redact("outer", {name: value}) == {name: MASK}
    assert redact(name, None) is None
    assert redact(name, True) is True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"key={HEX_KEY}", f"key={MASK}"),
        (f"DataKey(key='{HEX_KEY}', v=1)", f"DataKey(key='{MASK}', v=1)"),
        (f"{{'ipek': b'{BASE64_KEY}'}}", f"{{'ipek': b'{MASK}'}}"),
        (f"the token: {BASE64_KEY}", f"the token: {MASK}"),
        (f"got {JWT} from a caller", f"got {MASK} from a caller"),
        ("Authorization: Bearer abcdef0123456", f"Authorization: Bearer {MASK}"),
        ("Basic dXNlcjpwYXNz given", f"Basic {MASK} given"),
        ("postgresql://glamd:hunter2@db/x", f"postgresql://glamd:{MASK}@db/x"),
        ("postgresql://glamd:hun:t@er2@db/x", f"postgresql://glamd:{MASK}@db/x"),
        (
            "-----BEGIN EC PRIVATE KEY-----\nMHc\n-----END EC PRIVATE KEY----- then",
            f"{MASK} then",
        ),
        ("-----BEGIN PRIVATE KEY-----\nMHcCAQ", MASK),
    ],
)
def test_a_secret_in_running_text_is_masked(text: str, shown: str) -> None:
    assert redact_text(text) == shown


def test_bytes_are_never_printed() -> None:
    for value in (b"secret", bytearray(b"secret"), memoryview(b"secret")):
        assert redact("data", value) == "<6 bytes>"
        assert redact("data", [value]) == ["<6 bytes>"]


# ---- what stays readable


@given(st.uuids())
def test_a_uuid_stays_readable_under_any_name(uuid: UUID) -> None:
    for name in ("merchant_id", "key"):
        assert redact(name, uuid) == redact(name, str(uuid)) == str(uuid)
    assert redact_text(f"merchant {uuid}: gone") == f"merchant {uuid}: gone"


def test_ids_and_small_numbers_stay_readable() -> None:
    for name, value in (
        ("token", PTK),
        ("token", "ptk_0000000000000000000000000000"),
        ("key", "terminal-7"),
        ("key_set", "demo-tdes"),
        ("key_version", "v12"),
        ("fields", ["pan", "expiry"]),
        ("ms", 1.25),
        ("port", 8883),
        ("count", 10**10),
        ("event", "device_enrolled"),
        ("time", "2025-11-21T11:17:00.123456Z"),
        ("ip", "192.168.100.200"),
        ("kcv", "08D7B4"),
    ):
        assert redact(name, value) == value
    assert redact("at", datetime(2025, 11, 21, tzinfo=UTC)) == "2025-11-21 00:00:00+00:00"


def test_a_fingerprint_under_a_plain_name_stays_readable() -> None:
    assert redact("certificate_sha256", "ab" * 32) == "ab" * 32


# ---- limits


def test_depth_and_breadth_are_limited() -> None:
    deep: object = "bottom"
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    assert "bottom" not in json.dumps(redact("x", deep))
    wide = redact("x", list(range(MAX_ITEMS + 5)))
    assert isinstance(wide, list)
    assert wide[-1] == "… (5 more)"
    assert len(str(redact("x", {str(i): i for i in range(10_000)}))) < 2_000


def test_a_value_that_cannot_show_itself_is_named() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError(VISA)

    assert redact("x", Broken()) == "<Broken that cannot be shown>"


@pytest.mark.parametrize(
    "piece",
    ["4", "4 ", "0-", "eyJ", "eyJa.", "key=", "secret:AAAA", "://a:", "Bearer ", "12345678-",
     "-----BEGIN PRIVATE KEY-----", "ptk_", "1 2 3 4 5 6 7 8 9 0 1x",
     "5f0c6f0e-8a4b-4c8e-9a3f-0d6f1c2b3a4d"],
)  # fmt: skip
def test_no_text_takes_long(piece: str) -> None:
    text = (piece * MAX_TEXT_CHARS)[:MAX_TEXT_CHARS]
    # The slowest of these takes half a million; something quadratic takes a thousand times as many.
    assert steps(lambda: redact_text(text)) < 10_000_000
