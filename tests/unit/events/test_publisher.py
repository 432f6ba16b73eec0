"""The order of a merchant's events under a server that answers as it likes, or not at all."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.events import publisher
from glamd.events.bus import BusLostError
from glamd.events.message import Message
from glamd.events.publisher import Outcome, Publisher
from glamd.events.store import OutboxRow

AT = datetime(2025, 11, 12, tzinfo=UTC)
ACK = b'{"stream":"GLAM_EVENTS","seq":1}'
FULL = b'{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"}}'


class ScriptedLink:
    """A link whose other end does as the test says with each message that is sent."""

    def __init__(self, server: Callable[["ScriptedLink", str, str], None]) -> None:
        self.server = server
        self.max_payload_bytes = 1000
        self.is_lost = False
        self.is_full = False
        self.sent: list[str] = []
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_message: Any = None

    def inbox(self) -> str:
        return "_INBOX.x"

    async def subscribe(self, _subject: str, on_message: object) -> None:
        self.on_message = on_message

    async def relief(self) -> None:
        await asyncio.sleep(0)

    def send_built(self, _subject: str, _headers: bytes, body: bytes, *, reply: str) -> None:
        if self.lost.done():
            raise BusLostError("lost")
        event_id = orjson.loads(body)["event_id"]
        self.sent.append(event_id)
        self.server(self, event_id, reply)

    async def until(self, future: asyncio.Future[None], *, timeout_s: float) -> None:
        await asyncio.wait(
            (future, self.lost), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not future.done():
            raise BusLostError("lost") if self.lost.done() else TimeoutError

    def answer(self, reply: str, data: bytes, block: bytes = b"") -> None:
        """Answer a message, in a moment."""
        message = Message(reply, "", data, block, _nothing_more)
        asyncio.get_running_loop().call_soon(self.on_message, message)

    def lose(self) -> None:
        """Lose the connection."""
        if not self.lost.done():
            self.lost.set_result(None)


def _nothing_more(_subject: str, _body: bytes) -> None:
    raise AssertionError("nobody answers an answer")


def rows(*merchants: str, subject: str = "evt.x", text: str = "") -> list[OutboxRow]:
    """A row for each, whose event id is its merchant and its number with that merchant."""
    counts: dict[str, int] = defaultdict(int)
    made = []
    for n, merchant in enumerate(merchants, 1):
        counts[merchant] += 1
        event_id = f"{merchant}{counts[merchant]}"
        made.append(OutboxRow(n, event_id, subject, merchant, "c", f'{{"t":"{text}"}}', AT))
    return made


async def send(link: ScriptedLink, batch: list[OutboxRow]) -> Outcome:
    """Send a batch over the link."""
    made = await Publisher.on(link)  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        return await made.send(batch)


def codes(outcome: Outcome) -> dict[str, tuple[str, bool]]:
    """The failures by event."""
    return {each.row.event_id: (each.code, each.lasting) for each in outcome.failures}


async def test_the_next_event_of_a_merchant_leaves_after_the_answer_to_the_one_before() -> None:
    replies: dict[str, str] = {}
    link = ScriptedLink(lambda _link, event_id, reply: replies.update({event_id: reply}))
    made = await Publisher.on(link)  # type: ignore[arg-type]
    sending = asyncio.create_task(made.send(rows("a", "a", "b", "a", "c")))
    await asyncio.sleep(0)
    assert link.sent == ["a1", "b1", "c1"]
    for event_id in ("b1", "a1", "c1", "a2", "a3"):
        link.answer(replies[event_id], ACK)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    outcome = await asyncio.wait_for(sending, 10)
    assert link.sent == ["a1", "b1", "c1", "a2", "a3"]
    assert sorted(outcome.acked) == [1, 2, 3, 4, 5]
    assert (outcome.failures, outcome.lost) == ([], False)


async def test_behind_a_refused_event_nothing_of_its_merchant_is_sent() -> None:
    def server(link: ScriptedLink, event_id: str, reply: str) -> None:
        link.answer(reply, FULL if event_id == "a2" else ACK)

    link = ScriptedLink(server)
    outcome = await send(link, rows("a", "b", "a", "a", "b"))
    assert link.sent == ["a1", "b1", "a2", "b2"]
    assert sorted(outcome.acked) == [1, 2, 5]
    assert codes(outcome) == {"a2": ("JETSTREAM_10077", False)}


async def test_without_a_stream_every_merchant_fails_once() -> None:
    def server(link: ScriptedLink, _event_id: str, reply: str) -> None:
        link.answer(reply, b"", b"NATS/1.0 503\r\n\r\n")

    outcome = await send(ScriptedLink(server), rows("a", "a", "b"))
    assert codes(outcome) == {"a1": ("NO_STREAM", False), "b1": ("NO_STREAM", False)}


async def test_what_can_never_be_sent_is_told_and_not_sent() -> None:
    def server(link: ScriptedLink, _event_id: str, reply: str) -> None:
        link.answer(reply, ACK)

    link = ScriptedLink(server)
    large = rows("a", text="x" * 2000)
    bad = rows("b", subject="evt.*")
    outcome = await send(link, [*large, *bad, *rows("c", "a", "b")])
    assert link.sent == ["c1"]
    assert codes(outcome) == {"a1": ("TOO_LARGE", True), "b1": ("BAD_SUBJECT", True)}


async def test_silence_ends_a_batch_and_late_answers_mean_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publisher, "ACK_TIMEOUT_S", 0.02)
    late: list[str] = []

    def server(link: ScriptedLink, event_id: str, reply: str) -> None:
        if event_id.startswith("a"):
            late.append(reply)
        else:
            link.answer(reply, ACK)

    link = ScriptedLink(server)
    made = await Publisher.on(link)  # type: ignore[arg-type]
    outcome = await made.send(rows("a", "b", "a"))
    assert codes(outcome) == {"a1": ("NO_ACK", False)}
    assert outcome.acked == [2]
    sending = asyncio.create_task(made.send(rows("a", "c")))
    await asyncio.sleep(0)
    link.answer(late[0], ACK)
    outcome = await asyncio.wait_for(sending, 10)
    # The late word was about an earlier attempt, whose row is tried again in any case.
    assert outcome.acked == [2]
    assert codes(outcome) == {"a1": ("NO_ACK", False)}


async def test_a_lost_link_ends_a_batch_at_once_and_keeps_what_is_known() -> None:
    def server(link: ScriptedLink, event_id: str, reply: str) -> None:
        if event_id == "b1":
            link.answer(reply, ACK)
            asyncio.get_running_loop().call_later(0.01, link.lose)

    outcome = await send(ScriptedLink(server), rows("a", "b", "c"))
    assert outcome.lost
    assert outcome.acked == [2]
    assert outcome.failures == []


@pytest.mark.parametrize(
    "word", [b"", b"ok", b"[]", b"null", b'{"seq":1}', b'{"stream":"x"}', b"\xff", b'{"error":1}']
)
async def test_words_of_strangers_are_passed_over(word: bytes) -> None:
    def server(link: ScriptedLink, _event_id: str, reply: str) -> None:
        link.answer(reply, word)
        link.answer("_INBOX.x.999", ACK)
        link.answer("_INBOX.x.", ACK)
        link.answer(reply, ACK)

    outcome = await send(ScriptedLink(server), rows("a", "a"))
    assert outcome.acked == [1, 2]


@given(
    merchants=st.lists(st.sampled_from("abcd"), min_size=1, max_size=30),
    seed=st.integers(0, 2**32),
)
def test_whatever_the_server_does_a_subscriber_who_drops_repeats_sees_the_order(
    merchants: list[str], seed: int
) -> None:
    """Batches are tried until all is acknowledged, over links that break; a taken event's answer
    may get lost, and a refused one was not taken."""
    chance = random.Random(seed)
    stream: list[str] = []

    def server(link: ScriptedLink, event_id: str, reply: str) -> None:
        dice = chance.random()
        if dice < 0.1:
            link.answer(reply, FULL)
        elif dice < 0.15:
            link.lose()  # before it arrives
        else:
            stream.append(event_id)
            if dice < 0.25:
                link.lose()  # before its answer
            else:
                link.answer(reply, ACK)

    async def relay() -> None:
        waiting = rows(*merchants)
        for _ in range(2000):
            if not waiting:
                return
            outcome = await send(ScriptedLink(server), waiting[:10])
            waiting = [row for row in waiting if row.row_id not in outcome.acked]
        raise AssertionError("it never ends")

    asyncio.run(relay())
    seen = list(dict.fromkeys(stream))
    for merchant in set(merchants):
        expected = [row.event_id for row in rows(*merchants) if row.merchant_id == merchant]
        assert [each for each in seen if each[0] == merchant] == expected
