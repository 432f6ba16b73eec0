"""The connection to NATS: when it is there, how it comes back, and whom it does not talk to."""

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from nats.aio.client import Client
from structlog.testing import capture_logs

from glamd.embedded import bus as embedded
from glamd.embedded.bus import EmbeddedBus
from glamd.embedded.children import Child, Program
from glamd.embedded.postgres import free_port
from glamd.errors import ConfigError
from glamd.events import bus as events_bus
from glamd.events import client
from glamd.events.bus import STREAM, Bus, BusLostError, Link
from glamd.events.message import Message
from tests.support.events_world import running, running_bus
from tests.support.nats import NatsServer, nats_client
from tests.support.postgres import eventually

TIMEOUT_S = 10.0


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedBus]:
    """A server of the test's own, not started yet."""
    made = EmbeddedBus(tmp_path, port=free_port())
    yield made
    made.send(signal.SIGCONT)
    await made.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt is not long after the last one."""
    monkeypatch.setattr(events_bus, "LAST_PAUSE_S", 0.1)
    monkeypatch.setattr(client, "CLOSE_TIMEOUT_S", 0.1)


async def link_of(bus: Bus) -> Link:
    """Its link, within the time."""
    async with asyncio.timeout(TIMEOUT_S):
        return await bus.link()


async def trouble_of(bus: Bus, *, other_than: str | None = "NATS: not connected yet.") -> str:
    """What it says is wrong, as soon as it says something (else)."""

    async def is_told() -> bool:
        return bus.trouble() not in (None, other_than)

    await eventually(is_told)
    return bus.trouble() or ""


# ---- coming and going


async def test_a_server_that_comes_later_is_found(server: EmbeddedBus) -> None:
    url = (await server.start()).url
    await server.stop()
    bus = Bus([url], name="test")
    async with running(bus):
        assert await trouble_of(bus) == "NATS: no server can be reached."
        assert bus.current is None
        await server.restart()
        link = await link_of(bus)
        assert bus.trouble() is None
        assert bus.current is link


async def test_of_several_servers_one_is_enough(server: EmbeddedBus) -> None:
    url = (await server.start()).url
    bus = Bus(["nats://127.0.0.1:1", url, "nats://127.0.0.1:2"], name="test")
    async with running(bus):
        await link_of(bus)


async def test_a_link_that_is_lost_is_followed_by_another(server: EmbeddedBus) -> None:
    url = (await server.start()).url
    async with running_bus(url) as bus:
        for _ in range(3):
            link = await link_of(bus)
            server.kill9()
            async with asyncio.timeout(TIMEOUT_S):
                await link.wait_lost()
            with pytest.raises(BusLostError):
                await link.publish("evt.x")
            assert await link_of(bus) is not link


async def test_a_server_that_hangs_is_given_up(
    server: EmbeddedBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_bus, "PING_INTERVAL_S", 0.05)
    url = (await server.start()).url
    async with running_bus(url) as bus:
        link = await link_of(bus)
        server.send(signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S):
            await link.wait_lost()
        server.send(signal.SIGCONT)
        assert await link_of(bus) is not link


async def test_a_question_on_a_link_that_is_lost_is_not_waited_for(server: EmbeddedBus) -> None:
    url = (await server.start()).url
    async with running_bus(url) as bus:
        link = await link_of(bus)
        server.send(signal.SIGSTOP)
        asking = asyncio.create_task(link.consumer("any"))
        await asyncio.sleep(0)
        link.drop()
        with pytest.raises(BusLostError):
            await asyncio.wait_for(asking, 1)
        server.send(signal.SIGCONT)


async def test_who_waits_for_a_full_socket_can_be_cancelled(server: EmbeddedBus) -> None:
    url = (await server.start()).url
    async with running_bus(url) as bus:
        link = await link_of(bus)
        server.send(signal.SIGSTOP)
        sent = 0

        async def fill() -> None:
            nonlocal sent
            while True:
                await link.publish("evt.x", b"x" * 500_000)
                sent += 1
                await asyncio.sleep(0)

        filling = asyncio.create_task(fill())
        before = -1

        async def is_stuck() -> bool:
            nonlocal before
            before, unchanged = sent, sent == before and sent > 0
            return unchanged

        await eventually(is_stuck)
        filling.cancel()
        done, _ = await asyncio.wait([filling], timeout=TIMEOUT_S)
        assert done
        assert filling.cancelled()


async def test_nothing_is_left_of_a_bus_that_was_cancelled(server: EmbeddedBus) -> None:
    url = (await server.start()).url
    before = asyncio.all_tasks()
    for _ in range(3):
        async with running_bus(url) as bus:
            await link_of(bus)
            server.kill9()
            await trouble_of(bus)
        async with running_bus(url):
            pass

    async def all_ended() -> bool:
        return not {task for task in asyncio.all_tasks() - before if "child" not in task.get_name()}

    await eventually(all_ended)


# ---- the stream


async def test_the_stream_is_made_when_absent(client: Client, nats_server: NatsServer) -> None:
    bus = Bus([nats_server.url], name="test", stream_max_age_s=3600)
    async with running(bus):
        await link_of(bus)
    config = (await client.jsm().stream_info(STREAM)).config
    assert config.subjects == ["evt.>", "cmd.>"]
    assert config.max_age == 3600
    assert config.storage == "file"
    assert config.discard == "old"


async def test_a_stream_that_is_there_is_used_as_it_is(
    client: Client, nats_server: NatsServer
) -> None:
    await client.jsm().add_stream(name=STREAM, subjects=["evt.credits.>"], max_msgs=5)
    async with running_bus(nats_server.url) as bus:
        await link_of(bus)
    config = (await client.jsm().stream_info(STREAM)).config
    assert (config.subjects, config.max_msgs) == (["evt.credits.>"], 5)


async def test_subjects_that_another_stream_has_are_told(
    client: Client, nats_server: NatsServer
) -> None:
    await client.jsm().add_stream(name="OTHER", subjects=["evt.>"])
    bus = Bus([nats_server.url], name="test")
    try:
        async with running(bus):
            told = await trouble_of(bus)
    finally:
        await client.jsm().delete_stream("OTHER")
    assert told == "JetStream: subjects overlap with an existing stream (10065)."


# ---- who is talked to


async def test_a_wrong_password_is_told_and_not_shown(server: EmbeddedBus) -> None:
    url = (await server.start()).url
    bus = Bus([url.replace("glamd:", "glamd:wrong-")], name="test")
    with capture_logs() as logs:
        async with running(bus):
            assert await trouble_of(bus) == "NATS: the server refuses our login."
    assert "wrong-" not in repr(logs)


async def test_login_and_servers_may_be_given_apart(server: EmbeddedBus) -> None:
    url = (await server.start()).url
    login, _, address = url.removeprefix("nats://").partition("@")
    user, _, password = login.partition(":")
    bus = Bus([f"nats://{address}"], name="test", user=user, password=password)
    async with running(bus):
        await link_of(bus)


async def test_a_server_without_tls_is_told_nothing_where_tls_is_wanted() -> None:
    heard = bytearray()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"headers":true,"jetstream":true,"max_payload":1048576}\r\n')
        heard.extend(await reader.read())
        writer.close()

    listener = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        bus = Bus([f"tls://glamd:secret@127.0.0.1:{port}"], name="test")
        async with running(bus):
            told = await trouble_of(bus)
    assert told == "NATS: TLS is wanted and the server offers none."
    assert not heard


@pytest.mark.parametrize(
    "greeting",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"INFO\r\n",
        b"INFO {\r\n",
        b"INFO []\r\n",
        b"INFO \xff\r\n",
        b"INFO " + b"x" * 100_000 + b"\r\n",
        b"INFO {}\r\n-ERR\r\n",
        b"",
    ],
)
async def test_what_is_no_nats_server_is_told_and_survived(greeting: bytes) -> None:
    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    listener = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        bus = Bus([f"nats://127.0.0.1:{port}"], name="test")
        async with running(bus):
            assert (await trouble_of(bus)).startswith("NATS: ")
            assert bus.current is None


class TlsServer:
    """A nats-server that wants TLS."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nats")])
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False
            )
            .sign(key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )
        (directory / "cert.pem").write_bytes(self.certificate)
        (directory / "key.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        arguments = ("-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(directory))
        tls = ("--tls", "--tlscert", "cert.pem", "--tlskey", "key.pem")
        self.child = Child(
            Program(
                name="nats-server",
                command=(str(embedded.program()), *arguments, *tls),
                directory=directory,
                log=directory / "log",
            ),
            self._listens,
        )

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True


