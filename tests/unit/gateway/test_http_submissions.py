"""Requests that come over HTTP, before and behind the session, by a gateway that does as told."""

import asyncio
from typing import cast

import orjson
import pytest

from device_gateway import wire
from device_gateway.gateway import CERTIFICATE_OVER, OTHER_CERTIFICATE, REVOKED, Gateway
from device_gateway.mqtt.gateway import Refusal
from device_gateway.submissions import Submissions
from glamd.errors import ForbiddenError, GlamError, UnavailableError

GOOD = {
    "v": 1,
    "id": "r1",
    "type": "tokenize",
    "ksn": "00" * 12,
    "data": "AAAAAAAAAAAAAAAAAAAAAA==",
    "scheme": "aes-dukpt",
    "format": "track2",
    "entry_mode": "chip",
}


class FakeGateway:
    """Takes note, and answers or fails."""

    def __init__(self, outcome: bytes | GlamError | None = b"{}") -> None:
        self.outcome = outcome
        self.received: list[tuple[str, str, bytes]] = []
        self.refusal_of: Refusal | None = None
        self.asked = asyncio.Event()

    async def admit(self, _device_id: str, _certificate_sha256: str) -> Refusal | None:
        """Say whether it may."""
        return self.refusal_of

    def receive(self, device_id: str, topic: str, payload: bytes) -> asyncio.Future[bytes | None]:
        """Note it; the outcome None is one that does not come."""
        self.received.append((device_id, topic, payload))
        self.asked.set()
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        if isinstance(self.outcome, bytes):
            answer.set_result(self.outcome)
        elif self.outcome is not None:
            answer.set_exception(self.outcome)
        return answer

    def refusal(self, _topic: str, _payload: bytes, error: BaseException) -> bytes:
        """The error's code."""
        assert isinstance(error, GlamError)
        return error.code.encode()


def submissions(gateway: FakeGateway) -> Submissions:
    """Submissions to this gateway."""
    return Submissions(cast("Gateway", gateway))


@pytest.mark.parametrize(
    ("payload", "code", "field"),
    [
        (b"{", "MALFORMED", None),
        (orjson.dumps(GOOD | {"ksn": "zz"}), "MALFORMED", "ksn"),
        (b" " * 16_385, "MALFORMED", None),
        (b'{"v":1,"id":"a","id":"b","type":"ping"}', "MALFORMED", "id"),
        (orjson.dumps(GOOD | {"v": 2}), "UNSUPPORTED", "v"),
        (orjson.dumps(GOOD | {"type": "ping"}), "UNSUPPORTED", "type"),
        (orjson.dumps(GOOD | {"type": "heartbeat"}), "UNSUPPORTED", "type"),
        (orjson.dumps({"v": 1, "id": "b", "type": "batch", "items": [GOOD]}), "UNSUPPORTED", None),
    ],
)
async def test_what_is_no_tokenize_request_does_not_come_to_the_session(
    payload: bytes, code: str, field: str | None
) -> None:
    gateway = FakeGateway()
    with pytest.raises(wire.WireError) as caught:
        await submissions(gateway).submit("dev_1", payload)
    assert caught.value.code == code
    if field is not None:
        assert [each.field for each in caught.value.fields] == [field]
    assert not gateway.received


async def test_what_the_session_cannot_answer_is_answered_in_its_words() -> None:
    gateway = FakeGateway(UnavailableError("full", code="MAILBOX_FULL"))
    answer = await submissions(gateway).submit("dev_1", orjson.dumps(GOOD))
    assert answer == b"MAILBOX_FULL"


async def test_giving_up_is_no_answer() -> None:
    gateway = FakeGateway(None)
    task = asyncio.create_task(submissions(gateway).submit("dev_1", orjson.dumps(GOOD)))
    async with asyncio.timeout(5):
        await gateway.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_good_request_goes_to_the_session_as_it_came() -> None:
    gateway = FakeGateway(b'{"status":"ok"}')
    payload = orjson.dumps(GOOD, option=orjson.OPT_INDENT_2)
    assert await submissions(gateway).submit("dev_1", payload) == b'{"status":"ok"}'
    assert gateway.received == [("dev_1", "pos/v1/dev_1/request", payload)]


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (REVOKED, "DEVICE_REVOKED"),
        (OTHER_CERTIFICATE, "DEVICE_CERTIFICATE_REPLACED"),
        (CERTIFICATE_OVER, "DEVICE_CERTIFICATE_EXPIRED"),
    ],
)
async def test_a_device_that_the_endpoint_would_not_let_in_is_not_let_in_here(
    reason: str, code: str
) -> None:
    gateway = FakeGateway()
    await submissions(gateway).admission("dev_1", "0" * 64)
    gateway.refusal_of = Refusal(reason)
    with pytest.raises(ForbiddenError) as caught:
        await submissions(gateway).admission("dev_1", "0" * 64)
    assert caught.value.code == code
