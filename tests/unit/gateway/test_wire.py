"""The wire: first everything that is refused and under which name, then what is understood."""

import base64
import contextlib
import json
from datetime import UTC, datetime

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_gateway import wire

TDES: dict[str, object] = {
    "v": 1,
    "id": "tap-1",
    "type": "tokenize",
    "ksn": "FFFF9876543210E00001",
    "data": base64.b64encode(bytes(range(40))).decode(),
    "scheme": "tdes-dukpt",
    "format": "track2",
    "entry_mode": "magstripe",
}
AES: dict[str, object] = {
    **TDES,
    "ksn": "123456789012345600000001",
    "data": base64.b64encode(bytes(range(48))).decode(),
    "scheme": "aes-dukpt",
}
MISSING = object()


def changed(base: dict[str, object] | None = None, /, **fields: object) -> bytes:
    merged = {**(TDES if base is None else base), **fields}
    return json.dumps(
        {name: value for name, value in merged.items() if value is not MISSING}
    ).encode()


def refusal(payload: bytes) -> wire.WireError:
    with pytest.raises(wire.WireError) as caught:
        wire.decode_request(payload)
    return caught.value


def tokenize(payload: bytes) -> wire.Tokenize:
    request = wire.decode_request(payload)
    assert isinstance(request, wire.Tokenize)
    return request


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0",
        b"{",
        b"hello",
        b"[]",
        b"null",
        b"1",
        b'"id"',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf" + changed(),
        changed() + b"x",
        changed().decode().encode("utf-16"),
        changed().replace(b"tap-1", b"tap-\xff"),
        changed().replace(b'"v": 1', b'"v": NaN'),
        changed().replace(b'"v": 1', b'"v": Infinity'),
        changed().replace(b'"v": 1', b'"v": 1e999'),
        changed().replace(b'"v": 1', b'"v": ' + b"9" * 5000),
        changed(x="\ud800"),
        b"[" * 16_000,
        b'{"a":' * 3000,
        changed(id="x", pad="y" * wire.REQUEST_LIMIT_BYTES),
    ],
)
def test_what_is_not_json_is_malformed_and_has_no_id(payload: bytes) -> None:
    error = refusal(payload)
    assert (error.code, error.request_id) == ("MALFORMED", None)


@pytest.mark.parametrize("bad_id", [MISSING, None, "", "x" * 65, 7, True, ["a"], {}, "a\0b"])
def test_an_id_that_cannot_be_read_is_answered_with_none(bad_id: object) -> None:
    error = refusal(changed(id=bad_id))
    assert (error.code, error.request_id) == ("MALFORMED", None)
    assert error.fields[0].field == "id"


