"""Card numbers where they have no business: in the references, texts and ids of money."""

from typing import Any
from uuid import uuid4

import orjson
import pytest

from glamd.errors import InputError
from glamd.events import envelope
from glamd.events.schemas import MatchCompleted
from glamd.ledger.model import Command

VISA = "4242424242424242"
USUAL: dict[str, Any] = {
    "merchant_id": uuid4(),
    "operation": "debit",
    "amount": 1,
    "reference_type": "match",
    "reference_id": "m-1",
    "correlation_id": "c-1",
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"reference_id": VISA},
        {"reference_id": "order 4242 4242 4242 4242"},
        {"reference_id": "378282246310005"},
        {"reference_type": VISA},
        {"description": f"paid with {VISA}"},
        {"metadata": {"deep": [{"pan": VISA}]}},
        {"metadata": {"pan": int(VISA)}},
        {"metadata": {VISA: 1}},
    ],
    ids=str,
)
def test_a_card_number_is_refused_by_its_field_and_not_repeated(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        Command(**USUAL | wrong)
    assert [each.field for each in caught.value.fields] == list(wrong)
    assert VISA not in str(caught.value.fields) + str(caught.value)


@pytest.mark.parametrize(
    "right",
    [
        "4242424242424241",  # no check digit
        "gid://shopify/Order/4222222222222",  # 13 digits, as a Visa card once had
        "gid://shopify/ProductVariant/39000000000004",
        "1763745600000000",  # microseconds since 1970
        "42424242-4242-4242-8242-424242424242",
        "20098892-d55e-460e-ae7b-376ada884932",
    ],
)
def test_the_numbers_that_services_give_their_things_are_references(right: str) -> None:
    assert Command(**USUAL | {"reference_id": right}).reference_id == right


def test_a_correlation_id_with_a_card_number_goes_no_further() -> None:
    data = {"merchant_id": str(uuid4()), "match_id": "m", "shopper_id": "s"}
    body = orjson.dumps(data | {"matched_items_count": 1, "correlation_id": VISA, "event_id": VISA})
    event = envelope.read(MatchCompleted, body=body, headers={})
    assert event is not None
    assert VISA not in event.correlation_id
