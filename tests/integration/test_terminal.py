"""The virtual terminal against a server that loses, delays, refuses and vanishes: real TLS."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from device_gateway import terminal as terminal_module
from device_gateway.mqtt import codec
from device_gateway.mqtt.codec import ReasonCode, ReturnCode, Version
from device_gateway.terminal import Answer, Terminal
from device_gateway.terminal_device import Device, load_device
from device_gateway.terminal_link import IN_FLIGHT_LIMIT, Ending, ending_of
from glamd.clock import SystemClock
from glamd.errors import ConflictError, ForbiddenError, UnavailableError
from tests.support.mqtt_tls import Authority
from tests.support.scripted_mqtt import Fields, ScriptedServer, ok, refusal
from tests.support.terminal_devices import enrolled

TIMEOUT_S = 5.0


class Watcher:
    """Remembers what a terminal tells."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.resends: list[str] = []
        self.endings: list[Ending] = []

    def answered(self, _device_id: str, answer: Answer, /) -> None:
        self.answers.append(answer)

    def resent(self, _device_id: str, request_id: str, /) -> None:
        self.resends.append(request_id)

    def parted(self, _device_id: str, ending: Ending, /) -> None:
        self.endings.append(ending)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
async def server(authority: Authority) -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer(authority.server_context())
    await scripted.start()
    yield scripted
    await scripted.stop()


