"""Commands decided in a row: repetitions among them, and what is left to be written."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import count
from uuid import UUID, uuid4

from glamd.ledger.drafts import Draft, draft
from glamd.ledger.journal import new_ids
from glamd.ledger.model import (
    Account,
    Applied,
    Command,
    DuplicateTransactionError,
    InsufficientCreditsError,
    Reference,
    Transaction,
)
from tests.support.ledgers import command

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
MERCHANT = uuid4()


def account(balance: int) -> Account:
    """An account that was granted so much once."""
    return Account(
        merchant_id=MERCHANT,
        platform_name="shopify",
        platform_id="gid-1",
        platform_domain="shop.example.com",
        balance=balance,
        total_granted=balance,
        total_consumed=0,
        transaction_count=1,
        version=1,
    )


def drafted(
    balance: int,
    commands: Sequence[Command],
    *,
    known: dict[Reference, Transaction] | None = None,
    mine: set[UUID] | None = None,
) -> Draft:
    """The commands, decided."""
    return draft(
        account(balance),
        commands,
        NOW,
        known={} if known is None else known,
        mine=set() if mine is None else mine,
        ids=(UUID(int=number) for number in count(1)),
        low_balance_threshold=0,
    )


def test_a_repetition_in_the_same_batch_has_no_second_effect() -> None:
    first, other = command(MERCHANT, amount=3, reference="a"), command(MERCHANT, reference="b")
    decided = drafted(10, [first, first, other, first])
    assert decided.account.balance == 6
    answers = [answer for answer in decided.answers if isinstance(answer, Applied)]
    assert [answer.replayed for answer in answers] == [False, True, False, True]
    assert answers[0].transaction is answers[1].transaction is answers[3].transaction
    assert answers[3].balance == 7
    assert decided.entry is not None
    assert [each.reference_id for each in decided.entry.transactions] == ["a", "b"]
    assert decided.outcomes == {("debit", "applied"): 2, ("debit", "replayed"): 2}


def test_a_repetition_with_another_amount_or_operation_is_refused() -> None:
    decided = drafted(
        10,
        [
            command(MERCHANT, "debit", 3, "a"),
            command(MERCHANT, "debit", 4, "a"),
            command(MERCHANT, "credit", 3, "a"),
            command(MERCHANT, "debit", 3, "a", reference_type="other"),
        ],
    )
    kinds = [type(answer) for answer in decided.answers]
    assert kinds == [Applied, DuplicateTransactionError, DuplicateTransactionError, Applied]
    assert decided.account.balance == 4


def test_a_refused_reference_can_be_used_later_in_the_same_batch() -> None:
    wanted = command(MERCHANT, amount=5, reference="a")
    decided = drafted(1, [wanted, command(MERCHANT, "credit", 4), wanted, wanted])
    assert isinstance(decided.answers[0], InsufficientCreditsError)
    assert isinstance(decided.answers[2], Applied)
    assert isinstance(decided.answers[3], Applied)
    assert decided.answers[3].replayed
    assert decided.account.balance == 0
    assert decided.entry is not None
    assert decided.entry.refused == [("match", "a")]


def test_where_only_repetitions_came_nothing_is_written() -> None:
    known: dict[Reference, Transaction] = {}
    first = command(MERCHANT, reference="a")
    drafted(10, [first], known=known)
    again = drafted(9, [first], known=known)
    assert again.entry is None
    assert again.account.version == 1
    assert isinstance(again.answers[0], Applied)


def test_where_all_is_refused_the_events_are_still_written_on_a_version_that_holds() -> None:
    decided = drafted(0, [command(MERCHANT), command(MERCHANT)])
    assert decided.entry is not None
    assert decided.entry.transactions == []
    assert len(decided.entry.events) == len(decided.entry.refused) == 2
    assert decided.entry.account.version == 2
    assert decided.entry.account.transaction_count == 1


def test_what_an_earlier_attempt_has_done_is_no_repetition() -> None:
    known: dict[Reference, Transaction] = {}
    first = command(MERCHANT, reference="a")
    lost = drafted(10, [first], known=known)
    assert lost.entry is not None
    found = drafted(9, [first, first], known=known, mine={lost.entry.transactions[0].id})
    answers = [answer for answer in found.answers if isinstance(answer, Applied)]
    assert [answer.replayed for answer in answers] == [False, True]


def test_movements_are_numbered_without_a_gap_and_share_the_id_of_their_event() -> None:
    decided = drafted(5, [command(MERCHANT, amount=n) for n in (2, 9, 3)])
    assert decided.entry is not None
    moved = decided.entry.transactions
    assert [(each.seq, each.balance_before, each.balance_after) for each in moved] == [
        (2, 5, 3),
        (3, 3, 0),
    ]
    told = [(event_id, event.subject.split(".")[2]) for event_id, event in decided.entry.events]
    assert [name for _, name in told] == ["consumed", "insufficient", "consumed", "exhausted"]
    assert [told[0][0], told[2][0]] == [each.id for each in moved]
    assert len({event_id for event_id, _ in told}) == 4


def test_ids_are_of_version_7_and_grow_and_are_never_the_same() -> None:
    ids = new_ids(NOW)
    made = [next(ids) for _ in range(1000)]
    more = new_ids(NOW)
    made += [next(more) for _ in range(1000)]
    assert {(each.version, each.variant) for each in made} == {(7, "specified in RFC 4122")}
    assert sorted(set(made)) == made
    assert made[0].int >> 80 == int(NOW.timestamp() * 1000)
