"""How a platform token's secret is kept: JSON, sealed under a data key and bound to its row.

The associated data names the merchant, the platform, the shop's id and domain, and the key version,
so that a ciphertext that was moved to another row does not open there, nor in its own row once that
names another shop: where a refresh token is sent to follows from the domain or the shop's id. Which
version is active is the keyring's to say.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Protocol, TypeVar
from uuid import UUID

import orjson

from glamd.credentials.model import Platform, Secret
from glamd.db_errors import UnusableKeyError
from glamd.errors import CryptoError
from glamd.keys.keyrings import DataKey, Keyring
from glamd.keys.sealed_rows import resealed

T = TypeVar("T")

_LENGTH_BYTES: Final = 4


class Place(Protocol):
    """What of its row a secret is bound to; a new token and a connection both say it."""

    @property
    def merchant_id(self) -> UUID:
        """Whose."""

    @property
    def platform(self) -> Platform:
        """Where."""

    @property
    def platform_shop_id(self) -> str:
        """The shop's id there."""

    @property
    def domain(self) -> str:
        """The shop's host."""


def seal(keyring: Keyring[DataKey], secret: Secret, place: Place) -> tuple[bytes, str]:
    """The ciphertext and the key version it was sealed with, which belong into one row."""
    key = keyring.active
    associated_data = _bound_to(place, key.version)
    clear = orjson.dumps(secret.data)
    return key.sealer.seal(clear, associated_data=associated_data), key.version


async def open_sealed(
    keyring: Keyring[DataKey], ciphertext: bytes, place: Place, *, key_version: str
) -> Secret:
    """The secret that was sealed for this row.

    CryptoError where the key is gone, or the row is not the one that it was sealed for;
    UnavailableError where the key must be fetched and the database or the provider is away. A key
    that is not in memory costs a connection of the pool: never await this while holding one.
    """
    key = await keyring.version(key_version)
    return open_under(key, ciphertext, place)


def open_under(key: DataKey, ciphertext: bytes, place: Place) -> Secret:
    """`open_sealed` under a key that is at hand already; CryptoError."""
    associated_data = _bound_to(place, key.version)
    clear = key.sealer.open_sealed(ciphertext, associated_data=associated_data)
    try:
        data: object = orjson.loads(clear)
    except orjson.JSONDecodeError:
        data = None  # that error carries what it could not read, and must not travel
    finally:
        clear[:] = bytes(len(clear))
    if not isinstance(data, dict):
        raise CryptoError("what was sealed as a platform token is none")
    return Secret(data)


def reseal(ciphertext: bytes, place: Place, *, old: DataKey, new: DataKey) -> bytes:
    """The same secret under another key; CryptoError where it was not sealed for this row."""
    return resealed(ciphertext, partial(_bound_to, place), old=old, new=new)


async def with_usable_key(keyring: Keyring[DataKey], write: Callable[[], Awaitable[T]]) -> T:
    """What `write` returns, which seals with the active key and commits.

    Where that key was retired by a node whose rotation is not known here yet, the keyring is read
    anew and `write` called once more.
    """
    try:
        return await write()
    except UnusableKeyError:
        await keyring.reload()
        return await write()


def _bound_to(place: Place, key_version: str) -> bytes:
    """Every part behind its length: no two places that differ are ever the same bytes."""
    parts = (
        "platform-token",
        str(place.merchant_id),
        place.platform,
        place.platform_shop_id,
        place.domain,
        key_version,
    )
    encoded = [part.encode() for part in parts]
    return b"".join(len(part).to_bytes(_LENGTH_BYTES) + part for part in encoded)