ANY_TEXT_FIELD: list[object] = [MISSING, None, "", 0, 1.5, True, [], {}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, value) for name in ("ksn", "data", "entry_mode") for value in ANY_TEXT_FIELD),
        *(
            (name, value)
            for name in ("type", "scheme", "format")
            for value in ANY_TEXT_FIELD
            if value != ""
        ),
        *(("mac", value) for value in ANY_TEXT_FIELD[1:]),
        *(("at", value) for value in ANY_TEXT_FIELD[1:]),
        ("v", MISSING),
        ("v", None),
        ("v", "1"),
        ("v", 1.0),
        ("v", True),
        ("v", 2**70),
        ("ksn", "FFFF9876543210E000"),
        ("ksn", "FFFF9876543210E0000100"),
        ("ksn", "FFFF9876543210E0000100FF"),
        ("ksn", "FFFF9876543210E0000"),
        ("ksn", "FFFF9876543210E0000G"),
        ("ksn", "FFFF 9876543210E0000"),
        ("ksn", "FF FF 98 76 54 32 10 E0 00 01"),
        ("ksn", "\uff11" * 20),
        ("data", "AAAA"),
        ("data", "AAAAAAAAAAA"),
        ("data", "AAAAAAAAAAA=\n"),
        ("data", "AAAA AAAAAAA="),
        ("data", "AAAAAAAAAAB="),
        ("data", "AAAAAAAAAAA=="),
        ("data", "AAAAAAAAAAA=AAAAAAAAAAA="),
        ("data", "_-AAAAAAAAA="),
        ("data", "é" * 12),
        ("data", "="),
        ("mac", "00" * 3),
        ("mac", "00" * 16),
        ("mac", "0x000000"),
        ("mac", "00 00 00 00"),
        ("entry_mode", "telepathy"),
        ("amount", None),
        ("amount", 5),
        ("amount", []),
        ("amount", {}),
        ("amount", {"value": 1}),
        ("amount", {"currency": "USD"}),
        ("amount", {"value": -1, "currency": "USD"}),
        ("amount", {"value": 1.0, "currency": "USD"}),
        ("amount", {"value": True, "currency": "USD"}),
        ("amount", {"value": "1", "currency": "USD"}),
        ("amount", {"value": 2**53, "currency": "USD"}),
        ("amount", {"value": 2**64, "currency": "USD"}),
        ("amount", {"value": 1, "currency": "usd"}),
        ("amount", {"value": 1, "currency": "US"}),
        ("amount", {"value": 1, "currency": "USD\n"}),
        ("amount", {"value": 1, "currency": "ÜSD"}),
        ("amount", {"value": 1, "currency": 840}),
        ("at", "yesterday"),
        ("at", "2024-01-01"),
        ("at", "2024-01-01T00:00:00"),
        ("at", "2024-W01-1T00:00:00Z"),
        ("at", "20240101T000000Z"),
        ("at", "2024-13-01T00:00:00Z"),
        ("at", "2024-01-01T00:00:00+25:00"),
        ("at", "0001-01-01T00:00:00+10:00"),
        ("at", "2024-01-01T00:00:00Z\n"),
        ("at", "\uff12024-01-01T00:00:00Z"),
    ],
)
def test_a_wrong_field_is_malformed_and_named_and_the_id_comes_back(
    field: str, value: object
) -> None:
    error = refusal(changed(**{field: value}))
    assert (error.code, error.request_id) == ("MALFORMED", "tap-1")
    assert error.fields[0].field.split(".")[0] == field
    assert field in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("v", 0),
        ("v", 2),
        ("v", -1),
        ("type", "refund"),
        ("type", ""),
        ("type", "command-result"),
        ("type", "batch"),
        ("type", "TOKENIZE"),
        ("scheme", "rsa"),
        ("scheme", ""),
        ("scheme", "TDES-DUKPT"),
        ("format", "track3"),
        ("format", ""),
    ],
)
def test_what_is_well_formed_but_not_served_is_unsupported(field: str, value: object) -> None:
    error = refusal(changed(**{field: value}))
    assert (error.code, error.request_id) == ("UNSUPPORTED", "tap-1")
    assert error.fields[0].field == field


@pytest.mark.parametrize("field", ["scheme", "format"])
def test_malformed_goes_before_unsupported(field: str) -> None:
    assert refusal(changed(**{field: "unknown", "ksn": "zz"})).code == "MALFORMED"
    assert refusal(changed(**{field: "unknown", "amount": {}})).code == "MALFORMED"


@pytest.mark.parametrize(
    ("base", "field", "value"),
    [
        (AES, "ksn", "FFFF9876543210E00001"),
        (AES, "data", base64.b64encode(bytes(40)).decode()),
        (AES, "mac", "00" * 4),
        (TDES, "ksn", "123456789012345600000001"),
        (TDES, "data", base64.b64encode(bytes(12)).decode()),
    ],
)
def test_lengths_are_those_of_the_scheme(base: dict[str, object], field: str, value: str) -> None:
    assert refusal(changed(base, **{field: value})).fields[0].field == field


def test_a_key_that_is_there_twice_is_malformed_wherever_it_stands() -> None:
    whole = changed().decode()
    for twice in ('"format": "pan"', '"for\\u006dat": "pan"', '"format": "track2"'):
        error = refusal(whole.replace("{", "{" + twice + ",", 1).encode())
        assert (error.code, error.request_id, error.fields[0].field) == (
            "MALFORMED",
            "tap-1",
            "format",
        )
    inner = changed(amount={"value": 1, "currency": "USD"}).decode()
    assert (
        refusal(inner.replace('"value": 1', '"value": 1, "value": 2').encode()).code == "MALFORMED"
    )
    compact = orjson.dumps(TDES).replace(b"{", b'{"v":1,', 1)
    assert refusal(compact).fields[0].field == "v"


def test_an_id_that_is_there_twice_is_no_id() -> None:
    error = refusal(orjson.dumps(TDES).replace(b"{", b'{"id":"other",', 1))
    assert (error.code, error.request_id) == ("MALFORMED", None)


