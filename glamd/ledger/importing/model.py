"""Books that balance, made of the rows of the older credit service, which may not. Pure.

That service checked a balance and then took from it, so that two debits at once both went through:
its balances do not chain, they may have been below zero, and a reference may have had two effects.
What counts is every transaction's amount and the balance that the merchant was shown. Where these
two do not agree, a transaction of the import's own makes them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Final, cast
from uuid import UUID, uuid5

from glamd.errors import InputError
from glamd.ids import as_uuid
from glamd.ledger.importing.fields import Fields
from glamd.ledger.importing.merchant import (
    OlderColumn,
    OlderRow,
    OlderShop,
    OlderTable,
    Refusal,
    RefusedError,
)
from glamd.ledger.model import (
    AMOUNT_LIMIT,
    DESCRIPTION_LIMIT,
    METADATA_LIMIT_BYTES,
    REFERENCE_ID_LIMIT,
    REFERENCE_TYPE_LIMIT,
    TOTAL_LIMIT,
    Command,
    Operation,
    Transaction,
)

REFERENCE_TYPE: Final = "import"
"""Of what the import adds: OPENING_<merchant>, ADJUSTMENT_<merchant>; of rows without a reference
of their own: TRANSACTION_<id>."""

_NUMBER: Final = 32

ACCOUNTS: Final = OlderTable(
    "credit_accounts",
    MappingProxyType(
        {
            "merchant_id": OlderColumn(("merchant_id",), 64),
            "platform_name": OlderColumn(("platform_name", "platform"), 32),
            "platform_id": OlderColumn(("platform_id", "platform_shop_id", "shop_id"), 255),
            "platform_domain": OlderColumn(("platform_domain", "shop_domain", "domain"), 253),
            "balance": OlderColumn(("balance",), _NUMBER),
            "total_granted": OlderColumn(("total_granted",), _NUMBER, is_needed=False),
            "total_consumed": OlderColumn(("total_consumed",), _NUMBER, is_needed=False),
            "created_at": OlderColumn(("created_at",), 64, is_needed=False),
        }
    ),
)
TRANSACTIONS: Final = OlderTable(
    "credit_transactions",
    MappingProxyType(
        {
            "id": OlderColumn(("id", "transaction_id"), 64),
            "merchant_id": OlderColumn(("merchant_id",), 64),
            "amount": OlderColumn(("amount",), _NUMBER),
            "operation": OlderColumn(("operation",), 32),
            "balance_before": OlderColumn(("balance_before",), _NUMBER, is_needed=False),
            "balance_after": OlderColumn(("balance_after",), _NUMBER, is_needed=False),
            "reference_type": OlderColumn(("reference_type",), REFERENCE_TYPE_LIMIT),
            "reference_id": OlderColumn(("reference_id",), REFERENCE_ID_LIMIT),
            "description": OlderColumn(("description",), DESCRIPTION_LIMIT, is_needed=False),
            "metadata": OlderColumn(
                # SQLAlchemy keeps the first name for itself.
                ("metadata", "transaction_metadata", "extra_metadata", "meta_data"),
                METADATA_LIMIT_BYTES,
                is_needed=False,
            ),
            "created_at": OlderColumn(("created_at",), 64),
        }
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OlderAccount:
    """An older account; a balance below zero is one that races made."""

    merchant_id: UUID
    shop: OlderShop
    balance: int
    total_granted: int | None
    total_consumed: int | None
    created_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OlderTransaction:
    """An older transaction; what it says of balances may be wrong."""

    id: UUID
    amount: int
    operation: Operation
    balance_before: int | None
    balance_after: int | None
    reference_type: str
    reference_id: str
    description: str | None
    metadata: dict[str, object] | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """An account's books: its rows' sums, and what is added for them to balance.

    `opening` credits come before the first row: what it began with, or as much as keeps every
    balance at 0 or above. `closing` (positive: credits, negative: debits) comes last.
    """

    account: OlderAccount
    rows: int
    credits: int
    debits: int
    opening: int
    closing: int
    first_at: datetime | None

    @property
    def balance(self) -> int:
        """The balance at the end, which is the one that the merchant was shown; never below 0."""
        return self.opening + self.credits - self.debits + self.closing

    @property
    def granted(self) -> int:
        """All credits, those that were added too."""
        return self.credits + self.opening + max(self.closing, 0)

    @property
    def consumed(self) -> int:
        """All debits, those that were added too."""
        return self.debits + max(-self.closing, 0)

    @property
    def count(self) -> int:
        """How many transactions there will be."""
        return self.rows + bool(self.opening) + bool(self.closing)

    @property
    def is_adjusted(self) -> bool:
        """Whether anything is added."""
        return bool(self.opening or self.closing)


def read_account(row: OlderRow) -> OlderAccount:
    """An older account. Raises RefusedError with every field that is wrong."""
    fields = Fields(ACCOUNTS, row, key="merchant_id")
    found = OlderAccount(
        merchant_id=fields.uuid("merchant_id"),
        shop=OlderShop(
            platform=fields.text("platform_name").lower(),
            shop_id=fields.text("platform_id"),
            domain=fields.text("platform_domain").lower(),
        ),
        balance=fields.whole("balance", least=-AMOUNT_LIMIT, most=AMOUNT_LIMIT),
        total_granted=fields.maybe_whole("total_granted", least=-TOTAL_LIMIT, most=TOTAL_LIMIT),
        total_consumed=fields.maybe_whole("total_consumed", least=-TOTAL_LIMIT, most=TOTAL_LIMIT),
        created_at=fields.maybe_time("created_at"),
    )
    fields.done()
    return found


def read_transaction(row: OlderRow) -> OlderTransaction:
    """An older transaction. Raises RefusedError with every field that is wrong."""
    fields = Fields(TRANSACTIONS, row, key="id")
    transaction_id = fields.uuid("id")
    reference_type, reference_id = _reference(fields, transaction_id)
    found = OlderTransaction(
        id=transaction_id,
        amount=fields.whole("amount", least=1, most=AMOUNT_LIMIT),
        operation=cast("Operation", fields.choice("operation", ("credit", "debit"))),
        balance_before=fields.maybe_whole("balance_before", least=-TOTAL_LIMIT, most=TOTAL_LIMIT),
        balance_after=fields.maybe_whole("balance_after", least=-TOTAL_LIMIT, most=TOTAL_LIMIT),
        reference_type=reference_type,
        reference_id=reference_id,
        description=fields.free_text("description"),
        metadata=fields.json_object("metadata"),
        created_at=fields.time("created_at"),
    )
    fields.done()
    _hold_to_the_ledgers_rules(found, fields)
    return found


def settle(account: OlderAccount, transactions: Iterable[OlderTransaction]) -> Books:
    """The books of an account, its transactions in the order of their creation.

    Raises RefusedError where they are in another order, or together more than an account can hold.
    """
    rows = credits_ = debits = lowest = 0
    begins_with = 0
    first_at: datetime | None = None
    last_at: datetime | None = None
    for one in transactions:
        if last_at is not None and one.created_at < last_at:
            raise _refused("created_at", one.id, "It is earlier than that of the row before it.")
        last_at = one.created_at
        if not rows:
            first_at, begins_with = last_at, one.balance_before or 0
        rows += 1
        if one.operation == "credit":
            credits_ += one.amount
        else:
            debits += one.amount
            lowest = min(lowest, credits_ - debits)
    opening = max(begins_with, -lowest, 0)
    shown = max(account.balance, 0)
    books = Books(
        account=account,
        rows=rows,
        credits=credits_,
        debits=debits,
        opening=opening,
        closing=shown - (opening + credits_ - debits),
        first_at=first_at,
    )
    limit = max(opening, abs(books.closing))
    if limit > AMOUNT_LIMIT or max(books.granted, books.consumed) > TOTAL_LIMIT:
        message = "All transactions together are more than an account can hold."
        raise RefusedError([Refusal(ACCOUNTS.name, str(account.merchant_id), "balance", message)])
    return books


def entries(
    books: Books, transactions: Iterable[OlderTransaction], now: datetime
) -> Iterator[Transaction]:
    """The transactions as they are to be written, with those that are added, chained from 0 on."""
    merchant_id = books.account.merchant_id
    seq = balance = 0

    def chained(one: OlderTransaction) -> Transaction:
        nonlocal seq, balance
        before = balance
        seq += 1
        balance += one.amount if one.operation == "credit" else -one.amount
        return Transaction(
            id=one.id,
            merchant_id=merchant_id,
            seq=seq,
            amount=one.amount,
            operation=one.operation,
            balance_before=before,
            balance_after=balance,
            reference_type=one.reference_type,
            reference_id=one.reference_id,
            description=one.description,
            metadata=one.metadata,
            created_at=one.created_at,
        )

    if books.opening:
        at = books.first_at or now
        yield chained(_added(merchant_id, "OPENING", books.opening, at))
    for one in transactions:
        yield chained(one)
    if books.closing:
        yield chained(_added(merchant_id, "ADJUSTMENT", books.closing, now))


def told_apart(repeated: Transaction) -> Transaction:
    """A transaction whose reference an earlier one has: with the transaction's id behind it."""
    suffix = f"#{repeated.id}"
    kept = repeated.reference_id[: REFERENCE_ID_LIMIT - len(suffix)]
    return repeated._replace(reference_id=kept + suffix)


