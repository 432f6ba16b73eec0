"""The DUKPT actor: the one place where a clear PAN is, for as long as one message takes.

One actor a device initial key. It holds that key and the intermediate keys of its counters while
the device is busy, and forgets them when it passivates. In goes ciphertext, out comes a
`SealedCard` by value: metadata, fingerprint and AES-256-GCM ciphertext bound to its token.

Whether a request may be served at all is decided before it gets here; what it leaves behind is
committed after.
"""

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import orjson
import structlog
from prometheus_client import Counter

from glamd.actor import Actor, ActorSpec
from glamd.crypto.aead import Sealer
from glamd.crypto.dukpt import Dukpt, Profile, initial_key_id
from glamd.errors import CryptoError, InputError, InternalError, UnavailableError
from glamd.keys.key_sets.service import DeviceKey
from glamd.payments import card as cards
from glamd.payments.model import Format, SealedCard

KIND: Final = "dukpt"
IDLE_S: Final = 300.0
"""Seconds after which a quiet device's keys are dropped from memory."""
KEY_TIMEOUT_S: Final = 5.0
"""Seconds that a key provider has to give an initial key."""

log = structlog.get_logger()
_REFUSED = Counter("glamd_payments_refused_cards_total", "Cards refused, by code.", ["code"])
_SEALED = Counter("glamd_payments_sealed_cards_total", "Cards decrypted and sealed.", ["scheme"])

InitialKey = Callable[[str, bytes], Awaitable[DeviceKey]]
ActiveKey = Callable[[], tuple[str, Sealer]]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class OpenCard:
    """One encrypted card; `initial_ksn` names the device's initial key, `mac` may be absent."""

    key_set: str
    initial_ksn: bytes
    counter: int
    data: bytes
    mac: bytes | None
    format: Format
    token: str
    merchant_id: UUID
    keep_sensitive: bool


class CardCipher(Actor[OpenCard, SealedCard]):
    """Verifies, decrypts, parses and seals the cards of one initial key.

    Raises InputError with `MAC_INVALID` (nothing was decrypted) or `DECRYPT_FAILED`; what the key
    provider raises; InternalError where the key set's key does not unwrap.
    """

    def __init__(
        self, *, initial_key: InitialKey, active_key: ActiveKey, fingerprint_key: bytes
    ) -> None:
        self._initial_key = initial_key
        self._active_key = active_key
        self._fingerprint_key = fingerprint_key
        self._dukpt: Dukpt | None = None
        self._profile = Profile(scheme="tdes-dukpt")
        self._sealed = _SEALED.labels(self._profile.scheme)

    async def receive(self, message: OpenCard) -> SealedCard:
        """Open one card and seal it under the active data key."""
        dukpt = self._dukpt or await self._load(message)
        try:
            self._verify(dukpt, message)
            sealed = self._reseal(dukpt, message)
        except InputError as error:
            _REFUSED.labels(error.code).inc()
            raise
        self._sealed.inc()
        return sealed

    async def on_passivate(self) -> None:
        """Forget the keys."""
        if self._dukpt is not None:
            self._dukpt.forget()
            self._dukpt = None

    async def _load(self, message: OpenCard) -> Dukpt:
        try:
            async with asyncio.timeout(KEY_TIMEOUT_S):
                found = await self._initial_key(message.key_set, message.initial_ksn)
        except TimeoutError:
            raise UnavailableError("The key provider does not answer in time.") from None
        except CryptoError as error:
            # A key that does not unwrap is no fault of the device, which may send it again.
            log.exception("initial_key_unusable", key_set=message.key_set)
            raise InternalError("The device's initial key cannot be derived.") from error
        self._profile = found.profile
        key_id = initial_key_id(self._profile.scheme, message.initial_ksn)
        self._dukpt = Dukpt(self._profile, found.key, key_id)
        self._sealed = _SEALED.labels(self._profile.scheme)
        return self._dukpt

    def _verify(self, dukpt: Dukpt, message: OpenCard) -> None:
        if message.mac is None:
            if self._profile.mac == "required":
                raise InputError("the key set requires a MAC", code="MAC_INVALID")
        elif not dukpt.verify_mac(message.counter, message.data, message.mac):
            raise InputError("the MAC does not verify", code="MAC_INVALID")

    def _reseal(self, dukpt: Dukpt, message: OpenCard) -> SealedCard:
        try:
            clear = dukpt.decrypt(message.counter, message.data)
        except CryptoError as error:
            raise InputError("the padding is not valid", code="DECRYPT_FAILED") from error
        with contextlib.closing(_Wiped(clear)):
            card = cards.parse(message.format, clear)
            version, sealer = self._active_key()
            return SealedCard(
                brand=card.brand,
                bin=card.bin,
                last4=card.last4,
                exp_month=card.exp_month,
                exp_year=card.exp_year,
                fingerprint=hmac.digest(
                    self._fingerprint_key, message.merchant_id.bytes + card.pan.encode(), "sha256"
                ),
                ciphertext=sealer.seal(
                    pack(card), associated_data=associated_data(message.token, version)
                ),
                sensitive_ciphertext=None,
                key_version=version,
            )


class _Wiped:
    """Overwrites a clear buffer when closed, whatever happened in between."""

    def __init__(self, buffer: bytearray) -> None:
        self._buffer = buffer

    def close(self) -> None:
        self._buffer[:] = bytes(len(self._buffer))


def pack(card: cards.Card) -> bytes:
    """What is sealed of a card: a JSON object with the names of the fields to ask for."""
    return orjson.dumps(
        {
            "pan": card.pan,
            "expiry": card.expiry,
            "cardholder_name": card.cardholder_name,
            "service_code": card.service_code,
        }
    )


def associated_data(token: str, key_version: str) -> bytes:
    """Binds a ciphertext to its row and key version, so that rows cannot be swapped (spec 4)."""
    return f"payment-token|card|{token}|{key_version}".encode()


def spec(
    *, initial_key: InitialKey, active_key: ActiveKey, fingerprint_key: bytes
) -> ActorSpec[OpenCard, SealedCard]:
    """How the system makes a DUKPT actor; its key is the device's id."""
    return ActorSpec(
        kind=KIND,
        factory=lambda _: CardCipher(
            initial_key=initial_key, active_key=active_key, fingerprint_key=fingerprint_key
        ),
        idle_s=IDLE_S,
    )
