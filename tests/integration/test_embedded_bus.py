"""The embedded NATS server: what it survives, what it leaves behind, and whom it lets in."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import nats.errors
import pytest

from glamd.embedded import bus as embedded
from glamd.embedded import children
from glamd.embedded.bus import EmbeddedBus
from glamd.errors import ConfigError, UnavailableError
from tests.support.nats import nats_client
from tests.support.postgres import eventually
from tests.support.processes import at_work_in, until

PARENT = """
import asyncio, sys
from pathlib import Path
from glamd.embedded.bus import EmbeddedBus

async def main():
    server = EmbeddedBus(Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedBus]:
    """A server, not started yet, and stopped afterwards."""
    made = EmbeddedBus(tmp_path / "state")
    yield made
    await made.stop()


def mode_of(path: Path) -> int:
    """The permission bits of a file."""
    return path.stat().st_mode & 0o777


def logged(tmp_path: Path) -> str:
    """What the server has said."""
    return (tmp_path / "state" / "nats" / "nats.log").read_text()


def command_line(server: EmbeddedBus) -> str:
    """What everybody on this machine sees of the server."""
    return Path(f"/proc/{server.pid}/cmdline").read_text()


def parent_of_a_server(state_dir: Path) -> tuple[subprocess.Popen[str], int]:
    """A process that has started a server on this state directory, and the server's pid."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(state_dir)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout as output:
        for line in output:
            if line.strip().isdigit():
                return parent, int(line)
    pytest.fail("the parent did not start its server")


async def test_a_port_that_is_taken_is_told_in_one_line(tmp_path: Path) -> None:
    listener = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    async with listener:
        port: int = listener.sockets[0].getsockname()[1]
        with pytest.raises(UnavailableError, match="nats-server does not start") as caught:
            await EmbeddedBus(tmp_path, port=port).start()
    assert "in use" in caught.value.message
    assert "\n" not in caught.value.message


async def test_a_second_server_on_the_same_streams_is_refused(
    server: EmbeddedBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.start()
    monkeypatch.setattr(embedded, "PREDECESSOR_TIMEOUT_S", 0.1)
    with pytest.raises(UnavailableError, match="Another NATS server"):
        await EmbeddedBus(tmp_path / "state").start()


async def test_nobody_gets_in_without_the_password(server: EmbeddedBus, tmp_path: Path) -> None:
    address = await server.start()
    password = (tmp_path / "state" / "nats" / "password").read_text()
    assert password in address.url
    assert password not in repr(address)
    for url in (address.url.replace(password, "wrong"), address.url.replace("glamd:", "root:")):
        with pytest.raises(nats.errors.Error, match="Authorization"):
            async with nats_client(url):
                pass
    for directory in (tmp_path / "state", tmp_path / "state" / "nats"):
        assert mode_of(directory) == 0o700
    for name in ("password", "nats.conf"):
        assert mode_of(tmp_path / "state" / "nats" / name) == 0o600
    assert password not in logged(tmp_path)
    # Nor can anybody read it off the list of processes.
    assert password not in command_line(server)


async def test_it_listens_on_loopback_only_and_for_clients_only(
    server: EmbeddedBus, tmp_path: Path
) -> None:
    await server.start()
    lines = [line for line in logged(tmp_path).splitlines() if "Listening" in line]
    assert len(lines) == 1
    assert "client connections on 127.0.0.1:" in lines[0]


async def test_a_second_start_finds_the_streams_of_the_first(
    server: EmbeddedBus, tmp_path: Path
) -> None:
    async with nats_client((await server.start()).url) as client:
        await client.jsm().add_stream(name="KEPT", subjects=["kept"])
        await client.jetstream().publish("kept", b"42")
    await server.stop()
    assert server.pid is None
    again = EmbeddedBus(tmp_path / "state")
    try:
        async with nats_client((await again.start()).url) as client:
            assert (await client.jsm().get_msg("KEPT", 1)).data == b"42"
    finally:
        await again.stop()


async def test_a_server_that_is_killed_comes_back_on_the_same_port_with_its_streams(
    server: EmbeddedBus,
) -> None:
    url = (await server.start()).url
    async with nats_client(url) as client:
        await client.jsm().add_stream(name="KEPT", subjects=["kept"])
        await client.jetstream().publish("kept", b"42")
    first = server.pid
    server.kill9()

    async def is_another() -> bool:
        return server.pid not in (None, first)

    await eventually(is_another)

    async def is_kept() -> bool:
        async with nats_client(url) as client:
            return (await client.jsm().get_msg("KEPT", 1)).data == b"42"

    await eventually(is_kept, errors=(OSError, nats.errors.Error))
    assert server.restarts == 1


async def test_a_server_that_cannot_come_back_is_given_up(
    server: EmbeddedBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.start()
    monkeypatch.setattr(children, "RESTART_LIMIT", 2)
    (tmp_path / "state" / "nats" / "nats.conf").write_text("port: nowhere\n")
    server.kill9()
    with pytest.raises(UnavailableError, match="nats-server does not start"):
        await asyncio.wait_for(server.wait(), 10)


async def test_after_kill_9_of_the_parent_no_server_is_left_to_block_the_next_start(
    server: EmbeddedBus, tmp_path: Path
) -> None:
    parent, pid = await asyncio.to_thread(parent_of_a_server, tmp_path / "state")
    assert pid in {each.pid for each in at_work_in(tmp_path)}
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    await asyncio.to_thread(until, lambda: not at_work_in(tmp_path))
    await asyncio.wait_for(server.start(), 10)
    assert server.pid != pid


async def test_a_pid_file_that_names_somebody_else_does_not_block(
    server: EmbeddedBus, tmp_path: Path
) -> None:
    await server.start()
    await server.stop()
    (tmp_path / "state" / "nats" / "nats.pid").write_text(str(os.getpid()))
    await server.start()


async def test_a_cancelled_start_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def never_ready(_self: EmbeddedBus) -> bool:
        asked.set()
        return False

    monkeypatch.setattr(EmbeddedBus, "_lets_us_in", never_ready)
    server = EmbeddedBus(tmp_path)
    starting = asyncio.create_task(server.start())
    await asyncio.wait_for(asked.wait(), 10)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert server.pid is None
    assert not at_work_in(tmp_path)


async def test_something_else_on_the_port_is_not_taken_for_the_server(tmp_path: Path) -> None:
    answers = {"info": b"HTTP/1.1 400 Bad Request\r\n"}

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers["info"])
        writer.write(b"PONG\r\n")
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with listener:
        server = EmbeddedBus(tmp_path, port=listener.sockets[0].getsockname()[1])
        assert not await server._lets_us_in()
        answers["info"] = b"INFO " + json.dumps({"jetstream": False}).encode() + b"\r\n"
        assert not await server._lets_us_in()
        answers["info"] = b"INFO {broken\r\n"
        assert not await server._lets_us_in()
        answers["info"] = b"INFO " + json.dumps({"jetstream": True}).encode() + b"\r\n"
        assert await server._lets_us_in()


def test_without_the_wheel_the_start_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WHEEL", "no-such-wheel")
    with pytest.raises(ConfigError, match="no-such-wheel is not installed"):
        embedded.program()
