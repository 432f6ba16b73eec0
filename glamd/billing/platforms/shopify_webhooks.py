"""What Shopify's webhooks say, and whether they are Shopify's. Pure.

The signature is over the body alone: the headers that name the shop, the topic and the delivery are
not signed, and whoever got hold of one delivery can send its body again under others. So they are
claims. Which charge it is about, its status and its shop's number stand in the body. A delivery is
known again by its id and its body together, so that nobody keeps one out by its id.

The body of `app_purchases_one_time/update` has neither price nor test flag; those are compared when
the charge is made, or found again.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Final

import orjson

from glamd.billing.model import Report, ShopClaim, fits_charge_id, shop_number
from glamd.billing.platforms.interface import (
    DELIVERY_ID_LIMIT,
    DOMAIN_LIMIT,
    TOPIC_LIMIT,
    Delivery,
)
from glamd.errors import FieldError, InputError, UnauthenticatedError

TOPIC: Final = "app_purchases_one_time/update"
_STATUS_LIMIT: Final = 64
_BODY_HASH_CHARS: Final = 32
"""128 bits; nobody can make two signed bodies that share them."""


def receive(secrets: Sequence[str], body: bytes, headers: Mapping[str, str]) -> Delivery:
    """The delivery, if its body is signed with one of the secrets; UnauthenticatedError.

    Several are good at once: after a secret is replaced, Shopify goes on signing with the old one
    for up to an hour.
    """
    try:
        signature = base64.b64decode(headers.get("x-shopify-hmac-sha256", ""), validate=True)
    except (binascii.Error, ValueError):
        signature = b""
    # Every secret is tried, so that the time says nothing of which one it was.
    fits = [hmac.compare_digest(signature, _mac(secret, body)) for secret in secrets]
    if not any(fits):
        raise UnauthenticatedError("The webhook's signature is missing or wrong.")
    claimed = _claim(headers, "x-shopify-webhook-id", DELIVERY_ID_LIMIT) or _claim(
        headers, "x-shopify-event-id", DELIVERY_ID_LIMIT
    )
    return Delivery(
        delivery_id=f"{claimed or 'unnamed'}:{hashlib.sha256(body).hexdigest()[:_BODY_HASH_CHARS]}",
        topic=_claim(headers, "x-shopify-topic", TOPIC_LIMIT).lower(),
        shop_domain=_claim(headers, "x-shopify-shop-domain", DOMAIN_LIMIT).lower(),
    )


def read(delivery: Delivery, body: bytes) -> Report:
    """What a webhook of TOPIC says of a charge; InputError."""
    if not body.startswith(b"{"):
        # With the same secret Shopify signs the addresses at which it opens an app, of which a
        # merchant chooses a part: sorted parameters, that could be made into JSON behind a blank.
        raise _wrong("body", "it is no object")
    try:
        whole: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise _wrong("body", "it is not JSON") from None
    charge = whole.get("app_purchase_one_time") if isinstance(whole, dict) else None
    if not isinstance(charge, dict):
        raise _wrong("app_purchase_one_time", "it is missing")
    charge_id, status = charge.get("admin_graphql_api_id"), charge.get("status")
    if not isinstance(charge_id, str) or not fits_charge_id(charge_id):
        raise _wrong("admin_graphql_api_id", "it is no id of a charge")
    if not isinstance(status, str) or not 1 <= len(status) <= _STATUS_LIMIT:
        raise _wrong("status", "it is no status")
    shop = charge.get("admin_graphql_api_shop_id")
    number = shop_number(shop) if isinstance(shop, str) else None
    return Report(
        charge_id=charge_id,
        status=status.lower(),
        shop=ShopClaim(number=number, domain=delivery.shop_domain or None),
    )


def _mac(secret: str, body: bytes) -> bytes:
    return hmac.digest(secret.encode(), body, "sha256")


def _claim(headers: Mapping[str, str], name: str, limit: int) -> str:
    """A header that nobody has signed; empty where it could not be kept as it is."""
    text = headers.get(name, "")
    return text if len(text) <= limit and text.isascii() and text.isprintable() else ""


def _wrong(field: str, message: str) -> InputError:
    return InputError("The webhook cannot be read.", fields=(FieldError(field, message),))
