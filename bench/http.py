"""`GET /api/credits` with a JWT: what a request costs that has next to nothing to do.

Ours is the real route over the ledger and PostgreSQL, behind the pipeline that every route has: JWT
verified, ids, security headers, access rule, rate, metrics, access line. The others answer the same
data without looking for it: bare aiohttp, which answers the same bytes and does nothing else, and
FastAPI on uvicorn, which does the rest as its users write it; it is there a second time with a
cache of verified tokens, which they could write too. One generator, in a process of its own, asks
them all in turn, round by round. `python -m bench.http` prints the rows.
"""

import asyncio
import importlib
import json
import logging
import os
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat
from typing import Final, Self, TypeAlias, cast

import uvloop

CONNECTIONS: Final = 32
ROUNDS: Final = 5
ROUND_S: Final = 1.5
WARM_UP_S: Final = 1.0
PATIENCE_S: Final = 30.0
FASTAPI_BAR: Final = 2.0
BARE_BAR: Final = 0.35

NAMES: Final = {
    "glamd": "GET /api/credits",
    "aiohttp": "bare aiohttp",
    "fastapi": "FastAPI on uvicorn",
    "fastapi-cached": "FastAPI on uvicorn, verified tokens cached",
}

Row: TypeAlias = dict[str, str | float | bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one server did in one round: requests a second, its processor time for each, p99."""

    per_s: float
    cpu_us: float
    p99_ms: float


class Asker(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    def __init__(self, requests: Iterator[bytes], latencies_s: list[float]) -> None:
        self._requests = requests
        self._latencies_s = latencies_s
        self._waiting = b""
        self._asked_s = 0.0
        self._transport: asyncio.Transport | None = None
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the first time."""
        # uvloop's transport is no subclass of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Ask again once the answer is whole and a good one."""
        data = self._waiting + data
        end = data.find(b"\r\n\r\n")
        at = data.lower().find(b"content-length: ", 0, end)
        if at < 0 or len(data) < end + 4 + int(data[at + 16 : data.find(b"\r", at)]):
            self._waiting = data
            return
        self._waiting = b""
        if not data.startswith(b"HTTP/1.1 200"):
            self.ended.set_exception(RuntimeError(f"not a good answer: {data[:200]!r}"))
            return
        self._latencies_s.append(time.perf_counter() - self._asked_s)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """It was we who closed it, or the server is broken."""
        if not self.ended.done():
            self.ended.set_result(exc)

    def _ask(self) -> None:
        assert self._transport is not None
        self._asked_s = time.perf_counter()
        self._transport.write(next(self._requests))


async def load(port: int, path: str, bearer: str, seconds: float) -> None:
    """The generator: ask for so long over CONNECTIONS connections, and print what came of it."""
    request = (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n"
        f"Authorization: Bearer {bearer}\r\n\r\n"
    ).encode()
    await ask_for(seconds, port, repeat(request))


async def ask_for(
    seconds: float, port: int, requests: Iterator[bytes], *, tls: ssl.SSLContext | None = None
) -> None:
    """Ask for so long over CONNECTIONS connections; print how often, how long, the p99 in ms."""
    latencies_s: list[float] = []
    loop = asyncio.get_running_loop()
    askers = []
    began_s = time.perf_counter()
    for _ in range(CONNECTIONS):
        transport, asker = await loop.create_connection(
            lambda: Asker(requests, latencies_s), "127.0.0.1", port, ssl=tls
        )
        askers.append((transport, asker))
    ended, _ = await asyncio.wait([asker.ended for _, asker in askers], timeout=seconds)
    for future in ended:
        raise RuntimeError("the server closed a connection") from future.result()
    took_s = time.perf_counter() - began_s
    for transport, _ in askers:
        transport.abort()
    latencies_s.sort()
    p99_ms = latencies_s[len(latencies_s) * 99 // 100] * 1000
    print(json.dumps([len(latencies_s), took_s, p99_ms]))


class Served:
    """A server in a process of its own."""

    def __init__(self, kind: str) -> None:
        command = [sys.executable, "-m", "bench.http", "serve", kind]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._where = self._process.stdout.readline().decode().split()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=PATIENCE_S)

    def round(self, seconds: float) -> Round:
        """Ask it for so long."""
        before_s = self._cpu_s()
        command = [sys.executable, "-m", "bench.http", "load", *self._where, str(seconds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=PATIENCE_S)
        count, took_s, p99_ms = json.loads(done.stdout)
        cpu_us = (self._cpu_s() - before_s) / count * 1e6
        return Round(per_s=count / took_s, cpu_us=cpu_us, p99_ms=p99_ms)

    def _cpu_s(self) -> float:
        with open(f"/proc/{self._process.pid}/stat", encoding="ascii") as file:  # noqa: PTH123
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(*, rounds: int = ROUNDS, seconds: float = ROUND_S) -> list[Row]:
    """Every server in turn, round by round; medians."""
    found: dict[str, list[Round]] = {kind: [] for kind in NAMES}
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(Served(kind)) for kind in NAMES}
        for server in servers.values():
            server.round(WARM_UP_S)
        for _ in range(rounds):
            for kind, server in servers.items():
                found[kind].append(server.round(seconds))
    per_s = {k: statistics.median(r.per_s for r in v) for k, v in found.items()}
    cpu_us = {k: statistics.median(r.cpu_us for r in v) for k, v in found.items()}
    p99_ms = statistics.median(r.p99_ms for r in found["glamd"])
    return [_row(kind, per_s, cpu_us, p99_ms) for kind in NAMES if kind != "glamd"]


def _row(rival: str, per_s: dict[str, float], cpu_us: dict[str, float], p99_ms: float) -> Row:
    ratio = per_s["glamd"] / per_s[rival]
    row: Row = {
        "name": f"{NAMES['glamd']}, beside {NAMES[rival]}",
        "value": per_s["glamd"],
        "unit": "1/s",
        "rival_name": NAMES[rival],
        "rival": per_s[rival],
        "ratio": ratio,
        "note": f"processor {cpu_us['glamd']:.0f} us to {cpu_us[rival]:.0f} us a request"
        f", p99 {p99_ms:.1f} ms with {CONNECTIONS} at once",
    }
    bar = {"aiohttp": BARE_BAR, "fastapi": FASTAPI_BAR}.get(rival)
    if bar is not None:
        row |= {"bar": f">= {bar}", "holds": ratio >= bar}
    return row


def main(arguments: Sequence[str]) -> int:
    """Serve, load, or measure and print."""
    logging.disable(logging.CRITICAL)
    match arguments:
        case ["serve", kind]:
            # Not before it is needed: the generator would wait for all that it imports.
            importlib.import_module("bench.http_servers").serve(kind)
        case ["load", port, path, bearer, seconds]:
            uvloop.run(load(int(port), path, bearer, float(seconds)))
        case _:
            for row in measure():
                print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
