"""The words of the payment part: what a token, a caller and a grant are. Pure data.

No SQL, no asyncio, no clear card data: a PAN lives in `glamd.payments.card` for as long as one
request takes, and nowhere else.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal
from uuid import UUID

from glamd.payments.counter import CounterWindow

Scheme = Literal["tdes-dukpt", "aes-dukpt"]
Format = Literal["track2", "track1", "emv-tlv", "pan", "json"]
EntryMode = Literal["magstripe", "chip", "contactless", "manual"]
TokenStatus = Literal["active", "expired", "revoked"]
DecryptField = Literal["pan", "expiry", "cardholder_name", "service_code", "track2", "emv"]

IDEMPOTENCY_TTL: Final = timedelta(hours=24)
"""How long the answer to a request id is remembered (spec 2)."""

DECRYPT_FIELDS: tuple[DecryptField, ...] = (
    "pan",
    "expiry",
    "cardholder_name",
    "service_code",
    "track2",
    "emv",
)
SENSITIVE_FIELDS: Final = frozenset({"track2", "emv"})
"""What stands under the second ciphertext, as long as it is there (PCI DSS 3.3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentToken:
    """A payment token's metadata, as clients may see it. There is no PAN in here."""

    token: str
    merchant_id: UUID
    device_id: str
    brand: str
    bin: str
    last4: str
    exp_month: int | None
    exp_year: int | None
    fingerprint: str
    entry_mode: EntryMode
    status: TokenStatus
    has_sensitive_data: bool
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPage:
    """One page of a merchant's tokens, newest first; `total` is a kept counter, not a count."""

    items: tuple[PaymentToken, ...]
    total: int
    next_cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What one worker may detokenize; `merchants` empty means every merchant."""

    worker: str
    purposes: frozenset[str]
    fields: frozenset[str]
    merchants: frozenset[UUID]
    rate_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One attempt to see card data: who, from where, at what, and why. It becomes an audit row."""

    worker: str
    certificate_sha256: str
    ip: str
    token: str
    fields: tuple[str, ...]
    purpose: str
    correlation_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedCard:
    """What the DUKPT actor lets out of a card: the metadata, and the rest as ciphertext."""

    brand: str
    bin: str
    last4: str
    exp_month: int | None
    exp_year: int | None
    fingerprint: bytes
    ciphertext: bytes
    sensitive_ciphertext: bytes | None
    key_version: str


@dataclass(frozen=True, slots=True)
class SealedToken:
    """A stored token with its ciphertexts; where they are gone, they and the version are empty."""

    merchant_id: UUID
    status: str
    expires_at: datetime
    ciphertext: bytes = field(repr=False)
    sensitive_ciphertext: bytes | None = field(repr=False)
    key_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedToken:
    """A token about to be stored; `expires_at` is aware."""

    token: str
    entry_mode: EntryMode
    card: SealedCard
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """One request's whole effect. `counter_version` is the version the decision was made on.

    Whose token it is follows from the counters, so it is not said again.
    """

    counter_id: int
    counter_version: int
    window: CounterWindow
    device_id: str
    request_id: str
    content_hash: bytes
    answer: bytes
    at: datetime
    issued: IssuedToken | None


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """The first answer of a request id, and the hash of the content that got it."""

    content_hash: bytes
    answer: bytes
