"""Work that is done in rounds, each of a bounded size, as many as it takes up to a limit. Pure."""

from collections.abc import Awaitable, Callable


async def in_rounds(work: Callable[[], Awaitable[int]], *, full: int, most: int) -> int:
    """Do a round after the other until one is not full, at most `most` of them; the sum.

    `work` does a round and says how much it has done, `full` where there may be more. What it
    raises ends the rounds; what was done before stays done.
    """
    done = 0
    for _ in range(most):
        some = await work()
        done += some
        if some < full:
            break
    return done