@pytest.fixture
def device(authority: Authority, server: ScriptedServer, tmp_path: Path) -> Device:
    return load_device(enrolled(authority, tmp_path, server.port))


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same waits, short enough for a test."""
    monkeypatch.setattr(terminal_module, "RESEND_FIRST_S", 0.1)
    monkeypatch.setattr(terminal_module, "RETRY_FIRST_S", 0.05)
    monkeypatch.setattr(terminal_module, "RECONNECT_FIRST_S", 0.05)


@asynccontextmanager
async def running(
    device: Device,
    watcher: Watcher | None = None,
    *,
    version: Version = Version.V5,
    give_up: bool = False,
) -> AsyncIterator[Terminal]:
    terminal = Terminal(
        device, clock=SystemClock(), version=version, give_up=give_up, watch=watcher
    )
    async with asyncio.TaskGroup() as group:
        group.create_task(terminal.run())
        yield terminal
        terminal.close()


async def ask(terminal: Terminal, request_id: str = "r1", payload: bytes | None = None) -> Answer:
    body = payload or b'{"v":1,"id":"%b","type":"ping"}' % request_id.encode()
    return await terminal.ask(request_id, body, timeout_s=TIMEOUT_S)


async def test_a_request_whose_answer_is_lost_is_sent_again_word_for_word(
    server: ScriptedServer, device: Device
) -> None:
    lost = 2

    def respond(request: Fields) -> Fields | None:
        return ok(request, replayed=True) if len(server.requests) > lost else None

    server.respond = respond
    watcher = Watcher()
    async with running(device, watcher) as terminal:
        answer = await ask(terminal)
    assert answer.ok
    assert answer.replayed
    assert len(server.requests) == lost + 1
    assert all(request == server.requests[0] for request in server.requests)
    assert watcher.resends == ["r1"] * lost


async def test_a_server_that_vanishes_and_comes_back_gets_the_same_request(
    server: ScriptedServer, device: Device
) -> None:
    server.respond = lambda _request: None
    watcher = Watcher()
    async with running(device, watcher) as terminal:
        asking = asyncio.ensure_future(ask(terminal))
        await server.until(lambda: len(server.requests) == 1)
        port = server.port
        await server.stop()
        server.respond = ok
        await server.start(port)
        answer = await asking
    assert answer.ok
    assert {request["id"] for request in server.requests} == {"r1"}
    assert watcher.endings


async def test_what_is_asked_while_there_is_no_connection_goes_out_with_the_next(
    server: ScriptedServer, device: Device
) -> None:
    port = server.port
    await server.stop()
    watcher = Watcher()
    async with running(device, watcher) as terminal:
        asking = asyncio.ensure_future(ask(terminal))
        await server.start(port)
        assert (await asking).ok
    assert watcher.resends == []


async def test_a_retryable_refusal_is_tried_again_until_it_is_final(
    server: ScriptedServer, device: Device
) -> None:
    def respond(request: Fields) -> Fields:
        tries = len(server.requests)
        if tries <= 2:
            return refusal(request, "UNAVAILABLE", retryable=True)
        return refusal(request, "KSN_REPLAYED", retryable=False)

    server.respond = respond
    watcher = Watcher()
    async with running(device, watcher) as terminal:
        answer = await ask(terminal)
    assert (answer.ok, answer.code) == (False, "KSN_REPLAYED")
    assert [each.code for each in watcher.answers] == ["UNAVAILABLE"] * 2 + ["KSN_REPLAYED"]


async def test_silence_ends_with_a_clear_error_and_leaves_nothing_behind(
    server: ScriptedServer, device: Device
) -> None:
    server.respond = lambda _request: None
    async with running(device) as terminal:
        with pytest.raises(UnavailableError, match=r"no answer within 0\.2 s"):
            await terminal.ask("r1", b"{}", timeout_s=0.2)
        assert terminal.outstanding == 0


async def test_garbage_and_strangers_answers_are_passed_over(
    server: ScriptedServer, device: Device
) -> None:
    def respond(request: Fields) -> Fields | None:
        topic = f"pos/v1/{device.device_id}/response"
        for payload in (b"", b"\xff", b"[]", b'{"id":null}', b'{"id":["r1"]}', b'{"id":"other"}'):
            server.push(codec.Publish(topic, payload))
        return ok(request)

    server.respond = respond
    async with running(device) as terminal:
        assert (await ask(terminal)).text("token") == "ptk_r1"


async def test_bytes_that_are_not_mqtt_cost_a_connection_and_no_answer(
    server: ScriptedServer, device: Device
) -> None:
    def respond(request: Fields) -> Fields | None:
        if len(server.requests) == 1:
            server.push_bytes(b"\x00\xff\xff\xff\xff\xff")
            return None
        return ok(request)

    server.respond = respond
    watcher = Watcher()
    async with running(device, watcher) as terminal:
        assert (await ask(terminal)).ok
    assert "broke the protocol" in watcher.endings[0].reason


@pytest.mark.parametrize("version", [Version.V5, Version.V311])
async def test_one_that_took_the_session_over_gets_time_to_use_it(
    server: ScriptedServer,
    device: Device,
    version: Version,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 3.1.1 cannot say why it closed, so there the pause is the ordinary one: this one has no end.
    pause_s = 0.4 if version is Version.V5 else TIMEOUT_S * 100
    monkeypatch.setattr(terminal_module, "TAKEN_OVER_PAUSE_S", pause_s)
    monkeypatch.setattr(terminal_module, "RECONNECT_FIRST_S", 0.01)
    loop = asyncio.get_running_loop()
    watcher = Watcher()
    async with running(device, watcher, version=version) as terminal:
        await terminal.connect(timeout_s=TIMEOUT_S)
        started_s = loop.time()
        if version is Version.V5:
            server.push(codec.Disconnect(ReasonCode.SESSION_TAKEN_OVER))
        server.cut()
        await server.until(lambda: len(server.connects) == 2)
        waited_s = loop.time() - started_s
    assert waited_s >= 0.4 or version is not Version.V5
    assert watcher.endings[0].taken_over == (version is Version.V5)


@pytest.mark.parametrize(
    ("version", "code"),
    [
        (Version.V5, ReasonCode.NOT_AUTHORIZED),
        (Version.V5, ReasonCode.BANNED),
        (Version.V311, ReturnCode.NOT_AUTHORIZED),
    ],
)
async def test_a_refusal_for_good_ends_a_terminal_that_may_give_up(
    server: ScriptedServer, device: Device, version: Version, code: int
) -> None:
    server.connack = codec.Connack(reason_code=code)
    terminal = Terminal(device, clock=SystemClock(), version=version, give_up=True)
    with pytest.raises(ForbiddenError, match="refused the connection"):
        await asyncio.wait_for(terminal.run(), TIMEOUT_S)


async def test_a_busy_server_is_tried_again_even_by_one_that_may_give_up(
    server: ScriptedServer, device: Device
) -> None:
    why = codec.Properties(reason_string="come back later")
    server.connack = codec.Connack(reason_code=ReasonCode.SERVER_BUSY, properties=why)
    watcher = Watcher()
    async with running(device, watcher, give_up=True) as terminal:
        await server.until(lambda: len(server.connects) == 2)
        server.connack = codec.Connack()
        assert (await ask(terminal)).ok
    assert watcher.endings[0].reason.endswith("server busy (come back later)")


async def test_a_refused_subscription_is_a_refusal_for_good(
    server: ScriptedServer, device: Device
) -> None:
    server.suback_code = 0x87
    terminal = Terminal(device, clock=SystemClock(), give_up=True)
    with pytest.raises(ForbiddenError, match="subscription"):
        await asyncio.wait_for(terminal.run(), TIMEOUT_S)


async def test_a_server_of_another_authority_gets_no_request(
    authority: Authority, server: ScriptedServer, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger")
    home = enrolled(authority, tmp_path, server.port, trusts=stranger.ca_file)
    terminal = Terminal(load_device(home), clock=SystemClock(), give_up=True)
    with pytest.raises(ForbiddenError, match="certificate is not trusted"):
        await asyncio.wait_for(terminal.run(), TIMEOUT_S)
    assert server.connects == []


async def test_a_server_that_does_not_take_our_certificate_is_left_in_the_end(
    authority: Authority, server: ScriptedServer, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger")
    home = enrolled(stranger, tmp_path, server.port, trusts=authority.ca_file)
    terminal = Terminal(load_device(home), clock=SystemClock(), give_up=True)
    with pytest.raises(ForbiddenError, match="may not take the device's certificate"):
        await asyncio.wait_for(terminal.run(), TIMEOUT_S)
    assert server.connects == []


async def test_a_tls_alert_is_a_refusal_for_good(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def accept() -> None:
            # OpenSSL on a plain socket sends its alert, as Mosquitto does.
            connection, _ = listener.accept()
            with suppress(ssl.SSLError), connection:
                authority.server_context().wrap_socket(connection, server_side=True)

        accepting = asyncio.ensure_future(asyncio.to_thread(accept))
        home = enrolled(stranger, tmp_path, port, trusts=authority.ca_file)
        terminal = Terminal(load_device(home), clock=SystemClock(), give_up=True)
        with pytest.raises(ForbiddenError, match="alert"):
            await asyncio.wait_for(terminal.run(), TIMEOUT_S)
        await accepting


@pytest.mark.parametrize("limit", [3, None])
async def test_no_more_is_on_its_way_than_the_server_takes(
    server: ScriptedServer, device: Device, limit: int | None
) -> None:
    server.connack = codec.Connack(properties=codec.Properties(receive_maximum=limit))
    server.acknowledges = False
    count = 2 * IN_FLIGHT_LIMIT
    async with running(device) as terminal:
        await terminal.connect(timeout_s=TIMEOUT_S)
        asking = [asyncio.ensure_future(ask(terminal, f"r{n}")) for n in range(count)]
        await server.until(lambda: server.most_in_flight == (limit or IN_FLIGHT_LIMIT))
        server.release()
        answers = await asyncio.gather(*asking)
    assert all(answer.ok for answer in answers)
    assert server.most_in_flight == (limit or IN_FLIGHT_LIMIT)


async def test_what_is_outstanding_is_bounded_and_ids_are_unique(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal_module, "OUTSTANDING_LIMIT", 2)
    terminal = Terminal(device, clock=SystemClock())
    terminal.send("a", b"{}", lambda _answer: None)
    with pytest.raises(ConflictError):
        terminal.send("a", b"{}", lambda _answer: None)
    terminal.send("b", b"{}", lambda _answer: None)
    with pytest.raises(UnavailableError):
        terminal.send("c", b"{}", lambda _answer: None)


async def test_a_silent_peer_is_given_up_and_a_living_one_is_kept(
    server: ScriptedServer, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.connack = codec.Connack(properties=codec.Properties(server_keep_alive=1))
    watcher = Watcher()
    async with running(device, watcher) as terminal:
        await server.until(lambda: server.pings == 1)
        assert watcher.endings == []
        monkeypatch.setattr(codec, "PINGRESP", codec.Puback(9))
        monkeypatch.setattr(codec, "encode", lambda *_: b"")
        await server.until(lambda: not terminal.connected.is_set() or len(server.connects) == 2)
    assert watcher.endings[0].reason == "the server has gone silent"


@pytest.mark.parametrize("version", [Version.V5, Version.V311])
async def test_a_terminal_says_that_it_comes_and_that_it_goes(
    server: ScriptedServer, device: Device, version: Version
) -> None:
    async with running(device, version=version) as terminal:
        assert (await ask(terminal)).ok
    await server.until(lambda: server.disconnects == 1)
    connect = server.connects[0]
    assert (connect.version, connect.client_id) == (version, device.device_id)
    assert connect.will is not None
    assert connect.will.topic == f"pos/v1/{device.device_id}/status"
    assert connect.will.retain
    assert b'"state":"offline"' in connect.will.payload
    assert [(fields["state"], retain) for fields, retain in server.statuses] == [
        ("online", True),
        ("offline", True),
    ]


async def test_closing_while_the_server_says_nothing_does_not_hang(
    authority: Authority, tmp_path: Path
) -> None:
    mute = await asyncio.get_running_loop().create_server(
        asyncio.Protocol, "127.0.0.1", 0, ssl=authority.server_context()
    )
    port = mute.sockets[0].getsockname()[1]
    terminal = Terminal(load_device(enrolled(authority, tmp_path, port)), clock=SystemClock())
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        task = group.create_task(terminal.run())
        with pytest.raises(UnavailableError, match="no connection within"):
            await terminal.connect(timeout_s=0.2)
        assert not task.done()
        terminal.close()
    mute.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "closed"),
        (TimeoutError(), "timed out"),
        (ConnectionRefusedError(111, "Connection refused"), "connection refused"),
        (OSError("odd"), "closed"),
    ],
)
def test_every_end_of_a_connection_has_words(error: Exception | None, words: str) -> None:
    ending = ending_of(error)
    assert words in ending.reason
    assert not ending.final
