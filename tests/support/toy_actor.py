"""A toy actor that does what its messages say, and the stage that sees what it did.

No rule of any real actor is here. The stage holds hand-shakes, so that a test waits for a thing to
have begun instead of for some time to have passed.
"""

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from glamd.actor import Actor
from glamd.errors import GlamError


@dataclass(frozen=True, slots=True)
class Say:
    """Answer with the text."""

    text: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Say that it has begun, and answer with the name once the gate is opened."""

    name: str


@dataclass(frozen=True, slots=True)
class Fail:
    """Raise the exception."""

    error: BaseException


Message = Say | Hold | Fail


class Gate:
    """A place where the toy stops: the test sees it enter, then lets it go on."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()

    async def passage(self) -> None:
        """The toy's side."""
        self.entered.set()
        await self.opened.wait()


@dataclass(slots=True)
class Stage:
    """All toys of one test: what they did, in order, and the gates they stop at."""

    journal: list[str] = field(default_factory=list)
    gates: defaultdict[str, Gate] = field(default_factory=lambda: defaultdict(Gate))
    activation_errors: deque[BaseException] = field(default_factory=deque)
    passivation_errors: deque[BaseException] = field(default_factory=deque)
    held: set[str] = field(default_factory=set)
    made: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Fail the test where two methods of one key overlap, in whatever instance."""
        assert self.inside[key] == 0, f"two at once in {key}"
        self.inside[key] += 1
        try:
            yield
        finally:
            self.inside[key] -= 1

    def toy(self, key: str) -> "Toy":
        """A factory for specs of single messages or of batches."""
        return Toy(key, self)


class Toy(Actor[Message, str]):
    """Does what it is told, and keeps how many messages this instance has had."""

    def __init__(self, key: str, stage: Stage) -> None:
        self.key = key
        self.stage = stage
        self.stage.made[key] += 1
        self.name = f"{key}{stage.made[key]}"
        self.had = 0

    async def on_activate(self) -> None:
        with self.stage.alone(self.key):
            await self._lifetime("activate", self.stage.activation_errors)

    async def receive(self, message: Message) -> str:
        with self.stage.alone(self.key):
            return await self._act(message)

    async def receive_batch(self, messages: Sequence[Message]) -> Sequence[str | GlamError]:
        with self.stage.alone(self.key):
            self.stage.journal.append(f"{self.name} batch of {len(messages)}")
            return [await self._act_or_error(message) for message in messages]

    async def on_passivate(self) -> None:
        with self.stage.alone(self.key):
            await self._lifetime("passivate", self.stage.passivation_errors)

    async def _lifetime(self, what: str, errors: deque[BaseException]) -> None:
        self.stage.journal.append(f"{self.name} {what}")
        if what in self.stage.held:
            await self.stage.gates[what].passage()
        if errors:
            raise errors.popleft()

    async def _act_or_error(self, message: Message) -> str | GlamError:
        try:
            return await self._act(message)
        except GlamError as error:
            return error

    async def _act(self, message: Message) -> str:
        self.had += 1
        match message:
            case Say(text):
                self.stage.journal.append(f"{self.name} {text}")
                return text
            case Hold(name):
                self.stage.journal.append(f"{self.name} holds {name}")
                await self.stage.gates[name].passage()
                self.stage.journal.append(f"{self.name} held {name}")
                return name
            case Fail(error):
                raise error
