"""Bodies as bytes into models: whatever comes, it is a model or an error that names the place."""

import json
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given, settings
from hypothesis import strategies as st

from glamd.errors import InputError
from glamd.http.bodies import MAX_DEPTH, MAX_VALUES, Body, parse_json
from glamd.http.queries import Query, parse_query

CANARY = "4111111111111111"


class Line(Body):
    """A part of an order."""

    amount: int
    note: str | None = None


class Order(Body):
    """A body with a bit of everything."""

    lines: tuple[Line, ...] = ()
    tags: frozenset[str] = frozenset()
    count: int = 0
    price: float = 0.0
    free: dict[str, Any] | None = None


class Page(Query):
    """A query with a bit of everything."""

    before: int | None = None
    name: str | None = None


def parsed(raw: bytes) -> Order:
    """What a request with this body gives."""
    request = make_mocked_request("POST", "/", headers={"Content-Type": "application/json"})
    return parse_json(request, raw, Order)


def refused(raw: bytes) -> InputError:
    """How this body is refused."""
    with pytest.raises(InputError) as caught:
        parsed(raw)
    assert CANARY not in repr(caught.value) + repr(caught.value.fields)
    return caught.value


def nested(levels: int) -> bytes:
    """A body so deep, the outermost object counted."""
    return b'{"free":{"a":' + b"[" * (levels - 2) + b"]" * (levels - 2) + b"}}"


class TestForm:
    """What is refused whatever the model is."""

    @pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 100, 900, 1000, 1023])
    def test_a_body_that_is_too_deep_is_told_so(self, levels: int) -> None:
        error = refused(nested(levels))
        assert error.code == "MALFORMED_JSON"
        assert "nested deeper than 32 levels" in error.message

    @pytest.mark.parametrize("levels", [1_100, 10_000, 120_000])
    @pytest.mark.parametrize("part", [b"[", b'{"a":', b'[{"a":'])
    def test_no_depth_reaches_the_end_of_any_stack(self, levels: int, part: bytes) -> None:
        assert refused(part * levels).code == "MALFORMED_JSON"
        whole = part * levels + b"1" + part[::-1].translate(_CLOSING, b'"a:') * levels
        assert refused(whole).code == "MALFORMED_JSON"

    def test_what_is_just_not_too_deep_is_taken(self) -> None:
        assert parsed(nested(MAX_DEPTH)).free

    def test_a_body_of_too_many_values_is_refused(self) -> None:
        # The list, the object around it and its three names' values stand beside them.
        fits = b'{"free":{"a":[' + b"0," * (MAX_VALUES - 4) + b"0]}}"
        assert parsed(fits).free
        error = refused(fits.replace(b"[0,", b"[0,0,"))
        assert error.code == "BODY_TOO_LARGE"

    @pytest.mark.parametrize(
        "raw",
        [
            b'{"count":1e999}',
            b'{"price":-1e999}',
            b'{"price":NaN}',
            b'{"price":-Infinity}',
            b'{"count":' + b"9" * 5000 + b"}",
            b'{"count":' + b"9" * 400 + b"}",
            b'{"count":01}',
            b'{"count":+1}',
            b'{"count":0x10}',
            b'{"free":{"a":1,"\\u0061":2}}',
            b'{"free":{"a":[{"b":{"c":1,"c":1}}]}}',
            b'{"tags":["\\ud800"]}',
            b'{"tags":["\\udc00\\ud800"]}',
            b'{"\\ud800":1}',
            b'{"tags":["\xed\xa0\x80"]}',
            b'{"tags":["\xc0\xaf"]}',
            b'{"tags":["a\x00b"]}',
            b'{"tags":["a\nb"]}',
            b"\xef\xbb\xbf{}",
            b"\xff\xfe{\x00}\x00",
            b"{}\x00",
            b"//{}\n{}",
        ],
    )
    def test_what_some_parsers_let_pass_is_malformed(self, raw: bytes) -> None:
        assert refused(raw).code == "MALFORMED_JSON"


