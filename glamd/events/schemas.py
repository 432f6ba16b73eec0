"""The fields of the events that we consume, by subject, with the names of older publishers. Pure.

Fields that we do not know are passed over: their publishers may add what they like. Integers are
integers, never texts, fractions or booleans; a time without an offset is UTC. What the values mean
for a merchant is decided by whoever handles the event.
"""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, ClassVar, Final
from uuid import UUID

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_CREDITS: Final = 2**53 - 1
"""The largest integer that every reader of JSON can hold."""

MAX_REFERENCE_CHARS: Final = 200
MAX_TEXT_CHARS: Final = 255
MAX_ITEMS: Final = 2**31 - 1

# PostgreSQL has no NUL in a text, and nothing that steers a terminal belongs into an id.
_NO_CONTROLS: Final = r"^[^\x00-\x1f\x7f-\x9f]+$"


def _moment(given: object) -> datetime:
    if not isinstance(given, str):
        raise PydanticCustomError("moment_form", "It should be a time of RFC 3339.")
    try:
        parsed = datetime.fromisoformat(given)
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        raise PydanticCustomError("moment_form", "It should be a time of RFC 3339.") from None


def _number_as_text(given: object) -> object:
    is_number = isinstance(given, int) and not isinstance(given, bool)
    return str(given) if is_number else given


Credits = Annotated[int, Field(strict=True, ge=1, le=MAX_CREDITS)]
Reference = Annotated[
    str,
    Field(strict=True, min_length=1, max_length=MAX_REFERENCE_CHARS, pattern=_NO_CONTROLS),
]
Text = Annotated[
    str, Field(strict=True, min_length=1, max_length=MAX_TEXT_CHARS, pattern=_NO_CONTROLS)
]
Moment = Annotated[datetime, BeforeValidator(_moment)]


class EventData(BaseModel):
    """The base of all: each is about one merchant."""

    SUBJECT: ClassVar[str]

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    merchant_id: UUID


class MerchantCreated(EventData):
    """A shop has installed the application."""

    SUBJECT = "evt.merchant.created.v1"

    platform: Text = Field(validation_alias=AliasChoices("platform", "platform_name"))
    domain: Text = Field(validation_alias=AliasChoices("shop_domain", "domain"))
    shop_id: Text = Field(validation_alias=AliasChoices("shop_gid", "platform_shop_id"))
    name: Text | None = None
    email: Text | None = None
    installed_at: Moment | None = None


class TrialStarted(EventData):
    """Another billing service has started a trial; `credits` None where it says no number."""

    SUBJECT = "evt.billing.trial.started.v1"

    ends_at: Moment
    credits: Credits | None = None


class CreditsPurchased(EventData):
    """Another billing service has sold credits; `amount` is what was paid, in major units."""

    SUBJECT = "evt.billing.credits.purchased.v1"

    purchase_id: Reference
    credits: Credits
    amount: Annotated[Decimal, Field(ge=0, max_digits=17, decimal_places=4)] | None = None
    platform: Text | None = None


class MatchCompleted(EventData):
    """A shopper was shown a match, which costs one credit."""

    SUBJECT = "evt.ai.match.completed.v1"

    match_id: Reference
    shopper_id: Reference
    matched_items_count: Annotated[int, Field(strict=True, ge=0, le=MAX_ITEMS)]


class PurchaseUpdated(EventData):
    """The shop platform says what became of a charge; `status` in small letters, known or not."""

    SUBJECT = "evt.webhook.app.purchase_updated.v1"

    charge_id: Annotated[Reference, BeforeValidator(_number_as_text)]
    status: Annotated[Text, AfterValidator(str.lower)]
