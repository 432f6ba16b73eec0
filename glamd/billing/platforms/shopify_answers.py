"""What Shopify's answers to a GraphQL request mean: data, not now, no, or nobody knows. Pure.

An answer is a stranger's: of its texts nothing goes further but a charge's id, status and address,
each of them checked. Messages of errors are not passed on, only their codes, by our own names.

After a mutation the difference between "no" and "nobody knows" is whether something may have been
made. Shopify refuses a request that is throttled, malformed or not allowed before it executes it;
after an internal error nobody knows.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import orjson

from glamd.billing.model import Report, fits_charge_id
from glamd.billing.money import Money
from glamd.billing.platforms.interface import Checkout, NotSoldError, UnansweredError
from glamd.errors import GlamError, InputError

URL_LIMIT: Final = 2048
WAIT_LIMIT_S: Final = 3600.0
"""We wait no longer because an answer says so: what is written there may be a mistake."""

THROTTLE_WAIT_S: Final = 1.0
"""The wait where an answer names none: that long a bucket takes to fill, at the usual rates."""

_BY_STATUS: Final = {
    401: "TOKEN_REFUSED",
    402: "SHOP_FROZEN",
    403: "NOT_ALLOWED",
    404: "NO_SUCH_SHOP",
    423: "SHOP_LOCKED",
}
_BEFORE_EXECUTION: Final = {
    "ACCESS_DENIED": "NOT_ALLOWED",
    "SHOP_INACTIVE": "SHOP_FROZEN",
    "MAX_COST_EXCEEDED": "TOO_COSTLY",
}
_URL: Final = re.compile(r"https?://[!#-;=?-\[\]_a-z~]+", re.ASCII | re.IGNORECASE)


class ThrottledError(GlamError):
    """The request was not executed, since there were too many; after `wait_s` there is room."""

    default_code = "THROTTLED"

    def __init__(self, wait_s: float) -> None:
        super().__init__("The platform is asked too often.")
        self.wait_s = min(max(wait_s, 0.0), WAIT_LIMIT_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawAnswer:
    """An answer as it came, its body bounded."""

    status: int
    retry_after: str | None
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ChargePage:
    """Some of the charges of our app in a shop, newest first."""

    charges: tuple[tuple[str, datetime, Report], ...]
    """Name, when it was made, and what is said of it."""

    next_cursor: str | None


def data_of(answer: RawAnswer) -> Mapping[str, object]:
    """The `data` of this answer; ThrottledError, NotSoldError, UnansweredError otherwise."""
    status = answer.status
    if status == 429:
        raise ThrottledError(_seconds(answer.retry_after))
    if status >= 500 or status == 408:
        raise UnansweredError("SERVER_ERROR")
    if 300 <= status < 400:
        raise NotSoldError("REDIRECTED")
    if status != 200:
        raise NotSoldError(_BY_STATUS.get(status, "REFUSED"))
    try:
        body: object = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        raise UnansweredError("NOT_JSON") from None
    if not isinstance(body, dict):
        raise UnansweredError("NOT_JSON")
    data = body.get("data")
    _raise_errors(body, has_data=isinstance(data, dict))
    if not isinstance(data, dict):
        raise UnansweredError("BAD_ANSWER")
    return data


def checkout_of(data: Mapping[str, object]) -> Checkout:
    """The charge that was made; NotSoldError where the input was refused."""
    made = _part(data, "appPurchaseOneTimeCreate")
    if made.get("userErrors"):
        raise NotSoldError("INPUT_REFUSED")
    url = made.get("confirmationUrl")
    if not (isinstance(url, str) and len(url) <= URL_LIMIT and _URL.fullmatch(url)):
        raise UnansweredError("BAD_ANSWER")
    return Checkout(report=_report(_part(made, "appPurchaseOneTime")), url=url)


def charge_of(data: Mapping[str, object]) -> Report | None:
    """The charge that was asked for by its id; None where there is none."""
    return None if data.get("node", data) is None else _report(_part(data, "node"))


def charges_of(data: Mapping[str, object]) -> ChargePage:
    """A page of the charges of our app in this shop."""
    purchases = _part(_part(data, "currentAppInstallation"), "oneTimePurchases")
    nodes = purchases.get("nodes")
    if not isinstance(nodes, list):
        raise UnansweredError("BAD_ANSWER")
    page = _part(purchases, "pageInfo")
    cursor = page.get("endCursor") if page.get("hasNextPage") is True else None
    if not isinstance(cursor, str | None):
        raise UnansweredError("BAD_ANSWER")
    return ChargePage(charges=tuple(map(_named, nodes)), next_cursor=cursor)


def _raise_errors(body: Mapping[str, object], *, has_data: bool) -> None:
    errors = body.get("errors")
    if not errors:
        return
    codes = _codes(errors)
    if "THROTTLED" in codes:
        raise ThrottledError(_cost_wait_s(body))
    refused = next((_BEFORE_EXECUTION[code] for code in codes if code in _BEFORE_EXECUTION), None)
    if refused is not None:
        raise NotSoldError(refused)
    if "INTERNAL_SERVER_ERROR" in codes or has_data or not codes:
        raise UnansweredError("SERVER_ERROR")
    # Errors without data are those of a document or of variables that do not fit the schema.
    raise NotSoldError("QUERY_REFUSED")


def _codes(errors: object) -> Sequence[str]:
    """The codes of a list of errors; an error without one has the empty text."""
    found = []
    for error in errors if isinstance(errors, list) else ():
        extensions = error.get("extensions") if isinstance(error, dict) else None
        code = extensions.get("code") if isinstance(extensions, dict) else None
        found.append(code if isinstance(code, str) else "")
    return found


def _cost_wait_s(body: Mapping[str, object]) -> float:
    """How long the bucket takes to hold what the request costs; see `extensions.cost`."""
    try:
        cost = _part(_part(body, "extensions"), "cost")
        bucket = _part(cost, "throttleStatus")
    except UnansweredError:
        return THROTTLE_WAIT_S
    wanted = _number(cost.get("requestedQueryCost"))
    there, rate = _number(bucket.get("currentlyAvailable")), _number(bucket.get("restoreRate"))
    if wanted is None or there is None or rate is None or rate <= 0:
        return THROTTLE_WAIT_S
    return (wanted - there) / rate


def _named(node: object) -> tuple[str, datetime, Report]:
    if not isinstance(node, dict):
        raise UnansweredError("BAD_ANSWER")
    name, created_at = node.get("name"), node.get("createdAt")
    try:
        at = datetime.fromisoformat(created_at) if isinstance(created_at, str) else None
    except ValueError:
        at = None
    if not isinstance(name, str) or at is None or at.tzinfo is None:
        raise UnansweredError("BAD_ANSWER")
    return name, at, _report(node)


def _report(node: Mapping[str, object]) -> Report:
    charge_id, status, is_test = node.get("id"), node.get("status"), node.get("test")
    price = _part(node, "price")
    if not isinstance(charge_id, str) or not fits_charge_id(charge_id):
        raise UnansweredError("BAD_ANSWER")
    if not isinstance(status, str) or not isinstance(is_test, bool):
        raise UnansweredError("BAD_ANSWER")
    try:
        money = Money.parse(price.get("amount"), price.get("currencyCode"))
    except InputError:
        raise UnansweredError("BAD_ANSWER") from None
    return Report(charge_id=charge_id, status=status.lower(), price=money, is_test=is_test)


def _part(whole: Mapping[str, object], name: str) -> Mapping[str, object]:
    part = whole.get(name)
    if not isinstance(part, dict):
        raise UnansweredError("BAD_ANSWER")
    return part


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _seconds(text: str | None) -> float:
    """Seconds out of a Retry-After header; Shopify writes them with a point: `2.0`."""
    if text is None or re.fullmatch(r"[0-9]{1,6}(?:\.[0-9]{1,6})?", text, re.ASCII) is None:
        return THROTTLE_WAIT_S
    return float(text)