_CLOSING = bytes.maketrans(b"[{", b"]}")


class TestFields:
    """What is wrong in one place is told by its dotted path."""

    @pytest.mark.parametrize(
        ("body", "fields"),
        [
            ({"count": 2**63}, ["count"]),
            ({"count": -(2**63) - 1}, ["count"]),
            ({"count": 10**300}, ["count"]),
            ({"lines": [{"amount": 1}, {"amount": 2**64}]}, ["lines.1.amount"]),
            ({"lines": [{"amount": 1, "note": "a\u0000b"}]}, ["lines.0.note"]),
            ({"lines": [{"amount": 2**63, "note": "\u0000"}]}, ["lines.0.amount", "lines.0.note"]),
            ({"tags": ["a", "\u0000"]}, ["tags"]),
            ({"count": 1.0}, ["count"]),
            ({"count": 1.5}, ["count"]),
            ({"count": 1e15}, ["count"]),
            ({"count": "1"}, ["count"]),
            ({"count": True}, ["count"]),
            ({"count": None}, ["count"]),
            ({"price": "1.0"}, ["price"]),
            ({"lines": [{"amount": 1, CANARY: 1}]}, ["lines.0.?"]),
            ({"lines": {"0": {"amount": 1}}}, ["lines"]),
        ],
        ids=range(16),
    )
    def test_the_place_is_named_and_its_value_is_not(
        self, body: dict[str, Any], fields: list[str]
    ) -> None:
        error = refused(json.dumps(body).encode())
        assert error.code == "VALIDATION_ERROR"
        assert [each.field.rpartition(".")[0] or each.field for each in error.fields] == [
            field.rpartition(".")[0] or field for field in fields
        ]
        if fields != ["tags"]:  # a set has no order, so the index in it says nothing
            assert [each.field for each in error.fields] == fields

    def test_the_last_numbers_of_64_bits_are_taken(self) -> None:
        body = {"count": 2**63 - 1, "lines": [{"amount": -(2**63)}]}
        assert parsed(json.dumps(body).encode()).count == 2**63 - 1

    def test_a_free_object_is_judged_by_its_own_field(self) -> None:
        body = {"free": {"a": "\u0000", "b": 2**70}}
        assert parsed(json.dumps(body).encode()).free == body["free"]

    def test_a_thousand_mistakes_are_not_all_told(self) -> None:
        lines = [{"amount": 2**63}] * 1000
        assert len(refused(json.dumps({"lines": lines}).encode()).fields) == 20

    @pytest.mark.parametrize(
        ("query", "field"),
        [
            (f"before={2**63}", "before"),
            (f"before=-{2**63 + 1}", "before"),
            ("before=1e3", "before"),
            ("before=" + "9" * 5000, "before"),
            ("name=%00", "name"),
            ("name=a&name=b", "name"),
        ],
    )
    def test_a_query_is_held_to_the_same(self, query: str, field: str) -> None:
        with pytest.raises(InputError) as caught:
            parse_query(make_mocked_request("GET", f"/?{query}"), Page)
        assert [each.field for each in caught.value.fields] == [field]
        assert "9999" not in repr(caught.value.fields)


class TestAnything:
    """No bytes end in anything but a model or an error of ours."""

    @given(st.binary(max_size=200))
    def test_any_bytes(self, raw: bytes) -> None:
        self._either(raw)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        ),
        st.sampled_from(["count", "lines", "tags", "free", "price", "nonsense"]),
    )
    @settings(max_examples=50)
    def test_any_json(self, value: object, name: str) -> None:
        self._either(json.dumps({name: value}).encode())
        self._either(json.dumps(value).encode())

    @staticmethod
    def _either(raw: bytes) -> None:
        try:
            found: object = parsed(raw)
        except InputError as error:
            found = error
        if isinstance(found, InputError):
            assert found.code in {"MALFORMED_JSON", "VALIDATION_ERROR", "BODY_TOO_LARGE"}
            json.dumps([[each.field, each.message] for each in found.fields])
        else:
            assert isinstance(found, Order)
