"""The DUKPT actor: the one place where a clear PAN is, for as long as one message takes.

One actor a device. It holds the device's initial key and the intermediate keys of its counters
while the device is busy, and overwrites them when it passivates or the device is rekeyed. In goes
what the reader sent, out comes a `SealedCard` by value: metadata, fingerprint and AES-256-GCM
ciphertext bound to its token. Whatever was clear in between is in bytearrays, overwritten before
the message is answered, whatever its outcome.

Whether a request may be served at all is decided before it gets here; what it leaves behind is
committed after.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Iterable
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
from glamd.payments import readers
from glamd.payments.card_forms import nibbles, wipe
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
    """One encrypted card; `initial_ksn` names the device's initial key, `mac` may be absent.

    With `keep_sensitive`, track 2 and the chip's data are sealed too and not dropped; no caller
    says so for a card that was keyed in.
    """

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
    """Verifies, decrypts, parses and seals the cards of one device.

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
        self._loaded_for: tuple[str, bytes] | None = None
        self._profile = Profile(scheme="tdes-dukpt")
        self._reader = readers.GENERIC
        self._sealed = _SEALED.labels(self._profile.scheme)

    async def receive(self, message: OpenCard) -> SealedCard:
        """Open one card and seal it under the active data key."""
        dukpt = self._held(message) or await self._load(message)
        try:
            found = self._verified(dukpt, message)
            sealed = self._reseal(dukpt, message, found)
        except InputError as error:
            _REFUSED.labels(error.code).inc()
            raise
        self._sealed.inc()
        return sealed

    async def on_passivate(self) -> None:
        """Forget the keys."""
        self._forget()

    def _held(self, message: OpenCard) -> Dukpt | None:
        """The device's keys, unless it has been given another initial key since."""
        if self._loaded_for != (message.key_set, message.initial_ksn):
            self._forget()
        return self._dukpt

    def _forget(self) -> None:
        if self._dukpt is not None:
            self._dukpt.forget()
            self._dukpt = None
        self._loaded_for = None

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
        reader = readers.READERS.get(found.reader)
        if reader is None:
            # A newer node may have imported a key set for a reader that this one does not know.
            log.error("reader_unknown", key_set=message.key_set, reader=found.reader)
            raise InternalError("The key set's reader is not known here.")
        self._reader = reader
        self._profile = found.profile
        key_id = initial_key_id(self._profile.scheme, message.initial_ksn)
        self._dukpt = Dukpt(self._profile, found.key, key_id)
        self._loaded_for = (message.key_set, message.initial_ksn)
        self._sealed = _SEALED.labels(self._profile.scheme)
        return self._dukpt

    def _verified(self, dukpt: Dukpt, message: OpenCard) -> readers.Unwrapped:
        """What the reader's envelope holds, once its MAC is known to be good."""
        if message.mac is None and self._profile.mac == "required":
            raise InputError("the key set requires a MAC", code="MAC_INVALID")
        found = readers.unwrap(self._reader, message.format, message.data)
        if message.mac is not None and not dukpt.verify_mac(
            message.counter, found.under_mac(), message.mac
        ):
            raise InputError("the MAC does not verify", code="MAC_INVALID")
        return found

    def _reseal(self, dukpt: Dukpt, message: OpenCard, found: readers.Unwrapped) -> SealedCard:
        pieces: list[cards.Piece] = []
        try:
            for form, ciphertext in found.ciphertexts:
                pieces.append(cards.Piece(form, _decrypted(dukpt, message.counter, ciphertext)))
            card = cards.read(
                pieces,
                beside=found.beside,
                masked=found.masked,
                keep_sensitive=message.keep_sensitive,
            )
        finally:
            for piece in pieces:
                wipe(piece.clear)
        try:
            return self._sealed_card(card, message)
        finally:
            card.wipe()

    def _sealed_card(self, card: cards.Card, message: OpenCard) -> SealedCard:
        version, sealer = self._active_key()
        return SealedCard(
            brand=card.brand,
            bin=card.bin,
            last4=card.last4,
            exp_month=card.exp_month,
            exp_year=card.exp_year,
            fingerprint=self._fingerprint(message.merchant_id, card.pan),
            ciphertext=_sealed_and_wiped(
                sealer, pack(card), associated_data(message.token, version)
            ),
            sensitive_ciphertext=_sealed_and_wiped(
                sealer, pack_sensitive(card), sensitive_associated_data(message.token, version)
            )
            if card.track2 is not None or card.emv is not None
            else None,
            key_version=version,
        )

    def _fingerprint(self, merchant_id: UUID, pan: bytearray) -> bytes:
        content = _joined((merchant_id.bytes, pan))
        fingerprint = hmac.digest(self._fingerprint_key, content, "sha256")
        wipe(content)
        return fingerprint


def _decrypted(dukpt: Dukpt, counter: int, ciphertext: bytes) -> bytearray:
    try:
        return dukpt.decrypt(counter, ciphertext)
    except CryptoError as error:
        raise InputError("the padding is not valid", code="DECRYPT_FAILED") from error


def _sealed_and_wiped(sealer: Sealer, clear: bytearray, associated_data: bytes) -> bytes:
    try:
        return sealer.seal(clear, associated_data=associated_data)
    finally:
        wipe(clear)


def _joined(parts: Iterable[bytes | bytearray | memoryview]) -> bytearray:
    """All of them in one buffer, made at its full size: one that grows leaves copies behind."""
    return bytearray().join(parts)


def pack(card: cards.Card) -> bytearray:
    """What is sealed of a card: a JSON object with the names of the fields to ask for.

    The caller overwrites it. Digits need no escaping, so that the PAN is never a `str`.
    """
    rest = {
        "expiry": card.expiry,
        "cardholder_name": card.cardholder_name,
        "service_code": card.service_code,
    }
    return _joined((b'{"pan":"', card.pan, b'",', memoryview(orjson.dumps(rest))[1:]))


def pack_sensitive(card: cards.Card) -> bytearray:
    """What is sealed of a card's sensitive authentication data: `track2`, and `emv` in hex.

    The caller overwrites it. A track has nothing in it that JSON would escape.
    """
    emv = None if card.emv is None else nibbles(card.emv)
    packed = _joined((b'{"track2":', *_text(card.track2), b',"emv":', *_text(emv), b"}"))
    if emv is not None:
        wipe(emv)
    return packed


def _text(value: bytearray | None) -> tuple[bytes | bytearray, ...]:
    return (b"null",) if value is None else (b'"', value, b'"')


def associated_data(token: str, key_version: str) -> bytes:
    """Binds a ciphertext to its row and key version, so that rows cannot be swapped (spec 4)."""
    return f"payment-token|card|{token}|{key_version}".encode()


def sensitive_associated_data(token: str, key_version: str) -> bytes:
    """As `associated_data`, for the sensitive authentication data: the two do not stand in for
    each other either.
    """
    return f"payment-token|sensitive|{token}|{key_version}".encode()


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