def _reference(fields: Fields, transaction_id: UUID) -> tuple[str, str]:
    if not fields.has("reference_type") and not fields.has("reference_id"):
        return REFERENCE_TYPE, f"TRANSACTION_{transaction_id}"
    reference_type, reference_id = fields.text("reference_type"), fields.text("reference_id")
    # The id of a purchase is written by us in one way, so that a replay finds it.
    purchase_id = as_uuid(reference_id) if reference_type == "purchase" else None
    return reference_type, reference_id if purchase_id is None else str(purchase_id)


def _hold_to_the_ledgers_rules(found: OlderTransaction, fields: Fields) -> None:
    """What the ledger would not take of anybody, such as U+0000 in metadata, is not imported."""
    try:
        Command(
            merchant_id=found.id,
            operation=found.operation,
            amount=found.amount,
            reference_type=found.reference_type,
            reference_id=found.reference_id,
            description=found.description,
            metadata=found.metadata,
            correlation_id="import",
        )
    except InputError as error:
        fields.refused(error.fields[0].field, error)
        fields.done()


def _added(merchant_id: UUID, what: str, amount: int, at: datetime) -> OlderTransaction:
    reference_id = f"{what}_{merchant_id}"
    return OlderTransaction(
        id=uuid5(merchant_id, reference_id),
        amount=abs(amount),
        operation="credit" if amount > 0 else "debit",
        balance_before=None,
        balance_after=None,
        reference_type=REFERENCE_TYPE,
        reference_id=reference_id,
        description="Added by the import, for the balance to be the one of the older service",
        metadata=None,
        created_at=at,
    )


def _refused(field: str, transaction_id: UUID, message: str) -> RefusedError:
    return RefusedError([Refusal(TRANSACTIONS.name, str(transaction_id), field, message)])
