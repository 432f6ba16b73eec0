"""What the older token service kept, read: its rows, and the tokens that it sealed. Pure.

That service stored base64url of a Fernet token, under a key that it derived from a text. Its rows
are held to the rules that a new token is held to; what is wrong with one is told by field and rule,
never by value, for any of them may hold a secret. Where a row goes, or whether, is `service`'s.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, cast
from uuid import UUID

import orjson
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from glamd.credentials.model import PLATFORMS, TOKEN_TYPES, NewToken, Platform, Secret, TokenType
from glamd.errors import CryptoError, FieldError, InputError
from glamd.ids import as_uuid

ROUNDS: Final = 100_000
SALT: Final = b"token-service-salt"
KEY_BYTES: Final = 32

SEALED_LIMIT: Final = 131_072
"""Characters of a sealed token: more than the clear may have, sealed and wrapped twice."""

SECRET_LIMIT_BYTES: Final = 65_536
SECRET_LIMIT_DEPTH: Final = 16
SCOPES_LIMIT: Final = 256
"""The API's own limits of `token_data` (as compact JSON) and of scopes."""

LIMITS: Final[Mapping[str, int]] = {
    "id": 64,
    "merchant_id": 64,
    "platform_name": 32,
    "platform_shop_id": 255,
    "domain": 253,
    "encrypted_token": SEALED_LIMIT,
    "token_type": 32,
    "expires_at": 64,
    "scopes": 16_384,
    "created_at": 64,
    "updated_at": 64,
    "last_accessed_by": 255,
    "last_accessed_at": 64,
    "access_count": 20,
}
"""Every field of an older row, and how many characters its value may have as text."""

TOO_LARGE: Final = "OLDER_TOKEN_TOO_LARGE"
MALFORMED: Final = "OLDER_TOKEN_MALFORMED"
UNDECRYPTABLE: Final = "OLDER_TOKEN_UNDECRYPTABLE"
NO_OBJECT: Final = "OLDER_TOKEN_NO_OBJECT"

_FERNET_START: Final = b"gAAAAA"
"""How every Fernet token begins: version 0x80, and a time whose upper bytes are 0 until 2106."""

_MOST: Final = 2**63 - 1

_BASE64URL = re.compile(r"[A-Za-z0-9_-]+={0,2}", re.ASCII)
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
# The last label begins with a letter, so that no address passes for a host name.
_DOMAIN = re.compile(rf"(?:{_LABEL}\.)+[A-Za-z](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?")
_SCOPE = re.compile(r"[!-~]{1,255}")

OlderRow = Mapping[str, object]
"""A row as it came, by the names in LIMITS; nothing about it is known yet."""


class OlderKey:
    """The older service's key, ready to open; what it was derived from is not kept."""

    __slots__ = ("_fernet",)

    def __init__(self, text: str) -> None:
        """Derive it from the text of TOKEN_ENCRYPTION_KEY: tens of milliseconds of pure work."""
        kdf = PBKDF2HMAC(algorithm=SHA256(), length=KEY_BYTES, salt=SALT, iterations=ROUNDS)
        self._fernet = Fernet(base64.urlsafe_b64encode(kdf.derive(text.encode())))

    def open(self, stored: str) -> Secret:
        """The token in a stored text: base64url of a Fernet token, or a Fernet token bare.

        Raises `CryptoError` with OLDER_TOKEN_TOO_LARGE, _MALFORMED (neither of the two forms),
        _UNDECRYPTABLE (sealed under another key, or damaged) or _NO_OBJECT (not a JSON object, or
        one that JSON cannot carry on).
        """
        if len(stored) > SEALED_LIMIT:
            raise CryptoError(f"It is longer than {SEALED_LIMIT} characters.", code=TOO_LARGE)
        sealed = _fernet_token(stored)
        try:
            clear = self._fernet.decrypt(sealed)
        except InvalidToken:
            raise CryptoError(
                "It was sealed under another key, or is damaged.", code=UNDECRYPTABLE
            ) from None
        return Secret(_object(clear))

    def __repr__(self) -> str:
        return "<OlderKey, masked>"


