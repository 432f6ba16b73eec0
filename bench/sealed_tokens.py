"""Payment tokens by the million, sealed as the daemon seals them, for what is measured on many.

They are written by COPY, with the data key that the daemon has made, taken from its database and
its KEK file. `open_all` opens every one again, so that nobody has to believe that they still do.
"""

import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import UUID

import asyncpg
import orjson

from glamd.crypto.aead import Sealer
from glamd.keys.providers.local import LocalProvider
from glamd.payments.cipher import associated_data
from glamd.payments.vault import new_token

RING: Final = "payment-tokens"
LIFE: Final = timedelta(days=3)
CHUNK_ROWS: Final = 20_000
COPY_TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """How many tokens opened to their own card, and how many did not, by key version."""

    good: int
    bad: int
    versions: tuple[str, ...]


async def add(
    url: str, kek_file: Path, *, count: int, merchant_id: UUID, device_id: str
) -> list[str]:
    """Add so many tokens; the n-th holds the card `_card(n)`. Returns them in order."""
    connection = await asyncpg.connect(url, command_timeout=COPY_TIMEOUT_S)
    try:
        version, sealer = await _active(connection, kek_file)
        now = datetime.now(UTC)
        tokens: list[str] = []
        for start in range(0, count, CHUNK_ROWS):
            numbers = range(start, min(start + CHUNK_ROWS, count))
            made = [new_token() for _ in numbers]
            async with connection.transaction():
                await connection.copy_records_to_table(
                    "payment_tokens",
                    schema_name="cde",
                    columns=_COLUMNS,
                    records=_metadata(numbers, made, merchant_id, device_id, now),
                )
                await connection.copy_records_to_table(
                    "token_secrets",
                    schema_name="cde",
                    columns=("token", "expires_at", "card_ciphertext", "key_version"),
                    records=_secrets(numbers, made, sealer, version, now + LIFE),
                )
            tokens += made
        await connection.execute("ANALYZE cde.payment_tokens")
        return tokens
    finally:
        await connection.close()


async def open_all(url: str, kek_file: Path, tokens: list[str]) -> Opened:
    """Open every one of `tokens` as `add` returned them, by whatever version it has now."""
    numbers = {token: number for number, token in enumerate(tokens)}
    connection = await asyncpg.connect(url, command_timeout=COPY_TIMEOUT_S)
    good = 0
    keys: dict[str, Sealer] = {}
    try:
        async with connection.transaction():
            cursor = connection.cursor(
                "SELECT token, card_ciphertext, key_version FROM cde.token_secrets",
                prefetch=CHUNK_ROWS,
            )
            async for token, ciphertext, version in cursor:
                number = numbers.get(token)
                if number is None:
                    continue
                if version not in keys:
                    keys[version] = await _key(url, kek_file, version)
                clear = keys[version].open_sealed(
                    ciphertext, associated_data=associated_data(token, version)
                )
                good += orjson.loads(clear) == _card(number)
    finally:
        await connection.close()
    return Opened(good=good, bad=len(tokens) - good, versions=tuple(keys))


def pan_of(number: int) -> str:
    """The PAN of the n-th token."""
    return str(_card(number)["pan"])


async def _active(connection: asyncpg.Connection, kek_file: Path) -> tuple[str, Sealer]:
    version = await connection.fetchval(
        "SELECT version FROM cde.encryption_keys WHERE keyring = $1 AND status = 'active'", RING
    )
    return version, await _sealer(connection, kek_file, version)


async def _key(url: str, kek_file: Path, version: str) -> Sealer:
    connection = await asyncpg.connect(url)
    try:
        return await _sealer(connection, kek_file, version)
    finally:
        await connection.close()


async def _sealer(connection: asyncpg.Connection, kek_file: Path, version: str) -> Sealer:
    wrapped = await connection.fetchval(
        "SELECT wrapped_key FROM cde.encryption_keys WHERE keyring = $1 AND version = $2",
        RING,
        version,
    )
    provider = LocalProvider(kek_file)
    return Sealer(await provider.unwrap(wrapped, context=f"{RING}:{version}"))


_COLUMNS: Final = (
    *("token", "merchant_id", "device_id", "brand", "bin", "last4", "exp_month", "exp_year"),
    *("fingerprint", "entry_mode", "created_at", "expires_at"),
)


def _metadata(
    numbers: range, tokens: list[str], merchant_id: UUID, device_id: str, now: datetime
) -> Iterator[tuple[object, ...]]:
    for number, token in zip(numbers, tokens, strict=True):
        pan = pan_of(number)
        mark = hmac.digest(b"not the daemon's", pan.encode(), "sha256")
        yield (
            *(token, merchant_id, device_id, "visa", pan[:8], pan[-4:], 12, 2049),
            *(mark, "chip", now, now + LIFE),
        )


def _secrets(
    numbers: range, tokens: list[str], sealer: Sealer, version: str, expires_at: datetime
) -> Iterator[tuple[object, ...]]:
    for number, token in zip(numbers, tokens, strict=True):
        clear = orjson.dumps(_card(number))
        bound = associated_data(token, version)
        yield token, expires_at, sealer.seal(clear, associated_data=bound), version


def _card(number: int) -> dict[str, str | None]:
    """A card of no issuer's, with a good check digit, another one for each number."""
    body = f"400000{number:09d}"
    doubled = sum(sum(divmod(int(digit) * 2, 10)) for digit in body[::-2])
    check = -(doubled + sum(int(digit) for digit in body[-2::-2])) % 10
    return {
        "pan": f"{body}{check}",
        "expiry": "4912",
        "cardholder_name": "CARD/BENCH",
        "service_code": "201",
    }
