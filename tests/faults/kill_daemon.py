"""kill -9 of the daemon under load: nothing acknowledged is lost, nothing happens twice.

`glam-terminal load` runs beside it with a record of its own and resends what was not answered; the
daemon is killed at moments drawn from the seed and started again on the same port.
"""

import asyncio
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from bench.harness import DevDaemon
from bench.report import Result
from tests.faults.ledger_of_load import Acknowledged, Verdict, judge

TERMINALS = 20
SETTLE_TIMEOUT_S = 120.0
LIFE_LIMIT_S = 1.5
"""A daemon under load lives at most so long before it is killed."""
ROUND_S = 4.0
"""What the load reckons with for each life and the start after it."""
READY_BAR_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KillReport:
    """What a run of kills left behind; `ready_s` is how long each restart took."""

    verdict: Verdict
    ready_s: tuple[float, ...]
    tokens: int
    replayed: int
    load_output: str


def kill_under_load(
    folder: Path,
    *,
    rounds: int,
    seed: int,
    rate_per_s: int = 300,
    terminals: int = TERMINALS,
    round_s: float = ROUND_S,
    life_limit_s: float = LIFE_LIMIT_S,
) -> KillReport:
    """Kill the daemon `rounds` times while terminals tap, and judge what is left."""
    chance = random.Random(seed)
    state_dir = folder / "state"
    record = folder / "record.jsonl"
    daemon = DevDaemon(state_dir)
    daemon.start()
    load = None
    try:
        load = _load(
            daemon,
            record,
            seed=seed,
            rate=rate_per_s,
            terminals=terminals,
            seconds=rounds * round_s,
        )
        ready_s = []
        for _ in range(rounds):
            _until_it_grows(record, load)
            time.sleep(chance.uniform(0.1, life_limit_s))
            daemon.kill9()
            ready_s.append(daemon.start())
        output, _ = load.communicate(timeout=rounds * round_s + SETTLE_TIMEOUT_S)
        found = Acknowledged.read(record)
        verdict = asyncio.run(judge(found, daemon.text("database", "url")))
        return KillReport(
            verdict=verdict,
            ready_s=tuple(ready_s),
            tokens=len(found.tokens),
            replayed=found.replayed,
            load_output=output,
        )
    finally:
        if load is not None and load.poll() is None:
            load.kill()
            load.wait()
        daemon.stop()


def results(folder: Path, *, rounds: int, seed: int) -> list[Result]:
    """The rows of the report."""
    report = kill_under_load(folder, rounds=rounds, seed=seed)
    slowest_s = max(report.ready_s)
    return [
        Result(
            name=f"kill -9 of the daemon under load, {rounds} times",
            value=len(report.verdict.lost) + len(report.verdict.doubled),
            unit="lost or doubled",
            bar="0",
            holds=report.verdict.holds,
            note=f"{report.tokens:,} tokens, {report.replayed} answered again, seed {seed}",
        ),
        Result(
            name="ready again after kill -9, slowest",
            value=slowest_s,
            unit="s",
            bar="≤ 5 s",
            holds=slowest_s <= READY_BAR_S,
        ),
    ]


def _load(daemon: DevDaemon, record: Path, **options: float) -> subprocess.Popen[str]:
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(
        daemon.command(
            "glam-terminal",
            "load",
            *("--json", "--state-dir", str(daemon.state_dir), "--record", str(record)),
            *arguments,
        ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _until_it_grows(record: Path, load: subprocess.Popen[str]) -> None:
    """Wait until the load has written something new, so that each kill hits a daemon at work.

    Where restarts took so long that it is through already, there is nothing to wait for.
    """
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    size_bytes = record.stat().st_size if record.exists() else 0
    while load.poll() is None and not _is_larger(record, size_bytes):
        if time.monotonic() > deadline_s:
            raise TimeoutError("the load does not get through")
        time.sleep(0.01)


def _is_larger(record: Path, size_bytes: int) -> bool:
    return record.exists() and record.stat().st_size > size_bytes
