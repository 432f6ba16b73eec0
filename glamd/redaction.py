"""The last line of defence of the logs: whatever looks like a card number or a key is masked.

It makes nothing safe to log. Events are logged by name with ids, never with payloads; this is for
the day when somebody slips, or a library prints what it was given. Pure: values in, values out that
JSON can hold. It errs on the side of masking, and leaves two shapes alone because they are how
everything is found again: a UUID, and a payment token (`ptk_…`, which is worth nothing outside and
serves as an id).

A card number is 12 to 19 digits, single spaces or hyphens allowed between them, with a good check
digit. Where it begins and ends with its group of digits, any number counts; in the middle of a
longer run only a known scheme's number of that scheme's length, since every tenth number has a good
check digit and a run of 24 digits would hardly ever stay readable.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import date
from functools import lru_cache
from itertools import islice
from uuid import UUID

MASK = "[redacted]"
MAX_TEXT_CHARS = 16 * 1024
"""Longer texts are cut: no event needs them, and a line should not fill the journal."""
MAX_RUN_DIGITS = 128
"""Nothing that we log has a number so long; looking for a card in each part of it would cost."""
MAX_DEPTH = 6
MAX_ITEMS = 64

_HIDDEN_NAMES = frozenset(
    {
        "pan", "card_number", "track", "track1", "track2", "track_data", "cvv", "cvv2", "cvc",
        "pin", "pin_block", "password", "passwd", "secret", "authorization", "cookie",
        "plaintext", "clear", "initial_key", "private_key",
    }
)  # fmt: skip
"""Whatever stands under these names is hidden, look as it may."""

_KEYLIKE_NAME = re.compile(
    r"(?:^|[_.-])(?:key|keys|kek|dek|bdk|ik|ipek|secrets?|passwords?|tokens?|jwt|component|"
    r"components|credentials?)(?:$|[_.-])"
)
_UUID_SHAPE = r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"
_IS_UUID = re.compile(_UUID_SHAPE)
_HEX_KEY = re.compile(r"[0-9a-fA-F]{32,}")
_BASE64_KEY = re.compile(r"(?=.*[A-Z])(?=.*[a-z])(?=.*[0-9])[A-Za-z0-9+/_-]{22,}={0,2}")

_RUN = r"[0-9](?:[ -]?[0-9]){11,}"
_MAY_HAVE_RUN = re.compile(r"(?<![0-9])[0-9][0-9 -]{10,}[0-9]")
"""Cheaper than the run itself, since it does not begin again inside of each number."""
_RUN_OR_ID = re.compile(
    rf"(?<![0-9a-fA-F-])(?:{_UUID_SHAPE})(?![0-9a-fA-F-])|ptk_[0-9A-Za-z]+|(?P<run>{_RUN})"
)
_JWT = re.compile(r"eyJ[A-Za-z0-9_-]{6,512}\.[A-Za-z0-9_-]{6,8192}\.[A-Za-z0-9_-]*")
_PEM = re.compile(
    r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----.*?(?:-----END [A-Z ]+-----|\Z)", re.DOTALL
)
_URL_PASSWORD = re.compile(r"(://[^\s:/@]{0,256}):[^\s/]{1,1024}@")
_BEARER = re.compile(r"(\b(?:[Bb]earer|[Bb]asic)) +[^\s\"',]{6,}")
_NAMED = re.compile(
    r"((?:key|secret|password|passwd|token|kek|bdk|dek|ipek|component)s?[\"']?\s{0,3}[=:]\s{0,3}"
    r"b?[\"']?)([A-Za-z0-9+/_=-]{22,})",
    re.IGNORECASE,
)
_DIGITS_AT_END = "0123456789 -"
_MIN_PAN = 10**11
_BYTES = (bytes, bytearray, memoryview)


def redact(name: str, value: object) -> object:
    """The value to log under `name`: None, bool, number, text, list or dict of such."""
    return _value(name.lower(), value, 0)


def redact_text(text: str) -> str:
    """The text with every card number, JWT, private key, password and named key masked."""
    if len(text) > MAX_TEXT_CHARS:
        # A number that the cut would halve goes with the rest: half of it has no check digit.
        kept = text[:MAX_TEXT_CHARS].rstrip(_DIGITS_AT_END)
        return f"{redact_text(kept)}… ({len(text) - len(kept)} more characters)"
    if len(text) < 12:
        return text
    if "eyJ" in text:
        text = _JWT.sub(MASK, text)
    if "PRIVATE KEY" in text:
        text = _PEM.sub(MASK, text)
    if "://" in text:
        text = _URL_PASSWORD.sub(rf"\1:{MASK}@", text)
    if "earer " in text or "asic " in text:
        text = _BEARER.sub(rf"\1 {MASK}", text)
    if "=" in text or ":" in text:
        text = _NAMED.sub(_named, text)
    if _MAY_HAVE_RUN.search(text):
        text = _RUN_OR_ID.sub(_run, text)
    return text


def _value(name: str, value: object, depth: int) -> object:
    if value is None or isinstance(value, bool):
        return value
    kind = _kind_of_name(name)
    text = value if isinstance(value, str) else None
    if kind == "hidden" or (kind == "keylike" and text and looks_like_a_key(text)):
        return MASK
    if text is not None:
        return redact_text(text)
    if isinstance(value, int | float):
        return _number(value, kind)
    if isinstance(value, Mapping | Sequence | AbstractSet) and not isinstance(value, _BYTES):
        return _container(name, value, depth)
    return _other(value)


def _other(value: object) -> str:
    if isinstance(value, _BYTES):
        return f"<{len(value)} bytes>"
    # Dates and UUIDs are easier to read without their constructor's name around them.
    return redact_text(str(value) if isinstance(value, date | UUID) else _shown(value))


def _container(
    name: str, value: Mapping[object, object] | Collection[object], depth: int
) -> object:
    if depth == MAX_DEPTH:
        return "…"
    if isinstance(value, Mapping):
        # What stands inside of something key-like is key-like too, whatever its own name says.
        inherit = f"{name}." if _kind_of_name(name) == "keylike" else ""
        return {
            redact_text(str(key)): _value(inherit + str(key).lower(), item, depth + 1)
            for key, item in islice(value.items(), MAX_ITEMS)
        }
    items = [_value(name, item, depth + 1) for item in islice(value, MAX_ITEMS)]
    more = len(value) - len(items)
    return [*items, f"… ({more} more)"] if more else items


def _shown(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # noqa: BLE001  a repr may raise anything, and a log call must not
        return f"<{type(value).__name__} that cannot be shown>"


@lru_cache(maxsize=1024)
def _kind_of_name(name: str) -> str:
    if name in _HIDDEN_NAMES or name.rpartition(".")[2] in _HIDDEN_NAMES:
        return "hidden"
    return "keylike" if _KEYLIKE_NAME.search(name) else "plain"


def looks_like_a_key(text: str) -> bool:
    """Whether this is hex of 16 bytes or more, or base64 as random as that; ids of ours are not."""
    if len(text) < 22 or text.startswith("ptk_") or _IS_UUID.fullmatch(text):
        return False
    return bool(_HEX_KEY.fullmatch(text) or _BASE64_KEY.fullmatch(text))


def _named(match: re.Match[str]) -> str:
    return match[1] + MASK if looks_like_a_key(match[2]) else match[0]


# ---- card numbers


def _number(value: float, kind: str) -> object:
    if not math.isfinite(value):
        return str(value)
    if -_MIN_PAN < value < _MIN_PAN or not float(value).is_integer():
        return value
    digits = str(int(value))
    redacted = MASK if kind == "keylike" and looks_like_a_key(digits) else redact_text(digits)
    # Beyond 64 bits most readers of JSON lose digits, and orjson refuses them.
    return value if redacted == digits and abs(value) < 2**63 else redacted


def _run(match: re.Match[str]) -> str:
    run = match["run"]
    if run is None:
        return match[0]
    places = [at for at, character in enumerate(run) if character.isdigit()]
    digits = "".join(run[at] for at in places)
    count = len(digits)
    if count > MAX_RUN_DIGITS:
        return MASK
    starts = {i for i in range(count) if i == 0 or places[i] - places[i - 1] > 1}
    ends = {i for i in range(1, count + 1) if i == count or places[i] - places[i - 1] > 1}
    masked = bytearray(count)
    for start in range(count - 11):
        lengths = set(_SCHEME_LENGTHS.get(digits[start : start + 4], ()))
        if start in starts:
            lengths |= {size for size in range(12, 20) if start + size in ends}
        for size in lengths:
            if start + size <= count and _luhn(digits[start : start + size]):
                masked[start : start + size] = b"\x01" * size
    if not any(masked):
        return run
    return _without(run, places, masked)


def _without(run: str, places: list[int], masked: bytearray) -> str:
    """The run with each masked stretch of its digits, and what separates them, replaced."""
    text, at, i = "", 0, 0
    while i < len(places):
        if not masked[i]:
            i += 1
            continue
        text += run[at : places[i]] + MASK
        while i < len(places) and masked[i]:
            i += 1
        at = places[i - 1] + 1
    return text + run[at:]


def _luhn(digits: str) -> bool:
    raw = digits.encode("ascii")
    return (sum(raw[::-2].translate(_VALUE)) + sum(raw[-2::-2].translate(_DOUBLED))) % 10 == 0


_VALUE = bytes((byte - 0x30) % 256 for byte in range(256))
_DOUBLED = bytes((2 * value - 9 if value > 4 else 2 * value) % 256 for value in _VALUE)

_SCHEMES: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (4000, 4999, (13, 16, 19)),
    (5100, 5599, (16,)),
    (2221, 2720, (16,)),
    (3400, 3499, (15,)),
    (3700, 3799, (15,)),
    (3000, 3059, (14, 16)),
    (3600, 3699, (14, 16)),
    (3800, 3999, (14, 16)),
    (3528, 3589, (16,)),
    (6011, 6011, (16, 19)),
    (6440, 6599, (16, 19)),
    (6200, 6299, (16, 17, 18, 19)),
    (8100, 8199, (16, 17, 18, 19)),
    (5000, 5099, (16, 18, 19)),
    (5600, 5899, (16, 18, 19)),
    (6300, 6399, (16, 18, 19)),
    (6700, 6799, (16, 18, 19)),
)
_SCHEME_LENGTHS = {
    str(prefix): lengths for low, high, lengths in _SCHEMES for prefix in range(low, high + 1)
}
