"""Re-encryption: a data key rotated under tokens that are there, alone and while cards are tapped.

A `glamd dev` of its own with so many tokens written into its database, and `glamctl keys`, as an
operator has it. What it is held against is the same work without a database: opening and sealing
in one process. `python -m bench.reencryption` prints the rows; a million of them, with the daemon
killed in between, are `make faults`' part.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from bench import sealed_tokens
from bench.harness import DevDaemon
from bench.report import Result
from bench.sealed_tokens import RING
from glamd.crypto.aead import Sealer

ROWS: Final = 200_000
TERMINALS: Final = 20
TAPS_PER_S: Final = 300
MEASURED_S: Final = 8.0
WARM_UP_S: Final = 2.0
POLL_S: Final = 0.2
FINISH_TIMEOUT_S: Final = 300.0
PATIENCE_S: Final = 60.0
BARE_ROWS: Final = 20_000
RATE_BAR: Final = 20_000.0
P99_BAR: Final = 2.0


def measure(*, rows: int = ROWS) -> list[Result]:
    """Rotate twice: under traffic, and alone."""
    with tempfile.TemporaryDirectory(prefix="glamd-bench-") as folder:
        daemon = DevDaemon(Path(folder) / "state")
        daemon.start()
        try:
            asyncio.run(
                sealed_tokens.add(
                    daemon.text("database", "admin_url"),
                    daemon.state_dir / "kek",
                    count=rows,
                    merchant_id=UUID(daemon.text("merchant_id")),
                    device_id="dev_of_the_bench",
                )
            )
            _taps(daemon, WARM_UP_S)
            before_ms = _taps(daemon, MEASURED_S)
            _rotate(daemon)
            during_ms = _taps(daemon, MEASURED_S)
            under_traffic = _finished(daemon)
            _rotate(daemon)
            alone = _finished(daemon)
        finally:
            daemon.stop()
    bare = _bare_per_s()
    return [
        Result(
            name=f"re-encryption of {rows:,} tokens, no traffic",
            value=alone,
            unit="rows/s",
            rival="opening and sealing alone, no database",
            rival_value=bare,
            ratio=alone / bare,
            bar=f">= {RATE_BAR:,.0f} rows/s",
            holds=alone >= RATE_BAR,
        ),
        Result(
            name=f"re-encryption: p99 of taps at {TAPS_PER_S}/s meanwhile",
            value=during_ms,
            unit="ms",
            rival="without",
            rival_value=before_ms,
            ratio=during_ms / before_ms,
            bar=f"<= {P99_BAR:.0f} times",
            holds=during_ms <= P99_BAR * before_ms,
            note=f"{under_traffic:,.0f} rows/s",
        ),
    ]


def _rotate(daemon: DevDaemon) -> None:
    done = daemon.run("glamctl", "--json", "keys", "rotate", RING)
    if done.returncode != 0:
        raise RuntimeError(f"the key does not rotate: {done.stderr}")


def _finished(daemon: DevDaemon) -> float:
    """The job's own rate, once nothing remains."""
    until_s = time.monotonic() + FINISH_TIMEOUT_S
    rate = 0.0
    while time.monotonic() < until_s:
        status: dict[str, Any] = json.loads(
            daemon.run("glamctl", "--json", "keys", "status").stdout
        )[RING]
        rate = status["rate"] or rate
        if status["remaining"] == 0:
            return rate
        time.sleep(POLL_S)
    raise TimeoutError(f"re-encryption does not end: {status}")


def _taps(daemon: DevDaemon, seconds: float) -> float:
    done = daemon.run(
        "glam-terminal",
        "load",
        *("--state-dir", str(daemon.state_dir), "--terminals", str(TERMINALS), "--json"),
        *("--seconds", str(seconds), "--rate", str(TAPS_PER_S)),
        timeout_s=PATIENCE_S,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the load failed: {done.stderr}")
    p99_ms: float = json.loads(done.stdout)["latency_ms"]["p99"]
    return p99_ms


def _bare_per_s() -> float:
    old, new = Sealer(os.urandom(32)), Sealer(os.urandom(32))
    bound = [f"payment-token|card|ptk_{number:026d}|v1".encode() for number in range(BARE_ROWS)]
    sealed = [old.seal(bytes(90), associated_data=each) for each in bound]
    began_s = time.perf_counter()
    for ciphertext, each in zip(sealed, bound, strict=True):
        new.seal(old.open_sealed(ciphertext, associated_data=each), associated_data=each)
    return BARE_ROWS / (time.perf_counter() - began_s)


if __name__ == "__main__":
    for row in measure():
        print(row)
    sys.exit(0)
