"""`make faults`: every fault run, its seed printed, its rows written to `bench/RESULTS.md`."""

import argparse
import secrets
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import report
from bench.report import Result
from tests.faults import (
    audit_size,
    deliveries,
    kill_daemon,
    kill_money,
    ledger_model,
    memory_search,
    nats_faults,
    replay,
    restart_postgres,
    rotation,
    schemathesis_run,
    slow_database,
)

ROUNDS = 50
RESTARTS = 10
REPLAYED = 1000
CASES = 1000
EVENTS = 10_000
EXAMPLES = 1000
TOKENS = 1_000_000
AUDIT_ROWS = 10_000_000


def main() -> int:
    """Run what was asked for; 1 when a row does not hold."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="kills of the daemon")
    parser.add_argument("--restarts", type=int, default=RESTARTS, help="of PostgreSQL and of NATS")
    parser.add_argument("--events", type=int, default=EVENTS, help="delivered one to three times")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of the ledger's model")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="under the key that rotates")
    parser.add_argument("--audit-rows", type=int, default=AUDIT_ROWS, help="to be verified")
    parser.add_argument("--away-s", type=float, default=nats_faults.AWAY_S, help="NATS's absence")
    parser.add_argument("--only", action="append", choices=tuple(_RUNS))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed} (again: python -m tests.faults --seed {chosen.seed})")
    found: list[Result] = []
    for name, run in _RUNS.items():
        if chosen.only is None or name in chosen.only:
            with tempfile.TemporaryDirectory(prefix="glamd-faults-") as folder:
                rows = run(Path(folder), chosen)
            print(report.show(rows), flush=True)
            found += rows
    if chosen.only is None:
        report.write("faults", found)
    return 0 if all(result.holds is not False for result in found) else 1


_Run = Callable[[Path, argparse.Namespace], list[Result]]

_RUNS: dict[str, _Run] = {
    "kill-daemon": lambda folder, chosen: kill_daemon.results(
        folder, rounds=chosen.rounds, seed=chosen.seed
    ),
    "kill-money": lambda folder, chosen: kill_money.results(
        folder, rounds=chosen.rounds, seed=chosen.seed
    ),
    "restart-postgres": lambda folder, chosen: restart_postgres.results(
        folder, rounds=chosen.restarts, seed=chosen.seed
    ),
    "kill-nats": lambda folder, chosen: nats_faults.kill_results(
        folder, rounds=chosen.restarts, seed=chosen.seed
    ),
    "lose-nats": lambda folder, chosen: nats_faults.away_results(
        folder, away_s=chosen.away_s, seed=chosen.seed
    ),
    "deliveries": lambda folder, chosen: deliveries.results(
        folder, events=chosen.events, seed=chosen.seed
    ),
    "slow-database": lambda folder, chosen: slow_database.results(folder, seed=chosen.seed),
    "ledger-model": lambda folder, chosen: ledger_model.results(
        folder, examples=chosen.examples, seed=chosen.seed
    ),
    "replay": lambda folder, _chosen: replay.results(folder, taps=REPLAYED),
    "memory": lambda folder, _chosen: memory_search.results(folder),
    "rotation": lambda folder, chosen: rotation.results(
        folder, rows=chosen.tokens, seed=chosen.seed
    ),
    "audit-size": lambda folder, chosen: audit_size.results(folder, rows=chosen.audit_rows),
    "schemathesis": lambda folder, chosen: schemathesis_run.results(
        folder, cases=CASES, seed=chosen.seed
    ),
}


if __name__ == "__main__":
    sys.exit(main())
