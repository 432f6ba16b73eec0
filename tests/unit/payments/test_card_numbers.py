"""Card numbers in texts: what is masked, and what only looks like one."""

import pytest

from glamd.payments.card_numbers import masked
from tests.support.cost import steps

PAN = "4242424242424242"


@pytest.mark.parametrize(
    "text",
    [
        PAN,
        "4242 4242 4242 4242",
        "4242-4242-4242-4242",
        "4242 - 4242 - 4242 - 4242",
        f"ptk_{PAN}",
        f"order/{PAN}:2",
        f"x{PAN}y",
        f"77{PAN}88",
        "378282246310005",
        "4222222222222",
        "6304000000000000000",
        # Neither in what is all digits nor beside a UUID is a card number hidden.
        f"{'1' * 16}{PAN}",
        f"6f1d0a52-5b0e-4a54-9f0a-0d7c0a1f2b3c/{PAN}",
    ],
)
def test_a_card_number_is_masked_wherever_it_stands(text: str) -> None:
    found = masked(text)
    assert len(found) == len(text)
    assert "*" * 4 in found
    bare = text.replace(" ", "").replace("-", "")
    for pan in (PAN, "378282246310005", "4222222222222", "6304000000000000000"):
        if pan in bare:
            assert pan not in found.replace(" ", "").replace("-", "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "order-7",
        "4000000000001",
        "ptk_" + "0" * 26,
        "424242424242",
        "4242.4242.4242.4242",
        "2030-01-01T12:00:00Z",
        f"{PAN}deadbeefdeadbeef",
        f"00-{PAN}deadbeefdeadbeef-0000000000000001-01",
        "42424242-4242-4242-8242-42424242424a",
    ],
)
def test_what_is_no_card_number_or_a_machines_id_is_left_as_it_is(text: str) -> None:
    assert masked(text) == text


def test_what_was_masked_once_stays_as_it_is() -> None:
    once = masked(f"a {PAN} b {PAN}1")
    assert masked(once) == once


@pytest.mark.parametrize("text", ["4" * 1024, "4 - " * 256, "a" * 1024 + "4242-" * 200])
def test_a_long_hostile_text_costs_little(text: str) -> None:
    # The slowest of these takes 340,000.
    assert steps(lambda: masked(text)) < 5_000_000