@dataclass(frozen=True, slots=True, kw_only=True)
class OlderToken:
    """A row that is whole: a token to be kept, and what the older service knew about it."""

    token_id: UUID
    token: NewToken
    created_at: datetime
    updated_at: datetime
    last_accessed_by: str | None
    last_accessed_at: datetime | None
    access_count: int


def read_row(row: OlderRow, key: OlderKey) -> OlderToken:
    """The token of a row.

    Raises `InputError` with every field that is wrong, or `CryptoError` as `OlderKey.open` where
    nothing is but the sealed token.
    """
    fields = _Fields(row)
    token_id = fields.uuid("id")
    merchant_id = fields.uuid("merchant_id")
    platform = fields.choice("platform_name", PLATFORMS)
    shop_id = fields.text("platform_shop_id")
    domain = fields.domain("domain")
    sealed = fields.text("encrypted_token", check=False)
    token_type = fields.choice("token_type", TOKEN_TYPES)
    expires_at = fields.time("expires_at")
    scopes = fields.scopes("scopes")
    created_at = fields.time("created_at") or fields.missing_time("created_at")
    updated_at = fields.time("updated_at") or created_at
    by = fields.optional_text("last_accessed_by")
    at = fields.time("last_accessed_at")
    count = fields.count("access_count")
    fields.raise_if_wrong()
    return OlderToken(
        token_id=token_id,
        token=NewToken(
            merchant_id=merchant_id,
            platform=cast("Platform", platform),
            platform_shop_id=shop_id,
            domain=domain,
            token_type=cast("TokenType", token_type),
            secret=key.open(sealed),
            scopes=scopes,
            expires_at=expires_at,
        ),
        created_at=created_at,
        updated_at=updated_at,
        last_accessed_by=by,
        last_accessed_at=at,
        access_count=count,
    )


def uuid_of(row: OlderRow, name: str) -> UUID | None:
    """A UUID of a row that may be wrong in any way, for naming the row."""
    value = row.get(name)
    return as_uuid(value) if isinstance(value, str) else None


def platform_of(row: OlderRow) -> Platform | None:
    """The platform of such a row, where it has one that we know."""
    return next((platform for platform in PLATFORMS if platform == row.get("platform_name")), None)


