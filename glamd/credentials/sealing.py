"""How a platform token's secret is kept: JSON, sealed under a data key and bound to its row.

The associated data names the merchant, the platform and the key version, so that a ciphertext that
was moved to another row does not open there. Which version is active is the keyring's to say.
"""

from uuid import UUID

import orjson

from glamd.credentials.model import Platform, Secret
from glamd.errors import CryptoError
from glamd.keys.keyrings import DataKey, Keyring


def seal(
    keyring: Keyring[DataKey], secret: Secret, *, merchant_id: UUID, platform: Platform
) -> tuple[bytes, str]:
    """The ciphertext and the key version it was sealed with, which belong into one row."""
    key = keyring.active
    place = _place(merchant_id, platform, key.version)
    return key.sealer.seal(orjson.dumps(secret.data), associated_data=place), key.version


async def open_sealed(
    keyring: Keyring[DataKey],
    ciphertext: bytes,
    *,
    key_version: str,
    merchant_id: UUID,
    platform: Platform,
) -> Secret:
    """The secret that was sealed for this row.

    CryptoError where the key is gone, or the row is not the one that it was sealed for;
    UnavailableError where the key must be fetched and the database or the provider is away. A key
    that is not in memory costs a connection of the pool: never await this while holding one.
    """
    key = await keyring.version(key_version)
    return open_under(key, ciphertext, merchant_id=merchant_id, platform=platform)


def open_under(key: DataKey, ciphertext: bytes, *, merchant_id: UUID, platform: Platform) -> Secret:
    """`open_sealed` under a key that is at hand already; CryptoError."""
    place = _place(merchant_id, platform, key.version)
    clear = key.sealer.open_sealed(ciphertext, associated_data=place)
    try:
        data: object = orjson.loads(clear)
    except orjson.JSONDecodeError:
        data = None  # that error carries what it could not read, and must not travel
    finally:
        clear[:] = bytes(len(clear))
    if not isinstance(data, dict):
        raise CryptoError("what was sealed as a platform token is none")
    return Secret(data)


def _place(merchant_id: UUID, platform: Platform, key_version: str) -> bytes:
    return f"platform-token|{merchant_id}|{platform}|{key_version}".encode()