@pytest.fixture
async def tls_server(tmp_path: Path) -> AsyncIterator[TlsServer]:
    """A server that wants TLS, with a certificate that only the test trusts."""
    made = TlsServer(tmp_path)
    await made.child.start()
    yield made
    await made.child.stop()


async def test_tls_with_a_trusted_certificate(tls_server: TlsServer) -> None:
    trusting = ssl.create_default_context(cadata=tls_server.certificate.decode())
    bus = Bus([f"tls://127.0.0.1:{tls_server.port}"], name="test", tls=trusting)
    async with running(bus):
        await link_of(bus)


async def test_a_certificate_that_nobody_trusts_is_refused(tls_server: TlsServer) -> None:
    bus = Bus([f"tls://127.0.0.1:{tls_server.port}"], name="test")
    async with running(bus):
        assert await trouble_of(bus) == "NATS: TLS fails."


@pytest.mark.parametrize(
    "servers",
    [
        [],
        ["http://127.0.0.1:4222"],
        ["nats://"],
        ["nats://host:99999"],
        ["nats://user:pa[ss@host:4222"],
        ["127.0.0.1:4222"],
    ],
)
async def test_a_url_that_cannot_be_used_is_a_wrong_setting(servers: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Bus(servers, name="test")
    assert "pa[ss" not in caught.value.message


async def test_a_link_that_is_dropped_is_followed_by_another(server: EmbeddedBus) -> None:
    url = (await server.start()).url
    async with running_bus(url) as bus:
        link = await link_of(bus)
        link.drop()
        assert await link_of(bus) is not link
        async with nats_client(url) as client:
            assert (await client.jsm().stream_info(STREAM)).state.messages == 0


# ---- what goes over it


async def test_a_message_that_crashes_its_taker_does_not_take_the_link_with_it(
    nats_server: NatsServer,
) -> None:
    taken: list[Message] = []

    def take(message: Message) -> None:
        if message.body == b"bad":
            raise ZeroDivisionError("a bug that we do not know")
        taken.append(message)

    async def is_taken() -> bool:
        return len(taken) == 1

    async with running_bus(nats_server.url) as bus, nats_client(nats_server.url) as other:
        link = await link_of(bus)
        with capture_logs() as logs:
            await link.subscribe("take.me", take)
            await link.flush(timeout_s=TIMEOUT_S)
            await other.publish("take.me", b"bad")
            await other.publish("take.me", b"good", reply="back", headers={"a": "b"})
            await eventually(is_taken)
        assert not link.is_lost
        assert [each["event"] for each in logs] == ["bus_callback_crashed"]
    [good] = taken
    assert (good.subject, good.reply, good.body, good.headers) == (
        "take.me",
        "back",
        b"good",
        {"a": "b"},
    )


async def test_an_answer_goes_where_the_message_wants_it(nats_server: NatsServer) -> None:
    async with running_bus(nats_server.url) as bus, nats_client(nats_server.url) as other:
        link = await link_of(bus)
        await link.subscribe("ask.me", lambda message: message.answer(b"told " + message.body))
        await link.flush(timeout_s=TIMEOUT_S)
        asked = [other.request("ask.me", b"%d" % n, timeout=TIMEOUT_S) for n in range(100)]
        answers = await asyncio.gather(*asked)
    assert [answer.data for answer in answers] == [b"told %d" % n for n in range(100)]


async def test_after_relief_there_is_room_again_and_nothing_is_missing(
    nats_server: NatsServer,
) -> None:
    taken: list[bytes] = []
    body = b"x" * 200_000
    sent = 0

    async def all_taken() -> bool:
        return len(taken) == sent

    async with running_bus(nats_server.url) as bus:
        link = await link_of(bus)
        await link.subscribe("much", lambda message: taken.append(message.body))
        for _ in range(3):
            while not link.is_full:
                link.send_built("much", b"NATS/1.0\r\n\r\n", body, reply="r")
                sent += 1
            await link.relief()
            assert not link.is_full
        await eventually(all_taken)
    assert set(taken) == {body}


async def test_nothing_is_sent_over_a_link_that_was_closed(nats_server: NatsServer) -> None:
    async with running_bus(nats_server.url) as bus:
        link = await link_of(bus)
    with pytest.raises(BusLostError):
        link.send_built("much", b"NATS/1.0\r\n\r\n", b"", reply="r")
