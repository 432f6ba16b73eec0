"""The kernel beside the least that could do the same: a queue, a future and a parked task.

Both sides of a ratio run in the same process, one right after the other, and the best of some
rounds counts, since the machine is shared. `python -m bench.actors` prints the rows.
"""

import asyncio
import gc
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from itertools import cycle
from typing import Final, TypeAlias

import uvloop

from glamd.actor import Actor, ActorSpec, System
from glamd.actor.mailbox import Deadlines

ROUNDS: Final = 5
ASKS: Final = 30_000
IDLE_ACTORS: Final = 100_000
IDLE_TASKS: Final = 10_000
ASK_TIMEOUT_S: Final = 5.0
IDLE_LIMIT_BYTES: Final = 2048

Row: TypeAlias = dict[str, object]
Ask: TypeAlias = Callable[[int], Awaitable[int]]
Question: TypeAlias = tuple[int, asyncio.Future[int]]


class Echo(Actor[int, int]):
    """Answers with its message, so that only the kernel is measured."""

    __slots__ = ("key",)

    def __init__(self, key: str) -> None:
        self.key = key

    async def receive(self, message: int) -> int:
        return message


class Nobody:
    """Whom the time-out is for, where only its cost is measured."""

    def timed_out(self) -> Exception:
        """Never called: every ask here is answered."""
        return TimeoutError()


NOBODY: Final = Nobody()
ECHO: Final[ActorSpec[int, int]] = ActorSpec(kind="echo", factory=Echo, idle_s=3600)


async def echo_queue(queue: asyncio.Queue[Question]) -> None:
    """The rival's worker: no bound, no time-out, no crash, no idleness."""
    while True:
        message, future = await queue.get()
        if not future.done():
            future.set_result(message)


def actor_asks(system: System, count: int) -> Ask:
    """Ask `count` actors in turn."""
    refs = cycle([system.ref(ECHO, str(n)) for n in range(count)])
    return lambda message: next(refs).ask(message, timeout_s=ASK_TIMEOUT_S)


def queue_asks(queues: list[asyncio.Queue[Question]]) -> Ask:
    """Ask the rivals in turn."""
    loop = asyncio.get_running_loop()
    turns = cycle(queues)

    def ask(message: int) -> asyncio.Future[int]:
        future: asyncio.Future[int] = loop.create_future()
        next(turns).put_nowait((message, future))
        return future

    return ask


async def asks_per_s(ask: Ask, in_flight: int) -> float:
    """One round of ASKS asks, so many at a time."""

    async def asker() -> None:
        for n in range(ASKS // in_flight):
            await ask(n)

    began_s = time.perf_counter()
    await asyncio.gather(*(asker() for _ in range(in_flight)))
    return ASKS / (time.perf_counter() - began_s)


async def speed(actors: int, in_flight: int) -> Row:
    """Asks per second through so many actors, beside as many queues with a worker each."""
    system = System()
    queues: list[asyncio.Queue[Question]] = [asyncio.Queue() for _ in range(actors)]
    workers = [asyncio.create_task(echo_queue(queue)) for queue in queues]
    ours, theirs = actor_asks(system, actors), queue_asks(queues)
    value = rival = 0.0
    for _ in range(ROUNDS):
        value = max(value, await asks_per_s(ours, in_flight))
        rival = max(rival, await asks_per_s(theirs, in_flight))
    for worker in workers:
        worker.cancel()
    await system.drain(5)
    return {
        "name": f"asks, {actors} actor(s), {in_flight} in flight",
        "value": round(value),
        "unit": "1/s",
        "rival": f"asyncio.Queue, Future, parked task: {rival:.0f}",
        "ratio": round(value / rival, 2),
    }


async def deadline_cost() -> Row:
    """What the time-out of one answered ask costs, beside a timer of the loop for each."""
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(loop)
    future: asyncio.Future[object] = loop.create_future()

    def ours() -> None:
        bucket = deadlines.bucket(ASK_TIMEOUT_S)
        bucket[future] = NOBODY
        bucket.pop(future, None)

    def theirs() -> None:
        loop.call_later(ASK_TIMEOUT_S, future.cancel).cancel()

    def best_ns(one: Callable[[], None]) -> float:
        rounds_s = []
        for _ in range(ROUNDS):
            began_s = time.perf_counter()
            for _ in range(ASKS):
                one()
            rounds_s.append(time.perf_counter() - began_s)
        return min(rounds_s) / ASKS * 1e9

    value, rival = best_ns(ours), best_ns(theirs)
    return {
        "name": "time-out of an ask",
        "value": round(value),
        "unit": "ns",
        "rival": f"loop.call_later and cancel: {rival:.0f}",
        "ratio": round(value / rival, 2),
    }


async def idle_cost() -> Row:
    """Bytes of an activated actor with nothing to do: instance, key, address and table."""
    system = System()

    async def actors() -> None:
        for n in range(IDLE_ACTORS):
            system.ref(ECHO, f"device-{n:08}").tell(n)
            if n % 1000 == 999:
                await asyncio.sleep(0)

    parked: list[asyncio.Task[None]] = []

    async def tasks() -> None:
        parked.extend(asyncio.create_task(echo_queue(asyncio.Queue())) for _ in range(IDLE_TASKS))

    value = await traced_bytes(actors) / IDLE_ACTORS
    rival = await traced_bytes(tasks) / IDLE_TASKS
    for task in parked:
        task.cancel()
    await asyncio.gather(*parked, return_exceptions=True)
    await system.drain(30)
    return {
        "name": "idle actor",
        "value": round(value),
        "unit": "bytes",
        "rival": f"asyncio.Queue and parked task: {rival:.0f}; bar {IDLE_LIMIT_BYTES}",
        "ratio": round(value / rival, 2),
    }


async def traced_bytes(make: Callable[[], Awaitable[None]]) -> int:
    """Bytes that Python holds more after `make` and the tasks that it started."""
    gc.collect()
    tracemalloc.start()
    try:
        await make()
        await asyncio.sleep(0.1)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


async def _measure() -> list[Row]:
    return [
        await speed(actors=1, in_flight=1),
        await speed(actors=1, in_flight=64),
        await speed(actors=64, in_flight=64),
        await deadline_cost(),
        await idle_cost(),
    ]


def measure() -> list[Row]:
    """All rows: name, value, unit, rival, ratio (of value to rival)."""
    return uvloop.run(_measure())


if __name__ == "__main__":
    for row in measure():
        print(
            f"{row['name']:32}{row['value']:>10} {row['unit']:6}{row['ratio']:>6}  {row['rival']}"
        )