class _Fields:
    """Takes a row's fields one by one and remembers every one that is wrong.

    What a method returns for a wrong field is of the right type and means nothing.
    """

    def __init__(self, row: OlderRow) -> None:
        self._row = row
        self._wrong: list[FieldError] = []

    def raise_if_wrong(self) -> None:
        if self._wrong:
            raise InputError("The row is not as it should be.", fields=self._wrong)

    def text(self, name: str, *, check: bool = True) -> str:
        value = self._row.get(name)
        if value is None or value == "":
            return self._is_wrong(name, "It is missing.")
        if not isinstance(value, str):
            return self._is_wrong(name, "It is no text.")
        # A sealed token that is too long, or has odd characters, is told by who opens it.
        if check and len(value) > LIMITS[name]:
            return self._is_wrong(name, f"It has more than {LIMITS[name]} characters.")
        if check and not value.isprintable():
            return self._is_wrong(name, "It has characters that cannot be shown.")
        return value

    def optional_text(self, name: str) -> str | None:
        return None if self._row.get(name) in (None, "") else self.text(name) or None

    def uuid(self, name: str) -> UUID:
        text = self.text(name)
        found = as_uuid(text)
        if text and found is None:
            self._is_wrong(name, "It is no UUID.")
        return found or UUID(int=0)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        text = self.text(name)
        if text and text not in choices:
            self._is_wrong(name, f"It is none of {', '.join(choices)}.")
        return text

    def domain(self, name: str) -> str:
        text = self.text(name)
        if text and not _DOMAIN.fullmatch(text):
            self._is_wrong(name, "It is no host name with a dot.")
        return text.lower()

    def time(self, name: str) -> datetime | None:
        text = self.optional_text(name)
        if text is None:
            return None
        try:
            found = datetime.fromisoformat(text)
            # The older service wrote UTC, whether or not its column said so.
            return found.replace(tzinfo=found.tzinfo or UTC).astimezone(UTC)
        except (ValueError, OverflowError):
            self._is_wrong(name, "It is no time in the form of ISO 8601.")
            return None

    def missing_time(self, name: str) -> datetime:
        if self._row.get(name) in (None, ""):
            self._is_wrong(name, "It is missing.")
        return datetime.min.replace(tzinfo=UTC)

    def scopes(self, name: str) -> tuple[str, ...]:
        text = self.optional_text(name)
        found = tuple(dict.fromkeys(filter(None, re.split("[ ,]+", text or ""))))
        if len(found) > SCOPES_LIMIT or not all(map(_SCOPE.fullmatch, found)):
            self._is_wrong(name, "It is no list of scopes with blanks or commas between them.")
        return found

    def count(self, name: str) -> int:
        text = self.optional_text(name)
        if text is None:
            return 0
        if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) > _MOST:
            self._is_wrong(name, "It is no count.")
            return 0
        return int(text)

    def _is_wrong(self, name: str, message: str) -> str:
        self._wrong.append(FieldError(name, message))
        return ""


def _fernet_token(stored: str) -> bytes:
    text = stored.strip()
    if text.startswith(_FERNET_START.decode()):
        # It cannot be the outer layer: decoded, these letters begin with the bytes 80 00.
        return _padded(text)
    inner = _unwrapped(text)
    if not inner.startswith(_FERNET_START):
        raise _malformed()
    try:
        return _padded(inner.decode("ascii"))
    except UnicodeDecodeError:
        raise _malformed() from None


def _unwrapped(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(_padded(text))
    except binascii.Error:
        raise _malformed() from None


def _padded(text: str) -> bytes:
    # The standard library's decoder passes over letters that are none of its own.
    if not _BASE64URL.fullmatch(text):
        raise _malformed()
    bare = text.rstrip("=")
    return (bare + "=" * (-len(bare) % 4)).encode()


def _malformed() -> CryptoError:
    return CryptoError("It is not what the older service stored.", code=MALFORMED)


def _object(clear: bytes) -> dict[str, object]:
    """The JSON object of a token, held to what the API holds one to."""
    found, size = _parsed(clear)
    if not isinstance(found, dict) or not found or not _is_plain(found):
        raise CryptoError("What was sealed is no JSON object that can be kept.", code=NO_OBJECT)
    if size > SECRET_LIMIT_BYTES:
        raise CryptoError(
            f"What was sealed is larger than {SECRET_LIMIT_BYTES} bytes.", code=TOO_LARGE
        )
    return found


def _parsed(clear: bytes) -> tuple[object, int]:
    """The value and its size as compact JSON; None where it is none."""
    try:
        # orjson would read a whole number that is too large for it as another number.
        found: object = json.loads(clear)
        return found, len(orjson.dumps(found))
    except (ValueError, TypeError, RecursionError):
        return None, 0


def _is_plain(tree: object) -> bool:
    """Whether its numbers and its depth are such that any JSON library can hold them."""
    level = [tree]
    for _ in range(SECRET_LIMIT_DEPTH):
        inner = [one for outer in level for one in _inside(outer)]
        if any(isinstance(one, int | float) and not -_MOST - 1 <= one <= _MOST for one in inner):
            return False
        level = [one for one in inner if isinstance(one, dict | list)]
    return not level


def _inside(tree: object) -> list[object]:
    if isinstance(tree, dict):
        return list(tree.values())
    return tree if isinstance(tree, list) else []
