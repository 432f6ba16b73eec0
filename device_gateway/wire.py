"""What a terminal and glamd say to each other, as bytes and as objects (spec 2, version 1). Pure.

Decoding is strict: what comes out of here has the right types, lengths and names, and whatever
else comes in leaves as one `WireError` that names the field and never its value. Whether a request
may be served (device, counter, MAC, card) is not asked here. No asyncio, no database, no clock.

Fields that are not known are passed over, so that newer firmware can say more than we understand;
they are not part of the content hash.
"""

import binascii
import hashlib
import json
import re
import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal, NoReturn, cast

import orjson

from glamd.errors import FieldError, InputError
from glamd.payments.model import EntryMode, Format, Scheme

VERSION: Final = 1
REQUEST_LIMIT_BYTES: Final = 16 * 1024
STATUS_LIMIT_BYTES: Final = 1024
ID_LIMIT_CHARS: Final = 64
FIRMWARE_LIMIT_CHARS: Final = 64
DEPTH_LIMIT: Final = 8
AMOUNT_LIMIT_MINOR: Final = 2**53 - 1

WireCode = Literal["MALFORMED", "UNSUPPORTED"]

_SCHEMES: Final[dict[str, Scheme]] = {"tdes-dukpt": "tdes-dukpt", "aes-dukpt": "aes-dukpt"}
_KSN_BYTES: Final[dict[Scheme, int]] = {"tdes-dukpt": 10, "aes-dukpt": 12}
_BLOCK_BYTES: Final[dict[Scheme, int]] = {"tdes-dukpt": 8, "aes-dukpt": 16}
_MAC_BYTES: Final[dict[Scheme, tuple[int, int]]] = {"tdes-dukpt": (4, 8), "aes-dukpt": (8, 16)}
_FORMATS: Final[dict[str, Format]] = {
    "track2": "track2",
    "track1": "track1",
    "emv-tlv": "emv-tlv",
    "pan": "pan",
    "json": "json",
}
_ENTRY_MODES: Final[dict[str, EntryMode]] = {
    "magstripe": "magstripe",
    "chip": "chip",
    "contactless": "contactless",
    "manual": "manual",
}
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_RFC_3339: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_KNOWN_FIELDS: Final = frozenset(
    {
        *("v", "id", "type", "ksn", "data", "scheme", "format", "entry_mode", "mac", "amount"),
        *("at", "state", "firmware", "battery"),
    }
)
_HASHED_LENGTHS: Final = struct.Struct(">7I")
_HASH_DOMAIN: Final = b"glamd tokenize 1"
_OPEN_TAIL: Final = b',"replayed":false}'
_REPLAYED_TAIL: Final = b',"replayed":true}'


class WireError(InputError):
    """The message is not one we take; `request_id` is its id where that could be read."""

    default_code = "MALFORMED"

    def __init__(self, field: str, why: str, *, code: WireCode, request_id: str | None) -> None:
        message = f"{field} {why}" if field else why
        super().__init__(message, code=code, fields=(FieldError(field, why),) if field else ())
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class Amount:
    """An amount in minor units of an ISO 4217 currency (three capitals)."""

    value_minor: int
    currency: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Tokenize:
    """One encrypted card: `ksn` is 10 (TDES) or 12 (AES) bytes, `data` whole cipher blocks.

    `mac` is 4 or 8 bytes (TDES), 8 or 16 (AES); `content_hash` 32 bytes (`_content_hash`).
    """

    id: str
    ksn: bytes
    data: bytes
    scheme: Scheme
    format: Format
    entry_mode: EntryMode
    mac: bytes | None
    amount: Amount | None
    at: datetime | None
    content_hash: bytes

    def __repr__(self) -> str:
        """The id only: a ciphertext has no business in a log either."""
        return f"Tokenize(id={self.id!r})"


