"""Detokenizing: workers that look at cards over mutual TLS, each look audited before its answer.

A `glamd dev` of its own, tokens made by its terminals, and one generator in a process of its own,
which asks for another token each time. Beside it, on the same listener by the same generator, the
answer that needs neither a key nor the database: what is left is what a look costs.
`python -m bench.detokenize` prints the figures.
"""

import asyncio
import itertools
import json
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import asyncpg
import uvloop

from bench.harness import DevDaemon
from bench.http import CONNECTIONS, ask_for
from bench.report import Result

TOKENS: Final = 2_000
LOAD_S: Final = 4.0
WARM_UP_S: Final = 1.5
ROUND_S: Final = 5.0
PATIENCE_S: Final = 60.0
BAR_PER_S: Final = 3_000.0
TERMINALS: Final = 20

_BODY: Final = b'{"purpose":"settlement","fields":["pan","expiry"]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """Answers a second, and the p99 with CONNECTIONS at once."""

    per_s: float
    p99_ms: float


def measure(*, seconds: float = ROUND_S) -> list[Result]:
    """Both rates, in one run."""
    with tempfile.TemporaryDirectory(prefix="glamd-bench-") as folder:
        daemon = DevDaemon(Path(folder) / "state")
        daemon.start()
        try:
            _make_tokens(daemon)
            tokens = asyncio.run(_tokens(daemon.text("database", "admin_url")))
            (Path(folder) / "tokens").write_text("\n".join(tokens))
            _round(daemon, Path(folder) / "tokens", WARM_UP_S)
            plain = _round(daemon, None, seconds)
            looks = _round(daemon, Path(folder) / "tokens", seconds)
            rows = asyncio.run(_audit_rows(daemon.text("database", "admin_url")))
        finally:
            daemon.stop()
    if rows < looks.per_s * seconds:
        raise RuntimeError(f"{rows} audit rows are fewer than there were looks")
    return [
        Result(
            name="detokenize, audited",
            value=looks.per_s,
            unit="1/s",
            rival="/healthz of the same listener",
            rival_value=plain.per_s,
            ratio=looks.per_s / plain.per_s,
            bar=f">= {BAR_PER_S:,.0f}/s",
            holds=looks.per_s >= BAR_PER_S,
            note=f"p99 {looks.p99_ms:.1f} ms with {CONNECTIONS} at once; {rows} audit rows",
        )
    ]


def _make_tokens(daemon: DevDaemon) -> None:
    done = daemon.run(
        "glam-terminal",
        "load",
        *("--state-dir", str(daemon.state_dir), "--terminals", str(TERMINALS), "--json"),
        *("--seconds", str(LOAD_S), "--rate", str(int(TOKENS / LOAD_S))),
        timeout_s=PATIENCE_S,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the load failed: {done.stderr}")


async def _tokens(url: str) -> list[str]:
    connection = await asyncpg.connect(url)
    try:
        return [row[0] for row in await connection.fetch("SELECT token FROM cde.payment_tokens")]
    finally:
        await connection.close()


async def _audit_rows(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM cde.decrypt_audit_log WHERE action = 'decrypt'"
        )
        return count
    finally:
        await connection.close()


def _round(daemon: DevDaemon, tokens: Path | None, seconds: float) -> Looked:
    worker = [daemon.text("worker", name) for name in ("url", "ca", "cert", "key")]
    command = [sys.executable, "-m", "bench.detokenize", "load", *worker, str(tokens or "")]
    done = subprocess.run(
        [*command, str(seconds)], stdout=subprocess.PIPE, check=True, timeout=PATIENCE_S
    )
    count, took_s, p99_ms = json.loads(done.stdout)
    return Looked(per_s=count / took_s, p99_ms=p99_ms)


async def _load(worker: Sequence[str], tokens: str, seconds: float) -> None:
    url, ca, cert, key = worker
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(cert, key)
    context.check_hostname = False  # the generator connects to an address
    port = urlsplit(url).port
    assert port is not None
    requests = [b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"]
    if tokens:
        requests = [_request(token) for token in Path(tokens).read_text().splitlines()]  # noqa: ASYNC240 - before anything runs
    await ask_for(seconds, port, itertools.cycle(requests), tls=context)


def _request(token: str) -> bytes:
    head = (
        f"POST /internal/v1/payment-tokens/{token}/decrypt HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(_BODY)}\r\n\r\n"
    )
    return head.encode() + _BODY


def main(arguments: Sequence[str]) -> int:
    """Load, or measure and print."""
    match arguments:
        case ["load", *worker, tokens, seconds]:
            uvloop.run(_load(worker, tokens, float(seconds)))
        case _:
            for row in measure():
                print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
