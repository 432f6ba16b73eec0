"""Card numbers in a dead letter's bytes: found in every scheme, and nothing else found."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.card_numbers import MASK, hidden

# Published test numbers of the schemes and of payment providers.
NUMBERS = [
    "4111111111111111",
    "4222222222222",
    "5555555555554444",
    "5105105105105100",
    "2223003122003222",
    "2720990000000007",
    "378282246310005",
    "371449635398431",
    "30569309025904",
    "38520000023237",
    "36227206271667",
    "3530111333300000",
    "6011111111111117",
    "6445644564456445",
    "6500000000000002",
    "6200000000000005",
    "6304000000000000",
    "6799990100000000019",
]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("around", ['"%s"', "%s", ":%s,", "x%sx", "pan=%s;", "\xff%s\x00"])
def test_a_number_of_every_scheme_is_hidden(number: str, around: str) -> None:
    content = (around % number).encode("latin-1")
    assert hidden(content) == content.replace(number.encode(), MASK)


@pytest.mark.parametrize(
    "number", ["4111 1111 1111 1111", "4111-1111-1111-1111", "3782 822463 10005"]
)
def test_so_is_one_that_is_written_in_groups(number: str) -> None:
    assert hidden(f'{{"n":"{number}"}}'.encode()) == b'{"n":"' + MASK + b'"}'


def test_all_of_them_are_hidden() -> None:
    content = " and ".join(NUMBERS).encode()
    assert hidden(content) == b" and ".join([MASK] * len(NUMBERS))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "4111111111111112",
        "1017262355000",
        "gid://shopify/AppPurchaseOneTime/1017262355",
        "gid://shopify/Order/5123456789012",
        "00000000000000000000",
        "41111111111111110",
        "04111111111111111",
        "4111111111111111000000000000",
        "2025-11-12T10:30:00.123456+00:00",
        "1763000000000000",
        "018f3b1c-0000-7000-8000-000000000001",
        "41111111-1111-4111-8111-111111111111",
    ],
)
def test_other_numbers_stay(content: str) -> None:
    assert hidden(content.encode()) == content.encode()


@given(st.lists(st.uuids(), min_size=1, max_size=20), st.sampled_from(["", '"', " ", ","]))
def test_uuids_stay(ids: list[uuid.UUID], between: str) -> None:
    content = f"{between or ';'}".join(str(each) for each in ids).encode()
    assert hidden(content) == content


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_no_trouble(content: bytes) -> None:
    assert hidden(hidden(content)) == hidden(content)
