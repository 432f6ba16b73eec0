"""What something costs beside a plain Python loop of the same run: no seconds, no machine's speed.

For tests that a hostile input costs no more than its length: a quadratic reader takes thousands of
times as many steps as a linear one, so the bounds may be wide.
"""

import time
from collections.abc import Callable

STEPS = 100_000
TURNS = 3


def steps(work: Callable[[], object]) -> float:
    """How many steps of an empty loop take as much processor time as `work`.

    The quickest of some turns of each: what disturbs a turn only makes it slower.
    """

    def loop() -> None:
        for _ in range(STEPS):
            pass

    return min(_processor_s(work) for _ in range(TURNS)) / _step_s(loop)


def _step_s(loop: Callable[[], None]) -> float:
    return min(_processor_s(loop) for _ in range(TURNS)) / STEPS


def _processor_s(work: Callable[[], object]) -> float:
    began_s = time.process_time()
    work()
    return time.process_time() - began_s
