"""Reading what `money_judge` holds together: the books, the outboxes, the stream.

By asyncpg and nats-py alone, so that nothing of the daemon's own reading is believed. Nothing is
judged here.
"""

from collections.abc import Mapping
from typing import Any, Final
from uuid import uuid4

import asyncpg
import orjson
from nats.js import api

from tests.faults.money_judge import Balance, Books, Message, Row, Transaction
from tests.support.nats import STREAM, nats_client

QUERY_TIMEOUT_S: Final = 60.0
FETCH_TIMEOUT_S: Final = 20.0
FETCH: Final = 500

_TRANSACTIONS: Final = """
SELECT id::text, merchant_id::text, seq, operation, amount, balance_after, reference_type,
       reference_id
FROM glam.credit_transactions
"""
_BALANCES: Final = """
SELECT merchant_id::text, balance, total_granted, total_consumed FROM glam.credit_accounts
"""
_OUTBOX: Final = """
SELECT 'glam', id, event_id::text, merchant_id::text, subject, correlation_id FROM glam.outbox
UNION ALL
SELECT 'cde', id, event_id::text, merchant_id::text, subject, correlation_id FROM cde.outbox
"""
_DEAD: Final = "SELECT subject || ': ' || reason FROM glam.dead_letters WHERE resolved_at IS NULL"


async def read_books(database_url: str, verified: Mapping[str, Any]) -> Books:
    """What the database has now; `verified` is the answer of `glamctl ledger verify`."""
    connection = await asyncpg.connect(database_url, command_timeout=QUERY_TIMEOUT_S)
    try:
        broken = [f"{each['rule']} of {each['merchant_id']}" for each in verified["broken"]]
        if not verified["ok"] and not broken:
            broken = ["ledger verify is not content"]
        return Books(
            transactions=[Transaction(*row) for row in await connection.fetch(_TRANSACTIONS)],
            balances=[Balance(*row) for row in await connection.fetch(_BALANCES)],
            outbox=[Row(*row) for row in await connection.fetch(_OUTBOX)],
            dead_letters=[str(row[0]) for row in await connection.fetch(_DEAD)],
            broken=broken,
        )
    finally:
        await connection.close()


async def read_stream(nats_url: str) -> list[Message]:
    """All events of ours in the stream, in its order, by a consumer that is gone afterwards."""
    found: list[Message] = []
    async with nats_client(nats_url) as client:
        last = (await client.jsm().stream_info(STREAM)).state.last_seq
        seen = 0
        name = f"judge-{uuid4().hex}"
        jetstream = client.jetstream()
        await client.jsm().add_consumer(
            STREAM,
            api.ConsumerConfig(
                name=name, ack_policy=api.AckPolicy.NONE, inactive_threshold=FETCH_TIMEOUT_S
            ),
        )
        pulled = await jetstream.pull_subscribe_bind(consumer=name, stream=STREAM)
        while seen < last:
            for message in await pulled.fetch(FETCH, timeout=FETCH_TIMEOUT_S):
                seen = message.metadata.sequence.stream
                headers = message.headers or {}
                if headers.get("ce-source") == "glamd":
                    body = orjson.loads(message.data)
                    found.append(
                        Message(
                            headers["Nats-Msg-Id"], body["data"]["merchant_id"], message.subject
                        )
                    )
    return found
