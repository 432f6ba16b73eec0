"""The record of a load of money: what is written comes back, and what a kill cut off does not."""

from pathlib import Path

import pytest

from glamd.events import envelope
from glamd.events.schemas import CreditsPurchased, MatchCompleted
from tests.faults.money_load import event_body
from tests.faults.money_record import Account, MoneyRecord, Told, Wanted

MERCHANT = "6f1d0a52-5b0e-4a54-9f0a-0d7c0a1f2b3c"
DEBIT = Wanted(id="r-1", merchant=MERCHANT, operation="debit", amount=2, kind="load", way="http")
MATCH = Wanted(id="r-2", merchant=MERCHANT, operation="debit", amount=1, kind="match", way="event")
BOUGHT = Wanted(
    id="r-3", merchant=MERCHANT, operation="credit", amount=50, kind="purchase", way="event"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the record is."""
    return tmp_path / "record.jsonl"


def test_what_was_written_is_read_again(path: Path) -> None:
    with MoneyRecord(path) as record:
        record.wanted(DEBIT)
        record.answer(DEBIT, status=0, code="ServerDisconnectedError", ms=3.0)
        record.answer(DEBIT, status=503, code="UNAVAILABLE", ms=20.0)
        record.answer(DEBIT, status=200, code="ok", ms=2.0, told=Told("t-1", 7))
        record.wanted(MATCH)
        record.stored(MATCH)
    found = Account.read(path)
    assert found.wanted == {"r-1": DEBIT, "r-2": MATCH}
    assert found.done == {"r-1": {Told("t-1", 7)}}
    assert found.stored == {"r-2"}
    assert found.passing == {"ServerDisconnectedError": 1, "UNAVAILABLE": 1}
    assert not found.refused
    assert (found.answers, found.slowest_ms) == (3, 20.0)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 500, 502, 504])
def test_an_answer_that_is_neither_final_nor_retryable_is_a_refusal(
    path: Path, status: int
) -> None:
    with MoneyRecord(path) as record:
        record.wanted(DEBIT)
        record.answer(DEBIT, status=status, code="SOME_CODE", ms=1.0)
    found = Account.read(path)
    assert found.refused == {"r-1": {f"{status} SOME_CODE"}}
    assert not found.passing


def test_a_line_that_a_kill_cut_short_is_passed_over(path: Path) -> None:
    with MoneyRecord(path) as record:
        record.wanted(DEBIT)
    with path.open("ab") as stream:
        stream.write(b'{"what":"answer","id":"r-1","sta')
    assert Account.read(path).wanted == {"r-1": DEBIT}


@pytest.mark.parametrize("shape", range(3))
def test_each_shape_of_the_loads_events_is_one_that_is_taken(shape: int) -> None:
    match = envelope.read(MatchCompleted, body=event_body(MATCH, shape=shape), headers={})
    bought = envelope.read(CreditsPurchased, body=event_body(BOUGHT, shape=shape), headers={})
    assert match is not None
    assert bought is not None
    assert (match.data.match_id, str(match.data.merchant_id)) == ("r-2", MERCHANT)
    assert (bought.data.purchase_id, bought.data.credits) == ("r-3", 50)
    assert match.correlation_id == "r-2"
