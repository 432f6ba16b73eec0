"""Who is refused again and again has a row a minute, and costs no memory."""

from typing import Any
from uuid import UUID, uuid4

import pytest

from glamd.credentials import refusals
from glamd.credentials.refusals import Refusal, Refusals
from tests.support.settable_clock import SettableClock

MERCHANT = UUID(int=7)


@pytest.fixture
def clock() -> SettableClock:
    """A clock set by hand."""
    return SettableClock()


@pytest.fixture
def noted(clock: SettableClock) -> Refusals:
    """Nobody was refused yet."""
    return Refusals(clock)


def refusal(**changes: Any) -> Refusal:
    """A client that asks for another merchant's token."""
    usual = Refusal(
        kind="client", name="m", merchant_id=MERCHANT, action="delete", code="NOT_FOUND"
    )
    return usual._replace(**changes)


def test_the_same_again_has_no_row_until_a_minute_is_over(
    noted: Refusals, clock: SettableClock
) -> None:
    assert [noted.is_news(refusal()) for _ in range(1000)].count(True) == 1
    clock.advance(refusals.WINDOW_S - 1)
    assert not noted.is_news(refusal())
    clock.advance(1)
    assert noted.is_news(refusal())
    assert not noted.is_news(refusal())


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "internal"},
        {"name": "n"},
        {"merchant_id": UUID(int=8)},
        {"action": "read"},
        {"code": "FORBIDDEN"},
    ],
)
def test_another_caller_merchant_action_or_code_has_a_row_of_its_own(
    noted: Refusals, change: dict[str, Any]
) -> None:
    assert noted.is_news(refusal())
    assert noted.is_news(refusal(**change))
    assert not noted.is_news(refusal(**change))


def test_a_caller_that_goes_through_many_merchants_is_cut_short_and_no_other_with_it(
    noted: Refusals, clock: SettableClock
) -> None:
    rows = [noted.is_news(refusal(merchant_id=uuid4())) for _ in range(1000)]
    assert rows.count(True) == refusals.CALLER_ROWS
    assert noted.is_news(refusal(name="another"))
    clock.advance(refusals.WINDOW_S)
    assert noted.is_news(refusal())


def test_a_row_that_could_not_be_written_is_news_again(noted: Refusals) -> None:
    assert noted.is_news(refusal())
    noted.forget(refusal())
    noted.forget(refusal())
    noted.forget(refusal(name="nobody"))
    assert noted.is_news(refusal())


def test_callers_without_number_cost_no_memory_and_silence_nobody(
    noted: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "CALLERS_LIMIT", 10)
    for number in range(1000):
        assert noted.is_news(refusal(name=str(number)))
        assert len(noted) <= 10