def test_deep_nesting_is_malformed_even_in_a_field_that_nobody_knows() -> None:
    deep: object = 1
    for _ in range(wire.DEPTH_LIMIT):
        deep = [deep]
    error = refusal(changed(extra=deep))
    assert (error.code, error.request_id) == ("MALFORMED", "tap-1")
    wire.decode_request(changed(extra=[[]] * 100, more="[[[[[[[[[[[[{{{{{{{"))


@pytest.mark.parametrize(
    "field", ["ksn", "data", "mac", "entry_mode", "scheme", "format", "type", "at"]
)
def test_no_refusal_repeats_what_was_sent(field: str) -> None:
    secret = "4242424242424242"
    error = refusal(changed(**{field: secret + "!"}))
    assert secret not in f"{error} {error.message} {error.fields} {error!r} {error.__cause__}"


def test_no_refusal_repeats_an_unknown_key() -> None:
    error = refusal(b'{"4242424242424242": 1, "4242424242424242": 2, "id": "a", "v": 1}')
    assert "4242" not in f"{error!r} {error.fields}"


def test_a_requests_repr_shows_no_ciphertext() -> None:
    request = tokenize(changed(mac="0011223344556677"))
    assert repr(request) == "Tokenize(id='tap-1')"


@given(st.binary(max_size=300))
def test_any_bytes_end_in_a_request_or_a_wire_error(payload: bytes) -> None:
    with contextlib.suppress(wire.WireError):
        wire.decode_request(payload)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=70),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.sampled_from([*sorted(TDES), "mac", "amount", "at", "extra"]), JSON_VALUES)
def test_any_value_in_any_field_ends_in_a_request_or_a_wire_error(
    field: str, value: object
) -> None:
    with contextlib.suppress(wire.WireError):
        wire.decode_request(changed(**{field: value}))


@given(JSON_VALUES)
def test_any_status_ends_in_a_status_or_a_wire_error(value: object) -> None:
    for payload in (value, {"state": value}, {"state": "online", "battery": value, "at": value}):
        with contextlib.suppress(wire.WireError):
            wire.decode_status(json.dumps(payload).encode())


def test_a_whole_request_is_understood() -> None:
    request = tokenize(
        changed(
            mac="0011223344556677",
            amount={"value": 2**53 - 1, "currency": "EUR"},
            at="2024-02-29t12:00:00.12345678912345+02:00",
        )
    )
    assert (request.id, request.scheme, request.format) == ("tap-1", "tdes-dukpt", "track2")
    assert request.ksn == bytes.fromhex("FFFF9876543210E00001")
    assert request.data == bytes(range(40))
    assert request.mac == bytes.fromhex("0011223344556677")
    assert request.amount == wire.Amount(2**53 - 1, "EUR")
    assert request.at == datetime(2024, 2, 29, 10, 0, 0, 123456, tzinfo=UTC)


def test_both_schemes_and_both_lengths_of_mac_are_taken() -> None:
    assert tokenize(changed(AES, mac="00" * 8)).mac == bytes(8)
    assert tokenize(changed(AES, mac="00" * 16)).mac == bytes(16)
    assert tokenize(changed(mac="00" * 4)).mac == bytes(4)
    assert tokenize(changed(AES)).scheme == "aes-dukpt"


def test_ping_and_heartbeat_need_nothing_but_an_id_and_may_say_more() -> None:
    assert wire.decode_request(b'{"v":1,"id":"p","type":"ping"}') == wire.Ping("p")
    beat = b'{"v":1,"id":"h","type":"heartbeat","firmware":"9","x":[1]}'
    assert wire.decode_request(beat) == wire.Heartbeat("h")


def test_the_largest_request_is_still_taken() -> None:
    room = wire.REQUEST_LIMIT_BYTES - len(changed(pad=""))
    wire.decode_request(changed(pad="y" * room))
    assert refusal(changed(pad="y" * (room + 1))).code == "MALFORMED"


def test_the_hash_passes_over_spelling_and_time() -> None:
    first = tokenize(changed(mac="aabbccdd")).content_hash
    shuffled = dict(reversed([*TDES.items(), ("mac", "AABBCCDD"), ("at", "2024-01-01T00:00:00Z")]))
    assert tokenize(orjson.dumps({**shuffled, "ksn": "ffff9876543210e00001"})).content_hash == first
    assert tokenize(orjson.dumps({**shuffled, "id": "tap-2", "new": 1})).content_hash == first
    assert len(first) == 32


