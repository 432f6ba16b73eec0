"""What `/api/credits` takes and answers: the body's fields with their bounds, and the TypedDicts.

Pure. What a command may be is the ledger's to say; the bounds that a schema can tell stand here
too.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Final
from uuid import UUID

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from glamd.http.bodies import Body
from glamd.http.pages import PageQuery
from glamd.http.platform_token_models import JsonTree
from glamd.ledger.model import (
    AMOUNT_LIMIT,
    DESCRIPTION_LIMIT,
    REFERENCE_ID_LIMIT,
    REFERENCE_TYPE_LIMIT,
    Account,
    Command,
    Operation,
    Transaction,
)

_LEAST: Final = -(2**63)
_MOST: Final = 2**63 - 1


def _object(given: object, _handler: ValidatorFunctionWrapHandler) -> object:
    """Any object as it is: what may stand in it is the ledger's to judge, a number stays one.

    But for numbers beyond 64 bits: the database writes 1e308 out with all its digits, and a page of
    transactions full of those is forty times as large as what was sent.
    """
    if not isinstance(given, dict):
        raise PydanticCustomError("metadata_form", "It should be an object.")
    level: list[object] = [given]
    # The body's own bounds, of depth and of values, are those of this walk.
    while level:
        inner = [one for container in level for one in _inside(container)]
        if any(isinstance(one, int | float) and not _LEAST <= one <= _MOST for one in inner):
            raise PydanticCustomError("metadata_number", "A number in it is beyond 64 bits.")
        level = [one for one in inner if isinstance(one, dict | list)]
    return given


def _inside(container: object) -> Iterable[object]:
    if isinstance(container, dict):
        return container.values()
    return container if isinstance(container, list) else ()


class Move(Body):
    """Credits to be granted or taken, and the reference by which that happens once."""

    amount: Annotated[int, Field(ge=1, le=AMOUNT_LIMIT, description="Whole credits.")]
    reference_type: Annotated[
        str,
        Field(
            min_length=1,
            max_length=REFERENCE_TYPE_LIMIT,
            description="What it is for, in printable characters.",
        ),
    ]
    reference_id: Annotated[
        str,
        Field(
            min_length=1,
            max_length=REFERENCE_ID_LIMIT,
            description="Which of these it is for, in printable characters.",
        ),
    ]
    description: Annotated[str, Field(max_length=DESCRIPTION_LIMIT)] | None = None


class MoveBody(Move):
    """The same by another service: for which merchant, and what it wants to keep with it."""

    merchant_id: UUID
    metadata: Annotated[dict[str, JsonTree], WrapValidator(_object)] | None = Field(
        default=None, description="At most 16 KiB; comes back with the transaction."
    )


class TransactionQuery(PageQuery):
    """Which of the merchant's transactions."""


class CreditAccount(TypedDict):
    """A merchant's credits; `balance` is what was granted less what was consumed."""

    balance: int
    total_granted: int
    total_consumed: int
    platform_name: str
    shop_domain: str


class CreditTransaction(TypedDict):
    """What happened to an account once; it never changes."""

    id: UUID
    amount: int
    operation: Operation
    balance_before: int
    balance_after: int
    reference_type: str
    reference_id: str
    description: str | None
    metadata: dict[str, object] | None
    created_at: datetime


class CreditsMoved(TypedDict):
    """The transaction, and the balance right after it."""

    transaction: CreditTransaction
    balance: int


def command_of(
    move: Move,
    merchant_id: UUID,
    operation: Operation,
    *,
    correlation_id: str,
    metadata: dict[str, object] | None = None,
) -> Command:
    """The ledger's command; InputError names what only the ledger can judge."""
    return Command(
        merchant_id=merchant_id,
        operation=operation,
        amount=move.amount,
        reference_type=move.reference_type,
        reference_id=move.reference_id,
        description=move.description,
        metadata=metadata,
        correlation_id=correlation_id,
    )


def account_as_json(account: Account) -> CreditAccount:
    """An account as the contract names it."""
    return {
        "balance": account.balance,
        "total_granted": account.total_granted,
        "total_consumed": account.total_consumed,
        "platform_name": account.platform_name,
        "shop_domain": account.platform_domain,
    }


def transaction_as_json(transaction: Transaction) -> CreditTransaction:
    """A transaction as the contract names it."""
    metadata = transaction.metadata
    return {
        "id": transaction.id,
        "amount": transaction.amount,
        "operation": transaction.operation,
        "balance_before": transaction.balance_before,
        "balance_after": transaction.balance_after,
        "reference_type": transaction.reference_type,
        "reference_id": transaction.reference_id,
        "description": transaction.description,
        "metadata": None if metadata is None else dict(metadata),
        "created_at": transaction.created_at,
    }
