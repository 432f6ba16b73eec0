"""What a load of money writes down: what it asked for, and what it was told, outside the daemon.

Lines of JSON, handed to the system before the load does anything else, so that they survive
whatever becomes of daemon, database and bus. Whether what they say is true, is `money_judge`'s.

| `what` | means | fields |
| --- | --- | --- |
| `wanted` | an effect is going to be asked for | `id`, `merchant`, `operation`, `amount`, `kind` |
| `answer` | HTTP answered, or nobody did (`status` 0) | `id`, `status`, `code`, `ms`, … |
| `stored` | JetStream has acknowledged an event | `id` |

`id` is the reference, which is used for one effect only; `kind` its type, and `ways` says how it is
asked for: by HTTP or by an event.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import orjson

Way: TypeAlias = Literal["http", "event"]

RETRYABLE = frozenset({429, 503})
NO_ANSWER = 0
"""The status of a request whose connection was lost, or refused, or silent for too long."""

DONE, INSUFFICIENT = 200, 402


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One effect on one account; the reference is (`kind`, `id`)."""

    id: str
    merchant: str
    operation: Literal["credit", "debit"]
    amount: int
    kind: str
    way: Way


@dataclass(frozen=True, slots=True)
class Told:
    """A success as it was answered: which transaction, and the balance after it."""

    transaction: str
    balance: int


class MoneyRecord:
    """Appends to a file, in whole lines."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)

    def wanted(self, wanted: Wanted) -> None:
        """An effect is going to be asked for, for the first time."""
        self._append(
            {
                "what": "wanted",
                "id": wanted.id,
                "merchant": wanted.merchant,
                "operation": wanted.operation,
                "amount": wanted.amount,
                "kind": wanted.kind,
                "way": wanted.way,
            }
        )

    def answer(
        self, wanted: Wanted, *, status: int, code: str, ms: float, told: Told | None = None
    ) -> None:
        """An HTTP request was answered, or was not."""
        line = {"what": "answer", "id": wanted.id, "status": status, "code": code, "ms": ms}
        if told is not None:
            line |= {"transaction": told.transaction, "balance": told.balance}
        self._append(line)

    def stored(self, wanted: Wanted) -> None:
        """JetStream has the event."""
        self._append({"what": "stored", "id": wanted.id})

    def _append(self, line: Mapping[str, object]) -> None:
        data = memoryview(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        while data:
            data = data[os.write(self._descriptor, data) :]

    def __enter__(self) -> Self:
        """The record itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        os.close(self._descriptor)


@dataclass(slots=True)
class Account:
    """What a record says, by id."""

    wanted: dict[str, Wanted] = field(default_factory=dict)
    done: defaultdict[str, set[Told]] = field(default_factory=lambda: defaultdict(set))
    insufficient: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    refused: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    passing: Counter[str] = field(default_factory=Counter)
    """Answers after which the same was asked again, by code."""

    slowest_ms: float = 0.0
    answers: int = 0

    @classmethod
    def read(cls, path: Path) -> "Account":
        """From a record; a last line that is not whole is passed over."""
        found = cls()
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                found.take(orjson.loads(line))
        return found

    def take(self, line: Mapping[str, Any]) -> None:
        """Count in one line."""
        what, id_ = line["what"], line["id"]
        if what == "wanted":
            self.wanted[id_] = Wanted(**{k: v for k, v in line.items() if k != "what"})
        elif what == "stored":
            self.stored.add(id_)
        else:
            self._answered(id_, line)

    def _answered(self, id_: str, line: Mapping[str, Any]) -> None:
        status = line["status"]
        self.answers += 1
        self.slowest_ms = max(self.slowest_ms, line["ms"])
        if status == DONE:
            self.done[id_].add(Told(line["transaction"], line["balance"]))
        elif status == INSUFFICIENT:
            self.insufficient.add(id_)
        elif status in RETRYABLE or status == NO_ANSWER:
            self.passing[line["code"]] += 1
        else:
            self.refused[id_].add(f"{status} {line['code']}")
