"""What a load's own record says, held against what the database says.

The record is written by another process than the daemon, so it knows what was acknowledged
whatever became of the daemon. Nothing is broken here; the fault runs do that.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

QUERY_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Acknowledged:
    """By (device, id): the requests sent, and the tokens that their answers named."""

    sent: set[tuple[str, str]] = field(default_factory=set)
    tokens: defaultdict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    refused: defaultdict[tuple[str, str], set[str]] = field(
        default_factory=lambda: defaultdict(set)
    )
    replayed: int = 0
    resent: int = 0

    @classmethod
    def read(cls, path: Path) -> "Acknowledged":
        """From a record; a last line that a kill cut short is passed over."""
        found = cls()
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                found._take(json.loads(line))
        return found

    def _take(self, line: dict[str, object]) -> None:
        request = (str(line["device"]), str(line["id"]))
        if line["what"] == "sent":
            self.sent.add(request)
        elif line["what"] == "resent":
            self.resent += 1
        elif line["code"] == "ok":
            self.tokens[request].add(str(line["token"]))
            self.replayed += line["replayed"] is True
        elif not line["retryable"]:
            self.refused[request].add(str(line["code"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What does not add up; all empty or zero is what must be."""

    lost: tuple[str, ...]
    doubled: tuple[str, ...]
    changed: tuple[str, ...]
    refused: tuple[str, ...]
    unanswered: int
    strangers: int
    broken_counters: int

    @property
    def holds(self) -> bool:
        """Whether nothing was lost, doubled, changed or left over."""
        named = (self.lost, self.doubled, self.changed, self.refused)
        return not any(named) and not (self.unanswered or self.strangers or self.broken_counters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What the database has: tokens, stored answers by (device, id), counters that do not agree."""

    tokens: frozenset[str]
    answers: Mapping[tuple[str, str], Mapping[str, object]]
    broken_counters: int


async def judge(found: Acknowledged, database_url: str) -> Verdict:
    """Hold the record against the database as it is now."""
    return held_against(found, await stored(database_url))


def held_against(found: Acknowledged, there: Stored) -> Verdict:
    """Hold the record against what is there.

    lost        tokens that a terminal got and that are not there
    doubled     requests that got two different tokens
    changed     requests whose stored answer is not the one that the terminal got
    refused     requests of honest terminals that ended in an error
    unanswered  requests sent that never had a final answer
    strangers   tokens there that no request of the record explains
    broken      devices whose counters do not agree with their tokens
    """
    known = {token for tokens in found.tokens.values() for token in tokens}
    return Verdict(
        lost=tuple(sorted(known - there.tokens)),
        doubled=tuple(sorted(i for (_, i), tokens in found.tokens.items() if len(tokens) > 1)),
        changed=tuple(
            sorted(
                request[1]
                for request, tokens in found.tokens.items()
                if there.answers.get(request, {}).get("token") not in tokens
            )
        ),
        refused=tuple(sorted(f"{i}: {codes}" for (_, i), codes in found.refused.items())),
        unanswered=len(found.sent - found.tokens.keys() - found.refused.keys()),
        strangers=len(there.tokens - known),
        broken_counters=there.broken_counters,
    )


async def stored(database_url: str) -> Stored:
    """Read what the database has."""
    connection = await asyncpg.connect(database_url, command_timeout=QUERY_TIMEOUT_S)
    try:
        tokens = await connection.fetch("SELECT token FROM cde.payment_tokens")
        answers = await connection.fetch(
            "SELECT scope, key, answer FROM cde.token_idempotency_keys"
        )
        broken = await connection.fetchval(
            "SELECT count(*) FROM cde.device_counters c WHERE token_count <> ("
            " SELECT count(*) FROM cde.payment_tokens t JOIN cde.devices d USING (device_id)"
            " WHERE d.counter_id = c.counter_id)"
            " OR version < token_count"
        )
        return Stored(
            tokens=frozenset(row["token"] for row in tokens),
            answers={(row["scope"], row["key"]): json.loads(row["answer"]) for row in answers},
            broken_counters=broken,
        )
    finally:
        await connection.close()
