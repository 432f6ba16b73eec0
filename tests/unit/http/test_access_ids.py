"""Ids of requests: ours are unique and survive every log, a caller's where they are harmless."""

from itertools import islice

import pytest

from glamd.http.access import fresh_ids, valid_id
from glamd.redaction import redact


def test_ours_are_unique_and_nothing_takes_them_for_a_card_or_a_key() -> None:
    ids = list(islice(fresh_ids(), 5_000))
    assert len(set(ids)) == len(ids)
    for each in ids:
        assert len(each) == 32
        assert each.isascii()
        assert each.isalpha()
        assert redact("request_id", each) == each
        # A service behind us sends it back to us, and we believe it.
        assert valid_id(each) == each


def test_two_processes_do_not_make_the_same() -> None:
    assert set(islice(fresh_ids(), 600)).isdisjoint(islice(fresh_ids(), 600))


@pytest.mark.parametrize("given", ["r-1", "a" * 128, "A.b_c:d/e+f=g-h", "12345678901"])
def test_a_harmless_id_of_a_caller_is_kept(given: str) -> None:
    assert valid_id(given) == given


@pytest.mark.parametrize(
    "given",
    [None, "", " ", "a b", "a" * 129, "a\n", "\u00e9", "\udcff", "a\x00", "4111111111111111", "{}"],
)
def test_any_other_is_as_good_as_none(given: str | None) -> None:
    assert valid_id(given) is None


@pytest.mark.parametrize("between", "._:/+=-")
def test_no_separator_makes_a_card_number_an_id(between: str) -> None:
    assert valid_id(between.join(["x", "4111", "1111", "1111", "1111"])) is None


@pytest.mark.parametrize("given", ["127.0.0.1:8080/2026", "5f0c7a52-8a7c-4a51-9f60-0123456789ab"])
def test_an_address_or_a_uuid_may_be_an_id(given: str) -> None:
    assert valid_id(given) == given
