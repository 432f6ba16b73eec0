"""The ledger beside its model, for long: the test of the same name with many more examples.

What the steps are, what the model is and what is compared stands in
`tests/integration/test_ledger_against_a_model.py`. A divergence is shown by hypothesis with the
shortest steps that lead to it, and comes again with the same seed.
"""

import asyncio
from pathlib import Path

import hypothesis
import uvloop
from hypothesis.stateful import run_state_machine_as_test

from bench.report import Result
from glamd.admin import migrate
from glamd.embedded.postgres import EmbeddedPostgres
from tests.integration.test_ledger_against_a_model import STEPS, LedgerMachine, World

SEEDS = 10


def diverges(folder: Path, *, examples: int, seed: int) -> int:
    """How many of ten seeds, with a tenth of the examples each, find a divergence."""
    found = 0
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        postgres = EmbeddedPostgres(folder)
        url = runner.run(postgres.start()).app
        try:
            runner.run(migrate.upgrade(url))
            world = World(url, runner)
            world.run(world.begin())
            try:
                for each in range(seed, seed + SEEDS):
                    found += _diverges(world, examples=max(1, examples // SEEDS), seed=each)
            finally:
                world.run(world.end())
        finally:
            runner.run(postgres.stop())
    return found


def _diverges(world: World, *, examples: int, seed: int) -> bool:
    class BoundMachine(LedgerMachine):
        """The machine in this world."""

        def __init__(self) -> None:
            super().__init__(world)

    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        run_state_machine_as_test(hypothesis.seed(seed)(BoundMachine), settings=settings)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        print(f"  seed {seed}: {type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}")
        return True
    return False


def results(folder: Path, *, examples: int, seed: int) -> list[Result]:
    """The row of the report."""
    found = diverges(folder, examples=examples, seed=seed)
    return [
        Result(
            name=f"ledger against a model, {SEEDS} seeds, {examples:,} examples",
            value=found,
            unit="divergences",
            bar="0",
            holds=found == 0,
            note=f"up to {STEPS} steps each: bursts at two nodes, a third writer, lost questions "
            f"and answers, crashes; seeds {seed} to {seed + SEEDS - 1}",
        )
    ]
