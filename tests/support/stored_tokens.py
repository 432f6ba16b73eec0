"""Payment tokens put into the tables by SQL, with ciphertexts of the test's choice."""

from datetime import datetime, timedelta
from uuid import UUID, uuid4

from glamd.clock import Clock
from glamd.db import Database
from glamd.payments.life.service import TokenLife
from glamd.payments.tokens import Tokens
from glamd.payments.vault import new_token

DAY = timedelta(days=1)

_TOKEN = """
INSERT INTO cde.payment_tokens (
    token, merchant_id, device_id, brand, bin, last4, fingerprint, entry_mode, has_sensitive_data,
    created_at, expires_at)
VALUES ($1, $2, $3, 'visa', '42424242', '4242', '\\x00', 'chip', $4, $5, $6)
"""
_SECRET = """
INSERT INTO cde.token_secrets (
    token, expires_at, card_ciphertext, sensitive_ciphertext, key_version)
VALUES ($1, $2, $3, $4, 'v1')
"""
_COUNTED = """
UPDATE cde.device_counters SET token_count = token_count + 1
WHERE counter_id = (SELECT counter_id FROM cde.devices WHERE device_id = $1)
"""


def token_life(
    database: Database,
    clock: Clock,
    *,
    default_ttl: timedelta = DAY,
    shred_within: timedelta = DAY,
    keep_metadata: timedelta = 400 * DAY,
) -> TokenLife:
    """The life of tokens on a node; nothing of it runs by itself."""
    return TokenLife(
        database,
        tokens=Tokens(database, clock=clock),
        clock=clock,
        default_ttl=default_ttl,
        shred_within=shred_within,
        keep_metadata=keep_metadata,
    )


async def put_token(
    database: Database,
    merchant_id: UUID,
    *,
    expires_at: datetime,
    card: bytes = b"sealed",
    sensitive: bytes | None = None,
    device_id: str = "dev_1",
) -> str:
    """A token that was made a day before it ends, counted at its device if that is there."""
    token = new_token()
    created_at = expires_at - timedelta(days=1)
    async with database.transaction() as connection:
        await connection.execute(
            _TOKEN, token, merchant_id, device_id, sensitive is not None, created_at, expires_at
        )
        await connection.execute(_SECRET, token, expires_at, card, sensitive)
        await connection.execute(_COUNTED, device_id)
    return token


async def put_merchant(database: Database, *, devices: int = 0) -> UUID:
    """A merchant with devices called `dev_1` and so on, on the key set `set`."""
    merchant_id = uuid4()
    await database.execute("INSERT INTO cde.merchants (merchant_id) VALUES ($1)", merchant_id)
    await database.execute(
        "INSERT INTO cde.key_sets (key_set, scheme, data_usage, padding, mac, wrapped_bdk,"
        " provider, kcv) VALUES ('set', 'tdes-dukpt', 'data', 'zero', 'optional', '',"
        " 'local', '000000') ON CONFLICT DO NOTHING"
    )
    for _ in range(devices):
        counter_id = await database.fetchval(
            "INSERT INTO cde.device_counters (initial_key, merchant_id)"
            " VALUES (gen_random_uuid()::text::bytea, $1) RETURNING counter_id",
            merchant_id,
        )
        await database.execute(
            "INSERT INTO cde.devices (device_id, merchant_id, key_set, initial_ksn, counter_id,"
            " certificate_sha256, certificate_expires_at)"
            " VALUES ($1, $2, 'set', '', $3, repeat('0', 64), now())",
            f"dev_{counter_id}",
            merchant_id,
            counter_id,
        )
    return merchant_id
