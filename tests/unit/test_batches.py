"""Rounds: as many as it takes, no more than allowed, and what was done before an error stays."""

from collections.abc import Iterator

import pytest

from glamd.batches import in_rounds


class Work:
    """Rounds that do so much."""

    def __init__(self, *done: int) -> None:
        self._done: Iterator[int] = iter(done)
        self.rounds = 0

    async def __call__(self) -> int:
        self.rounds += 1
        done = next(self._done, None)
        if done is None:
            raise RuntimeError("there is no further round")
        return done


@pytest.mark.parametrize(
    ("done", "rounds", "total"),
    [((0,), 1, 0), ((4, 9), 1, 4), ((5, 5, 1), 3, 11), ((5, 0), 2, 5), ((5, 5, 5, 5), 3, 15)],
)
async def test_it_goes_on_until_a_round_is_not_full_or_enough_were_done(
    done: tuple[int, ...], rounds: int, total: int
) -> None:
    work = Work(*done)
    assert await in_rounds(work, full=5, most=3) == total
    assert work.rounds == rounds


async def test_what_a_round_raises_ends_it() -> None:
    work = Work(5)
    with pytest.raises(RuntimeError):
        await in_rounds(work, full=5, most=3)
    assert work.rounds == 2
