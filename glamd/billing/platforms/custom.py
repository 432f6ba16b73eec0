"""A payment page of one's own: a signed address to send the merchant to, and a signed callback.

Pure but for the nonces. Nothing is called from here, so there is no answer to wait for and nobody
to ask; what became of a charge is told by the callback alone. docs/billing.md says both forms in
full, for whoever writes such a page.

Both signatures are HMAC-SHA256 under the same secrets, each behind a prefix of its own, so that one
can never pass for the other.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from urllib.parse import urlencode, urlsplit
from uuid import UUID

import orjson

from glamd.billing.model import PlatformName, Report, fits_charge_id
from glamd.billing.money import Money
from glamd.billing.platforms.interface import Checkout, Delivery, NotSoldError, Order
from glamd.errors import ConfigError, FieldError, InputError, UnauthenticatedError

TOPIC: Final = "charge"
CHECKOUT_PREFIX: Final = b"glamd-checkout-v1\n"
CALLBACK_PREFIX: Final = b"glamd-callback-v1\n"
SECRET_MIN_CHARS: Final = 32
MAX_AGE_MIN_S: Final = 10.0
MAX_AGE_MAX_S: Final = 3600.0
_NONCE_BYTES: Final = 16
_STATUS_LIMIT: Final = 64
_URL_LIMIT: Final = 1024

_TIMESTAMP: Final = re.compile(r"[0-9]{1,12}", re.ASCII)
_NONCE: Final = re.compile(r"[A-Za-z0-9_-]{16,128}", re.ASCII)
_SIGNATURE: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomSettings:
    """The payment page. ConfigError names every field that is wrong.

    `checkout_url` is https without query and fragment. `secrets` sign, the first one, and are
    accepted, all of them; each has 32 characters or more. A callback is good for `max_age_s`.
    """

    checkout_url: str
    secrets: tuple[str, ...] = field(repr=False)
    max_age_s: float = 300.0
    is_test: bool = False

    def __post_init__(self) -> None:
        """Refuse what could be forged, or read along on the way."""
        mistakes = []
        if not _is_page(self.checkout_url):
            mistakes.append(("checkout_url", "should be like https://pay.example.com/checkout"))
        if not self.secrets or any(len(each) < SECRET_MIN_CHARS for each in self.secrets):
            mistakes.append(("secrets", f"should have {SECRET_MIN_CHARS} characters or more"))
        if not MAX_AGE_MIN_S <= self.max_age_s <= MAX_AGE_MAX_S:
            mistakes.append(("max_age_s", f"should be {MAX_AGE_MIN_S:g} to {MAX_AGE_MAX_S:g}"))
        if mistakes:
            told = "; ".join(f"{name} {why}" for name, why in mistakes)
            fields = [FieldError(name, why) for name, why in mistakes]
            raise ConfigError(f"Billing at a page of one's own: {told}.", fields=fields)


class Custom:
    """A payment page of one's own as a platform that collects money."""

    name: PlatformName = "custom"
    can_be_asked = False

    def __init__(self, settings: CustomSettings) -> None:
        self.settings = settings

    @property
    def is_test(self) -> bool:
        """Whether its charges are tests."""
        return self.settings.is_test

    async def check_out(self, order: Order) -> Checkout:
        """The address that the merchant pays at; the charge's id is the purchase's."""
        charge_id = str(order.purchase_id)
        query = urlencode(
            {
                "charge_id": charge_id,
                "merchant_id": str(order.merchant_id),
                "credits": order.credits,
                "amount": order.price.amount,
                "currency": order.price.currency,
                "test": "true" if order.is_test else "false",
                "return_url": order.return_url,
                "expires_at": int(order.expires_at.timestamp()),
                "nonce": secrets.token_urlsafe(_NONCE_BYTES),
            }
        )
        signature = sign_checkout(self.settings.secrets[0], query)
        return Checkout(
            report=Report(
                charge_id=charge_id, status="pending", price=order.price, is_test=order.is_test
            ),
            url=f"{self.settings.checkout_url}?{query}&signature={signature}",
        )

    async def find(self, order: Order, charge_id: str | None) -> Report | None:
        """There is nobody to ask. Raises NotSoldError."""
        del order, charge_id
        raise NotSoldError("CANNOT_BE_ASKED")

    def receive(self, body: bytes, headers: Mapping[str, str], now: datetime) -> Delivery:
        """The delivery, if it was signed within `max_age_s`; UnauthenticatedError.

        Its nonce makes a repetition known: a second delivery with it is not kept.
        """
        timestamp, nonce = headers.get("x-glamd-timestamp", ""), headers.get("x-glamd-nonce", "")
        signature = headers.get("x-glamd-signature", "")
        well_formed = (
            _TIMESTAMP.fullmatch(timestamp)
            and _NONCE.fullmatch(nonce)
            and _SIGNATURE.fullmatch(signature)
        )
        if not well_formed or not self._is_signed(signature, timestamp, nonce, body):
            raise UnauthenticatedError("The callback's signature is missing or wrong.")
        if abs(now.timestamp() - int(timestamp)) > self.settings.max_age_s:
            raise UnauthenticatedError("The callback's signature is too old, or of another time.")
        return Delivery(delivery_id=nonce, topic=TOPIC, shop_domain="")

    def concerns(self, topic: str) -> bool:
        """Whether callbacks of this topic are about charges: there is no other one."""
        return topic == TOPIC

    def read(self, delivery: Delivery, body: bytes) -> Report:
        """What a callback says of a charge, all of it; InputError."""
        del delivery
        try:
            said: object = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise _wrong("body", "it is not JSON") from None
        if not isinstance(said, dict):
            raise _wrong("body", "it is not an object")
        charge_id, status, is_test = said.get("charge_id"), said.get("status"), said.get("test")
        if not isinstance(charge_id, str) or not fits_charge_id(charge_id):
            raise _wrong("charge_id", "it is the one of the checkout")
        if not isinstance(status, str) or not 1 <= len(status) <= _STATUS_LIMIT:
            raise _wrong("status", "it is a text")
        if not isinstance(is_test, bool):
            raise _wrong("test", "it is true or false")
        try:
            merchant_id = UUID(str(said.get("merchant_id")))
        except ValueError:
            raise _wrong("merchant_id", "it is the one of the checkout") from None
        return Report(
            charge_id=charge_id,
            status=status.lower(),
            price=Money.parse(said.get("amount"), said.get("currency")),
            is_test=is_test,
            merchant_id=merchant_id,
        )

    def _is_signed(self, signature: str, timestamp: str, nonce: str, body: bytes) -> bool:
        fits = [
            hmac.compare_digest(signature, sign_callback(secret, timestamp, nonce, body))
            for secret in self.settings.secrets
        ]
        return any(fits)


def sign_checkout(secret: str, query: str) -> str:
    """The signature of a checkout's address: over its query, up to the signature itself."""
    return _sign(secret, (CHECKOUT_PREFIX, query.encode()))


def sign_callback(secret: str, timestamp: str, nonce: str, body: bytes) -> str:
    """The signature of a callback: over its timestamp, its nonce and its body."""
    return _sign(secret, (CALLBACK_PREFIX, timestamp.encode(), b"\n", nonce.encode(), b"\n", body))


def _sign(secret: str, parts: Sequence[bytes]) -> str:
    mac = hmac.new(secret.encode(), digestmod=hashlib.sha256)
    for part in parts:
        mac.update(part)
    return mac.hexdigest()


def _is_page(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    plain = url.isascii() and url.isprintable() and " " not in url and "\\" not in url
    return (
        plain
        and len(url) <= _URL_LIMIT
        and parts.scheme == "https"
        and bool(parts.hostname)
        and "@" not in parts.netloc
        and "?" not in url
        and "#" not in url
    )


def _wrong(field: str, message: str) -> InputError:
    return InputError("The callback cannot be read.", fields=(FieldError(field, message),))
