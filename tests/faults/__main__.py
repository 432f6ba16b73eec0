"""`make faults`: every fault run, its seed printed, its rows written to `bench/RESULTS.md`."""

import argparse
import secrets
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import report
from bench.report import Result
from tests.faults import kill_daemon, replay, schemathesis_run

ROUNDS = 50
REPLAYED = 1000
CASES = 1000


def main() -> int:
    """Run what was asked for; 1 when a row does not hold."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="kills and restarts")
    parser.add_argument("--only", choices=("kill-daemon", "replay", "schemathesis"))
    chosen = parser.parse_args()
    runs: dict[str, Callable[[Path], list[Result]]] = {
        "kill-daemon": lambda folder: kill_daemon.results(
            folder, rounds=chosen.rounds, seed=chosen.seed
        ),
        "replay": lambda folder: replay.results(folder, taps=REPLAYED),
        "schemathesis": lambda folder: schemathesis_run.results(
            folder, cases=CASES, seed=chosen.seed
        ),
    }
    print(f"seed {chosen.seed} (again: python -m tests.faults --seed {chosen.seed})")
    found: list[Result] = []
    for name, run in runs.items():
        if chosen.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="glamd-faults-") as folder:
                rows = run(Path(folder))
            print(report.show(rows), flush=True)
            found += rows
    if chosen.only is None:
        report.write("faults", found)
    return 0 if all(result.holds is not False for result in found) else 1


if __name__ == "__main__":
    sys.exit(main())
