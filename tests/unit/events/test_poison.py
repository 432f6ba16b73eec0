"""Events that nobody can read: they are given up without holding up those that can be."""

import asyncio
from typing import Any, cast

from glamd.errors import UnavailableError
from glamd.events.dead_letters import DeadLetters
from glamd.events.handling import Handling
from glamd.events.message import Message
from glamd.events.schemas import MatchCompleted
from glamd.events.subscription import Subscription

POISON = 1000


class Letters:
    """Keeps letters in a moment; the first `failing` of them not, since the pool was waited for."""

    def __init__(self, failing: int = 0) -> None:
        self.failing = failing
        self.kept = self.at_once = self.most_at_once = 0

    async def keep(self, **_letter: Any) -> int:
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        for _ in range(3):
            await asyncio.sleep(0)
        self.at_once -= 1
        if self.failing:
            self.failing -= 1
            raise UnavailableError("The database is not there.")
        self.kept += 1
        return self.kept


def poison(answers: list[bytes]) -> Message:
    def send(_reply: str, word: bytes) -> None:
        answers.append(word)

    return Message(MatchCompleted.SUBJECT, "$JS.ACK.s.c.1.1.1.1.0", b"no event", b"", send)


async def _buried(letters: Letters) -> tuple[Handling, list[bytes]]:
    async def handler(_event: Any) -> None:
        raise AssertionError("no event is handled here")

    handling = Handling(
        Subscription(MatchCompleted, handler),
        cast("DeadLetters", letters),
        retry_delays_s=(1.0,),
        released=lambda: None,
    )
    answers: list[bytes] = []
    for _ in range(POISON):
        handling.take(poison(answers))
    assert await handling.finish(10.0) == 0
    return handling, answers


async def test_once_dead_letters_can_be_kept_again_nobody_waits_any_longer() -> None:
    handling, answers = await _buried(Letters(failing=27))
    assert answers.count(b"+TERM") == POISON - 27
    # The pause before the next fetch is five seconds as long as this is not nought.
    assert handling.failing == 0


async def test_a_flood_of_poison_leaves_connections_for_everybody_else() -> None:
    letters = Letters()
    await _buried(letters)
    assert letters.kept == POISON
    assert letters.most_at_once <= 16
