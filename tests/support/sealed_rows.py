"""Sealed rows for tests of keys: payment tokens in `cde.token_secrets` by the thousand, and nodes.

A `Node` is what one daemon has of the keys: keyrings of its own, the job, the operators' commands.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from glamd.clock import Clock, SystemClock
from glamd.db import Database
from glamd.keys.keyrings import AUDIT, PAYMENT_TOKENS, DataKey, Keyrings
from glamd.keys.lifecycle import KeyLife
from glamd.keys.operations import Operations
from glamd.keys.providers.interface import Providers
from glamd.keys.reencryption import Reencryption
from glamd.keys.throttle import Throttle
from glamd.payments.cipher import associated_data, sensitive_associated_data
from glamd.payments.resealing.service import PaymentTokenRows
from glamd.payments.resealing.store import SecretRow

EXPIRES: Final = datetime(2040, 1, 1, tzinfo=UTC)
CARD: Final = b'{"pan":"4111111111111111","expiry":"3012","cardholder_name":"CARD/TEST"}'
SENSITIVE: Final = b"sensitive data"
BATCH: Final = 10_000


@dataclass(slots=True)
class Node:
    """One daemon's keys."""

    database: Database
    keyrings: Keyrings
    job: Reencryption[SecretRow]
    life: KeyLife
    written: list[tuple[str, str, str, str]] = field(default_factory=list)


async def start_node(
    database: Database,
    providers: Providers,
    *,
    clock: Clock | None = None,
    settled_after_s: float = 0.0,
    rows: PaymentTokenRows | None = None,
    rotate_automatically: bool = False,
) -> Node:
    """A node with everything about keys but a watch; what it writes down is in `written`."""
    clock = clock or SystemClock()
    keyrings = await Keyrings.load(database, providers, clock, "v1")
    written: list[tuple[str, str, str, str]] = []

    async def record(*, action: str, subject: str, actor: str, outcome: str) -> None:
        written.append((action, subject, actor, outcome))

    job = Reencryption(
        keyrings.payment_tokens,
        rows or PaymentTokenRows(database),
        throttle=Throttle(clock),
        clock=clock,
        node_id="node",
        settled_after_s=settled_after_s,
        poll_s=0.01,
    )
    life = KeyLife(
        keyrings.all(),
        jobs=(job,),
        operations=Operations(record),
        clock=clock,
        cryptoperiods=dict.fromkeys((PAYMENT_TOKENS, AUDIT), timedelta(days=365)),
        rotate_automatically=rotate_automatically,
    )
    return Node(database, keyrings, job, life, written)


async def seal_tokens(
    database: Database, key: DataKey, count: int, *, start: int = 0, with_sensitive: bool = False
) -> list[str]:
    """Rows of so many tokens, sealed with this key as a node would."""
    names = [f"ptk_{number:026d}" for number in range(start, start + count)]
    for at in range(0, count, BATCH):
        some = names[at : at + BATCH]
        await database.execute(
            "INSERT INTO cde.token_secrets (token, expires_at, card_ciphertext,"
            " sensitive_ciphertext, key_version)"
            " SELECT token, $2, card, sensitive, $5"
            " FROM unnest($1::text[], $3::bytea[], $4::bytea[]) AS n (token, card, sensitive)",
            some,
            EXPIRES,
            [
                key.sealer.seal(CARD, associated_data=associated_data(name, key.version))
                for name in some
            ],
            [
                key.sealer.seal(
                    SENSITIVE, associated_data=sensitive_associated_data(name, key.version)
                )
                if with_sensitive
                else None
                for name in some
            ],
            key.version,
        )
    return names


async def read_token(node: Node, name: str) -> bytes:
    """The card of a token, opened as a reader on this node would."""
    row = await node.database.fetchrow(
        "SELECT card_ciphertext, key_version FROM cde.token_secrets WHERE token = $1", name
    )
    assert row is not None
    key = await node.keyrings.payment_tokens.version(row["key_version"])
    clear = key.sealer.open_sealed(
        row["card_ciphertext"], associated_data=associated_data(name, key.version)
    )
    return bytes(clear)


async def versions_of(database: Database) -> dict[str, int]:
    """How many rows there are of each key version."""
    rows = await database.fetch(
        "SELECT key_version, count(*) FROM cde.token_secrets GROUP BY key_version"
    )
    return {row["key_version"]: row["count"] for row in rows}