@dataclass(frozen=True, slots=True)
class Ping:
    """Is anybody there?"""

    id: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The device says that it lives."""

    id: str


Request = Tokenize | Ping | Heartbeat


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a device, or its last will, says about itself on its status topic."""

    state: Literal["online", "offline"]
    firmware: str | None
    battery: float | None
    at: datetime | None


class _BadFieldError(Exception):
    """A field is wrong; becomes a WireError once the request's id is known."""

    def __init__(self, field: str, why: str, code: WireCode = "MALFORMED") -> None:
        super().__init__(field, why)
        self.field = field
        self.why = why
        self.code: WireCode = code


def decode_request(payload: bytes) -> Request:
    """The request in `payload`; WireError (`MALFORMED`, `UNSUPPORTED`) for anything else."""
    doc = _parse(payload, REQUEST_LIMIT_BYTES)
    request_id = _id_of(doc)
    try:
        _check_keys(doc, payload)
        return _request(doc, request_id)
    except _BadFieldError as bad:
        if bad.field == "id":
            request_id = None
        _refuse(bad, request_id)


def decode_status(payload: bytes) -> Status:
    """The status in `payload`; WireError (`MALFORMED`) for anything else.

    Only `state` must be there: a last will is written before anybody knows when it will be sent.
    """
    doc = _parse(payload, STATUS_LIMIT_BYTES)
    try:
        _check_keys(doc, payload)
        return _status(doc)
    except _BadFieldError as bad:
        _refuse(bad, None)


def encode_ok(
    request_id: str,
    *,
    token: str,
    brand: str,
    last4: str,
    exp_month: int | None,
    exp_year: int | None,
    expires_at: datetime,
    replayed: bool,
) -> bytes:
    """The answer to a tokenize request that made `token`; `expires_at` aware."""
    return orjson.dumps(
        {
            "v": VERSION,
            "id": request_id,
            "status": "ok",
            "token": token,
            "brand": brand,
            "last4": last4,
            "exp_month": exp_month,
            "exp_year": exp_year,
            "expires_at": expires_at,
            "replayed": replayed,
        },
        option=orjson.OPT_UTC_Z,
    )


def encode_plain_ok(request_id: str) -> bytes:
    """The answer to a ping or a heartbeat."""
    return orjson.dumps({"v": VERSION, "id": request_id, "status": "ok"})


def encode_error(request_id: str | None, code: str, message: str, retryable: bool) -> bytes:
    """An answer that says no; `request_id` None where none could be read."""
    return orjson.dumps(
        {
            "v": VERSION,
            "id": request_id,
            "status": "error",
            "code": code,
            "message": message,
            "retryable": retryable,
        }
    )


def as_replayed(answer: bytes) -> bytes:
    """A stored answer (from `encode_ok` or `encode_error`) in its replayed form."""
    if answer.endswith(_OPEN_TAIL):
        return answer[: -len(_OPEN_TAIL)] + _REPLAYED_TAIL
    doc = cast("dict[str, object]", orjson.loads(answer))
    doc["replayed"] = True
    return orjson.dumps(doc)


def _refuse(bad: _BadFieldError, request_id: str | None) -> NoReturn:
    raise WireError(bad.field, bad.why, code=bad.code, request_id=request_id) from None


def _parse(payload: bytes, limit_bytes: int) -> dict[str, object]:
    if len(payload) > limit_bytes:
        _refuse(_BadFieldError("", f"the message is longer than {limit_bytes} bytes"), None)
    try:
        doc: object = orjson.loads(payload)
    except orjson.JSONDecodeError:
        _refuse(_BadFieldError("", "the message is not JSON"), None)
    if not isinstance(doc, dict):
        _refuse(_BadFieldError("", "the message is not a JSON object"), None)
    return doc