def test_the_hash_tells_every_other_content_apart() -> None:
    amount = {"value": 1, "currency": "USD"}
    variants = [
        changed(),
        changed(ksn="FFFF9876543210E00002"),
        changed(data=base64.b64encode(bytes(range(1, 41))).decode()),
        changed(data=base64.b64encode(bytes(range(48))).decode()),
        changed(format="track1"),
        changed(entry_mode="chip"),
        changed(mac="00" * 4),
        changed(mac="00" * 8),
        changed(amount=amount),
        changed(amount={**amount, "value": 11}),
        changed(amount={**amount, "currency": "EUR"}),
        changed(AES),
        changed(AES, mac="00" * 8),
    ]
    assert len({tokenize(variant).content_hash for variant in variants}) == len(variants)


@given(st.binary(min_size=8, max_size=64), st.binary(min_size=8, max_size=64), st.booleans())
def test_bytes_cannot_move_between_the_data_and_the_mac(
    one: bytes, two: bytes, with_mac: bool
) -> None:
    def hashed(data: bytes, mac: bytes | None) -> bytes:
        return wire._content_hash(
            ksn=b"k",
            data=data,
            scheme="tdes-dukpt",
            form="pan",
            entry_mode="chip",
            mac=mac,
            amount=None,
        )

    assert hashed(one + two, None) != hashed(one, two)
    assert (hashed(one, two if with_mac else None) == hashed(two, one if with_mac else None)) == (
        one == two
    )


def test_answers_are_what_the_contract_says() -> None:
    ok = wire.encode_ok(
        "tap-1",
        token="ptk_0",
        brand="visa",
        last4="4242",
        exp_month=12,
        exp_year=2030,
        expires_at=datetime(2030, 1, 1, tzinfo=UTC),
        replayed=False,
    )
    assert json.loads(ok) == {
        "v": 1,
        "id": "tap-1",
        "status": "ok",
        "token": "ptk_0",
        "brand": "visa",
        "last4": "4242",
        "exp_month": 12,
        "exp_year": 2030,
        "expires_at": "2030-01-01T00:00:00Z",
        "replayed": False,
    }
    assert json.loads(wire.encode_plain_ok("p")) == {"v": 1, "id": "p", "status": "ok"}
    assert json.loads(wire.encode_error(None, "MALFORMED", "no", False)) == {
        "v": 1,
        "id": None,
        "status": "error",
        "code": "MALFORMED",
        "message": "no",
        "retryable": False,
    }


def test_a_replayed_answer_differs_in_that_word_only() -> None:
    ok = wire.encode_ok(
        'x,"replayed":false}',
        token="ptk_0",
        brand="visa",
        last4="4242",
        exp_month=None,
        exp_year=None,
        expires_at=datetime(2030, 1, 1, tzinfo=UTC),
        replayed=False,
    )
    again = wire.as_replayed(ok)
    assert json.loads(again) == {**json.loads(ok), "replayed": True}
    assert wire.as_replayed(again) == again
    error = wire.encode_error("a", "DECRYPT_FAILED", "no", False)
    assert json.loads(wire.as_replayed(error)) == {**json.loads(error), "replayed": True}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b'{"state":"asleep"}',
        b'{"state":1}',
        b'{"state":"online","firmware":5}',
        b'{"state":"online","firmware":""}',
        b'{"state":"online","battery":101}',
        b'{"state":"online","battery":true}',
        b'{"state":"online","at":"now"}',
        b'{"state":"online","state":"offline"}',
        b'{"state":"online","x":"' + b"y" * wire.STATUS_LIMIT_BYTES + b'"}',
    ],
)
def test_a_bad_status_is_malformed(payload: bytes) -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.decode_status(payload)
    assert caught.value.code == "MALFORMED"


def test_a_status_may_be_whole_or_only_its_state() -> None:
    whole = b'{"state":"online","firmware":"1.2","battery":87.5,"at":"2024-01-01T00:00:00Z"}'
    assert wire.decode_status(whole) == wire.Status(
        state="online", firmware="1.2", battery=87.5, at=datetime(2024, 1, 1, tzinfo=UTC)
    )
    assert wire.decode_status(b'{"state":"offline"}').state == "offline"
