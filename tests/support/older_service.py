"""The older token service as far as its table goes: what it sealed, and the rows around it.

Written from the description of its format and the Fernet specification, and not with the library
that glamd opens it with, so that the two can be held to each other.
"""

import base64
import functools
import hashlib
import hmac
import json
import os
import struct
from typing import Any
from uuid import UUID

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_TEXT = "the older service's key text, of any length"
CANARY = "shpat_older_canary_5f4e3d2c1b0a99887766"
"""Stands in every secret that `row` makes, for a search wherever it must not be."""

TABLE = """
CREATE TABLE platform_tokens (
    id                text PRIMARY KEY,
    merchant_id       text NOT NULL,
    platform_name     text NOT NULL,
    platform_shop_id  text NOT NULL,
    domain            text NOT NULL,
    encrypted_token   text NOT NULL,
    encryption_key_id text NOT NULL DEFAULT 'key-1',
    token_type        text NOT NULL,
    expires_at        timestamptz(3),
    scopes            text,
    last_accessed_by  text,
    last_accessed_at  timestamp(3),
    access_count      integer NOT NULL DEFAULT 0,
    created_at        timestamptz(3) NOT NULL DEFAULT now(),
    updated_at        timestamp(3) NOT NULL,
    UNIQUE (merchant_id, platform_name)
)
"""


@functools.cache
def derived(key_text: str) -> bytes:
    """The Fernet key's 32 bytes: 16 to sign with, 16 to encrypt with."""
    return hashlib.pbkdf2_hmac("sha256", key_text.encode(), b"token-service-salt", 100_000, 32)


def fernet(clear: bytes, key_text: str = KEY_TEXT, *, at: int = 1_700_000_000) -> str:
    """A Fernet token: version, time, IV, AES-128-CBC with PKCS 7, HMAC-SHA-256 over all of it."""
    signing, encrypting = derived(key_text)[:16], derived(key_text)[16:]
    iv = os.urandom(16)
    padding = 16 - len(clear) % 16
    cipher = Cipher(algorithms.AES(encrypting), modes.CBC(iv)).encryptor()
    body = cipher.update(clear + bytes([padding]) * padding) + cipher.finalize()
    signed = b"\x80" + struct.pack(">Q", at) + iv + body
    mac = hmac.digest(signing, signed, "sha256")
    return base64.urlsafe_b64encode(signed + mac).decode()


def sealed(data: object, key_text: str = KEY_TEXT) -> str:
    """What the older service stored for this `token_data`."""
    clear = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(fernet(clear, key_text).encode()).decode()


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A row of the older table that nothing is wrong with, as text."""
    data = {"access_token": f"{CANARY}-{number}", "refresh_token": f"{CANARY}-refresh-{number}"}
    found: dict[str, Any] = {
        "id": str(older_id(number)),
        "merchant_id": str(merchant_id(number)),
        "platform_name": "shopify",
        "platform_shop_id": str(10_000 + number),
        "domain": f"shop-{number}.myshopify.com",
        "token_type": "oauth",
        "expires_at": "2030-01-01T12:00:00.123+00:00",
        "scopes": "read_products,write_orders",
        "created_at": "2024-05-01T08:00:00+00:00",
        "updated_at": "2024-06-01T09:30:00",
        "last_accessed_by": "catalog-service",
        "last_accessed_at": "2024-07-01 10:00:00",
        "access_count": str(number),
    } | changes
    if "encrypted_token" not in found:
        found["encrypted_token"] = sealed(data)
    return found


def older_id(number: int) -> UUID:
    """The id of the older row with this number; their order is not that of the numbers."""
    return UUID(bytes=hashlib.sha256(b"id %d" % number).digest()[:16], version=4)


def merchant_id(number: int) -> UUID:
    """The merchant of the older row with this number."""
    return UUID(bytes=hashlib.sha256(b"merchant %d" % number).digest()[:16], version=4)