def _check_keys(doc: dict[str, object], payload: bytes) -> None:
    """Refuse what parses but is two messages at once: duplicate keys; and what nests too deep."""
    # Fewer brackets than levels cannot nest too deep: nearly every message is done with here.
    if payload.count(b"{") + payload.count(b"[") > DEPTH_LIMIT and not _shallow(doc, DEPTH_LIMIT):
        raise _BadFieldError("", f"the message nests deeper than {DEPTH_LIMIT} levels")
    # What orjson writes has every key once, so a compact message that is equal to it has no
    # duplicates. Only other spellings (spaces, escapes, floats) pay for the slow look.
    if orjson.dumps(doc) != payload:
        json.loads(payload.decode(), object_pairs_hook=_pairs_once, parse_int=str)


def _pairs_once(pairs: list[tuple[str, object]]) -> None:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _BadFieldError(_shown(twice), "is there twice")


def _shown(name: str) -> str:
    """A field's name for a message: only ours, since an unknown one is the sender's text."""
    return name if name in _KNOWN_FIELDS else "a field"


def _shallow(value: object, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    if levels == 0:
        return False
    inner = value.values() if isinstance(value, dict) else value
    return all(_shallow(each, levels - 1) for each in inner)


def _id_of(doc: dict[str, object]) -> str | None:
    text = doc.get("id")
    # PostgreSQL's text cannot hold U+0000, so an id with it could never be remembered.
    return cast("str", text) if _is_text(text, ID_LIMIT_CHARS) else None


def _is_text(value: object, limit_chars: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= limit_chars and "\0" not in value


def _request(doc: dict[str, object], request_id: str | None) -> Request:
    version = doc.get("v")
    if type(version) is not int:
        raise _BadFieldError("v", "must be a whole number")
    if request_id is None:
        raise _BadFieldError("id", f"must be 1 to {ID_LIMIT_CHARS} characters")
    if version != VERSION:
        # Nothing else of another version can be judged by the rules of this one.
        raise _BadFieldError("v", f"must be {VERSION}", "UNSUPPORTED")
    kind = _text(doc, "type")
    if kind == "tokenize":
        return _tokenize(doc, request_id)
    if kind == "ping":
        return Ping(request_id)
    if kind == "heartbeat":
        return Heartbeat(request_id)
    raise _BadFieldError("type", "is not one that is served here", "UNSUPPORTED")


def _status(doc: dict[str, object]) -> Status:
    state = _text(doc, "state")
    if state not in ("online", "offline"):
        raise _BadFieldError("state", "must be online or offline")
    firmware = doc.get("firmware")
    # An operator's terminal will show it, so nothing that steers a terminal gets in.
    if firmware is not None and not (
        _is_text(firmware, FIRMWARE_LIMIT_CHARS) and cast("str", firmware).isprintable()
    ):
        why = f"must be 1 to {FIRMWARE_LIMIT_CHARS} printable characters"
        raise _BadFieldError("firmware", why)
    return Status(
        state="online" if state == "online" else "offline",
        firmware=cast("str | None", firmware),
        battery=_battery(doc["battery"]) if "battery" in doc else None,
        at=_at(doc["at"]) if "at" in doc else None,
    )


def _tokenize(doc: dict[str, object], request_id: str) -> Tokenize:
    """Every field is judged as far as it can be before an unknown name is: MALFORMED goes first."""
    scheme = _SCHEMES.get(_text(doc, "scheme"))
    form = _FORMATS.get(_text(doc, "format"))
    entry_mode = _ENTRY_MODES.get(_text(doc, "entry_mode"))
    if entry_mode is None:
        raise _BadFieldError("entry_mode", "must be magstripe, chip, contactless or manual")
    ksn = _hex(doc, "ksn", (_KSN_BYTES[scheme],) if scheme else (10, 12))
    data = _base64(doc, "data", _BLOCK_BYTES[scheme] if scheme else 8)
    mac = _hex(doc, "mac", _MAC_BYTES[scheme] if scheme else (4, 8, 16)) if "mac" in doc else None
    amount = _amount(doc["amount"]) if "amount" in doc else None
    at = _at(doc["at"]) if "at" in doc else None
    if scheme is None:
        raise _BadFieldError("scheme", "must be tdes-dukpt or aes-dukpt", "UNSUPPORTED")
    if form is None:
        raise _BadFieldError("format", f"must be one of {', '.join(_FORMATS)}", "UNSUPPORTED")
    return Tokenize(
        id=request_id,
        ksn=ksn,
        data=data,
        scheme=scheme,
        format=form,
        entry_mode=entry_mode,
        mac=mac,
        amount=amount,
        at=at,
        content_hash=_content_hash(
            ksn=ksn,
            data=data,
            scheme=scheme,
            form=form,
            entry_mode=entry_mode,
            mac=mac,
            amount=amount,
        ),
    )


def _text(doc: dict[str, object], field: str) -> str:
    value = doc.get(field)
    if not isinstance(value, str):
        raise _BadFieldError(field, "must be text" if field in doc else "is missing")
    return value


def _hex(doc: dict[str, object], field: str, lengths: tuple[int, ...]) -> bytes:
    text = _text(doc, field)
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    # bytes.fromhex passes over blanks; the contract has none.
    if len(value) not in lengths or len(text) != 2 * len(value):
        raise _BadFieldError(field, f"must be hex of {' or '.join(map(str, lengths))} bytes")
    return value


def _base64(doc: dict[str, object], field: str, block_bytes: int) -> bytes:
    """Its length is bounded by the message's own limit; blanks and spare bits are refused."""
    text = _text(doc, field)
    try:
        value = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise _BadFieldError(field, "must be base64") from None
    # Strict mode still takes "QUJD=" and stray bits behind the last byte.
    if binascii.b2a_base64(value, newline=False) != text.encode("ascii"):
        raise _BadFieldError(field, "must be base64")
    if not value or len(value) % block_bytes:
        raise _BadFieldError(field, f"must be one or more blocks of {block_bytes} bytes")
    return value


def _amount(raw: object) -> Amount:
    if not isinstance(raw, dict):
        raise _BadFieldError("amount", "must be an object with value and currency")
    value = raw.get("value")
    if type(value) is not int or not 0 <= value <= AMOUNT_LIMIT_MINOR:
        raise _BadFieldError("amount.value", "must be a whole number from 0 to 2^53-1")
    currency = raw.get("currency")
    if not isinstance(currency, str) or _CURRENCY.fullmatch(currency) is None:
        raise _BadFieldError("amount.currency", "must be three capital letters (ISO 4217)")
    return Amount(value, currency)


def _at(raw: object) -> datetime:
    why = "must be a time with its offset (RFC 3339)"
    if not isinstance(raw, str) or _RFC_3339.fullmatch(raw) is None:
        raise _BadFieldError("at", why)
    try:
        return datetime.fromisoformat(raw.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise _BadFieldError("at", why) from None


def _battery(raw: object) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not 0 <= raw <= 100:
        raise _BadFieldError("battery", "must be a percentage from 0 to 100")
    return float(raw)


def _content_hash(
    *,
    ksn: bytes,
    data: bytes,
    scheme: Scheme,
    form: Format,
    entry_mode: EntryMode,
    mac: bytes | None,
    amount: Amount | None,
) -> bytes:
    """SHA-256 (32 bytes) over what makes two requests the same (spec 2); `at` is not part of it.

    The lengths of all parts come first, so that no two different contents are one text; the
    spelling of hex and of the JSON is no difference. An absent part is empty, which none can be.
    """
    scheme_name, form_name, mode_name = scheme.encode(), form.encode(), entry_mode.encode()
    seal = mac or b""
    price = b"" if amount is None else b"%d %b" % (amount.value_minor, amount.currency.encode())
    lengths = _HASHED_LENGTHS.pack(
        len(ksn), len(data), len(scheme_name), len(form_name), len(mode_name), len(seal), len(price)
    )
    return hashlib.sha256(
        b"".join((_HASH_DOMAIN, lengths, ksn, data, scheme_name, form_name, mode_name, seal, price))
    ).digest()
