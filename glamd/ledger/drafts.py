"""Commands decided one after the other on one account: what is to be written, and the answers.

Pure, like the rules themselves: known references, identifiers and the moment are given. Nothing a
draft says is true before its entry is committed.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias
from uuid import UUID

from glamd.errors import GlamError
from glamd.ledger.model import (
    Account,
    Applied,
    Command,
    DuplicateTransactionError,
    Effect,
    Event,
    InsufficientCreditsError,
    Reference,
    Refusal,
    Transaction,
    decide,
    is_same,
)

Answer: TypeAlias = Applied | GlamError


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one merchant's decisions leave behind, all of it or nothing.

    account       the account after them; its version is one above that on which they rest
    transactions  in their order; each one's reference has to be new
    events        in their order, with their ids
    refused       references of commands that were refused; these have to be new as well, since
                  whoever repeats a command that had its effect is told of that effect
    """

    account: Account
    at: datetime
    transactions: Sequence[Transaction]
    events: Sequence[tuple[UUID, Event]]
    refused: Sequence[Reference]


@dataclass(frozen=True, slots=True)
class Draft:
    """Decided commands: the account afterwards, one answer a command, and how many ended how.

    `entry` is None where there is nothing to write; else the rest is true once it is committed.
    """

    account: Account
    answers: Sequence[Answer]
    entry: Entry | None
    outcomes: dict[tuple[str, str], int]


def draft(
    account: Account,
    commands: Sequence[Command],
    now: datetime,
    *,
    known: dict[Reference, Transaction],
    mine: set[UUID],
    ids: Iterator[UUID],
    low_balance_threshold: int,
) -> Draft:
    """Decide commands in their order.

    `known` are transactions whose references were used, to which those decided here are added.
    One whose id is in `mine` is the outcome of an earlier attempt at these very commands: the
    first command that meets it had it done, and has not come too late.
    """
    answers: list[Answer] = []
    transactions: list[Transaction] = []
    events: list[tuple[UUID, Event]] = []
    refused: list[Reference] = []
    outcomes: dict[tuple[str, str], int] = defaultdict(int)
    for command in commands:
        reference = (command.reference_type, command.reference_id)
        first = known.get(reference)
        if first is not None:
            answer, outcome = _again(command, first, mine)
            answers.append(answer)
            outcomes[command.operation, outcome] += 1
            continue
        transaction_id = next(ids)
        decision = decide(
            account,
            command,
            now,
            transaction_id=transaction_id,
            low_balance_threshold=low_balance_threshold,
        )
        if isinstance(decision, Effect):
            account = decision.account
            known[reference] = transaction = decision.transaction
            transactions.append(transaction)
            # The movement and its event are one thing under one id.
            events.append((transaction_id, decision.events[0]))
            more = decision.events[1:]
            answers.append(Applied(transaction, transaction.balance_after, replayed=False))
            outcomes[command.operation, "applied"] += 1
        else:
            more = decision.events
            refused.append(reference)
            answers.append(decision.error)
            outcomes[command.operation, _refusal(decision)] += 1
        if more:
            events += [(next(ids), event) for event in more]
    if not transactions and not refused:
        return Draft(account, answers, None, outcomes)
    account = account._replace(version=account.version + 1)
    entry = Entry(
        account=account, at=now, transactions=transactions, events=events, refused=refused
    )
    return Draft(account, answers, entry, outcomes)


def _again(command: Command, first: Transaction, mine: set[UUID]) -> tuple[Answer, str]:
    if not is_same(command, first):
        return DuplicateTransactionError(), "duplicate"
    replayed = first.id not in mine
    mine.discard(first.id)
    return Applied(first, first.balance_after, replayed), "replayed" if replayed else "applied"


def _refusal(decision: Refusal) -> str:
    is_short = isinstance(decision.error, InsufficientCreditsError)
    return "insufficient" if is_short else "refused"
