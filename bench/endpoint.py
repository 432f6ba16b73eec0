"""The bare endpoint's echo: what terminals cost when nothing stands behind their endpoint.

The endpoint runs in one process with a gateway that answers each request with itself at once; the
terminals run in another, each with its own certificate, QoS 1 both ways. This is the limit that
the token rows are held against. `python -m bench.endpoint` prints the rows.
"""

import asyncio
import gc
import json
import logging
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias, cast

import structlog
import uvloop

from device_gateway.mqtt.codec import (
    Connack,
    Connect,
    Decoder,
    Packet,
    Puback,
    Publish,
    Suback,
    Subscribe,
    Subscription,
    Version,
    encode,
    puback_success,
    publish_bytes,
)
from device_gateway.mqtt.endpoint import Endpoint, EndpointLimits, Refusal
from glamd.clock import SystemClock
from tests.support.mqtt_tls import Authority

TERMINALS: Final = 200
CROWD: Final = 1_000
AT_ONCE: Final = 64
"""Terminals of a crowd that connect at the same time: so many an impatient client would."""
PACED_PER_S: Final = 300
REQUEST_BYTES: Final = 300
WARM_UP_S: Final = 0.5
PATIENCE_S: Final = 60.0
MEMORY_LIMIT_BYTES: Final = 60_000
CROWD_LIMIT_PER_S: Final = 5_000 / 15

Row: TypeAlias = dict[str, str | float | bool]


class EchoGateway:
    """Admits everyone and answers each request with itself at once."""

    async def admit(self, device_id: str, certificate_sha256: str) -> Refusal | None:
        """Admit."""
        del device_id, certificate_sha256
        return None

    def receive(
        self, device_id: str, topic: str, payload: bytes
    ) -> asyncio.Future[bytes | None] | None:
        """Echo."""
        del device_id, topic
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        answer.set_result(payload)
        return answer

    def refusal(self, topic: str, payload: bytes, error: BaseException) -> bytes | None:
        """Never needed."""
        del topic, payload, error
        return None

    def connected(self, device_id: str) -> None:
        """Nobody needs to know."""

    def disconnected(self, device_id: str, reason: str) -> None:
        """Nobody needs to know."""


async def serve(certificate: Path, key: Path, ca: Path) -> None:
    """The server process: prints its port, then what it costs for each line that comes in."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(ca)
    endpoint = Endpoint(
        gateway=EchoGateway(), limits=EndpointLimits(), ssl_context=context, clock=SystemClock()
    )
    await endpoint.start("127.0.0.1", 0)
    print(endpoint.port, flush=True)
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while await lines.readline():
        gc.collect()
        spent = os.times()
        print(json.dumps([_memory_bytes(), spent.user + spent.system]), flush=True)
    await endpoint.stop(1.0)


def _memory_bytes() -> int:
    """This process's anonymous memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Server:
    """The server process, seen from the terminals' side."""

    def __init__(self, authority: Authority) -> None:
        pair = authority.issue("127.0.0.1", server=True)
        command = [sys.executable, "-m", "bench.endpoint", "serve", *map(str, pair)]
        self._process = subprocess.Popen(
            [*command, str(authority.ca_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        self.port = int(self._readline())

    def _readline(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def costs(self) -> tuple[int, float]:
        """Its anonymous memory in bytes and its processor time in seconds so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        rss_bytes, cpu_s = json.loads(self._readline())
        return rss_bytes, cpu_s

    def stop(self) -> None:
        """Ends it and waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)


class Terminal(asyncio.Protocol):
    """A client as light as one can be in Python, so that the server is what is measured."""

    def __init__(self, context: ssl.SSLContext, device_id: str, waits_s: list[float]) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")
        self._established = False
        self._decoder = Decoder(100_000, Version.V5)
        self._device_id = device_id
        self._topic = f"pos/v1/{device_id}/request"
        self._waits_s = waits_s
        self._asked_s = 0.0
        self._transport: asyncio.Transport
        self._packet_id = 0
        self.saturates = False
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self._transport = cast("asyncio.Transport", transport)
        self._handshake()
        self._write()

    def _handshake(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        self._established = True
        connect = Connect(version=Version.V5, client_id=self._device_id)
        self._tls.write(encode(connect, Version.V5))

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        self._incoming.write(data)
        if not self._established:
            self._handshake()
        with suppress(ssl.SSLWantReadError):
            while self._established and self._incoming.pending:
                for packet in self._decoder.feed(self._tls.read(65_536)):
                    self._packet(packet)
        self._write()

    def _packet(self, packet: Packet) -> None:
        if type(packet) is Publish:
            now_s = time.perf_counter()
            self._waits_s.append(now_s - self._asked_s)
            acknowledgement = puback_success(packet.packet_id)
            self._tls.write(acknowledgement + self._next() if self.saturates else acknowledgement)
        elif type(packet) is Connack:
            topic = f"pos/v1/{self._device_id}/response"
            subscription = Subscription(topic_filter=topic, qos=1)
            self._tls.write(encode(Subscribe(1, (subscription,)), Version.V5))
        elif type(packet) is Suback:
            self.ready.set_result(None)
        else:
            assert type(packet) is Puback

    def _next(self) -> bytes:
        self._packet_id = self._packet_id % 65_535 + 1
        self._asked_s = time.perf_counter()
        return publish_bytes(
            self._topic, _REQUEST, qos=1, packet_id=self._packet_id, version=Version.V5
        )

    def ask(self) -> None:
        """Sends one request."""
        self._tls.write(self._next())
        self._write()

    def _write(self) -> None:
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())

    def close(self) -> None:
        """Goes away."""
        self._transport.close()


_REQUEST: Final = b"x" * REQUEST_BYTES


class Site:
    """The terminals, and what they have measured."""

    def __init__(self, authority: Authority, port: int) -> None:
        self._authority = authority
        self._port = port
        self.terminals: list[Terminal] = []
        self.waits_s: list[float] = []

    def contexts(self, first: int, count: int) -> list[tuple[str, ssl.SSLContext]]:
        """Certificates for `count` terminals, made before anything is measured."""
        names = [f"bench-{number}" for number in range(first, first + count)]
        return [
            (name, self._authority.client_context(self._authority.issue(name))) for name in names
        ]

    async def connect(self, contexts: Sequence[tuple[str, ssl.SSLContext]]) -> float:
        """Connects and subscribes them, `AT_ONCE` at a time; returns the seconds it took."""
        began_s = time.perf_counter()
        gate = asyncio.Semaphore(AT_ONCE)
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            for name, context in contexts:
                group.create_task(self._connect_one(gate, name, context))
        return time.perf_counter() - began_s

    async def _connect_one(
        self, gate: asyncio.Semaphore, name: str, context: ssl.SSLContext
    ) -> None:
        async with gate:
            _, terminal = await asyncio.get_running_loop().create_connection(
                lambda: Terminal(context, name, self.waits_s), "127.0.0.1", self._port
            )
            await terminal.ready
            self.terminals.append(terminal)

    async def saturate(self, seconds: float) -> tuple[float, list[float]]:
        """Every terminal asks again as soon as it is answered: answers a second, and the waits."""
        for terminal in self.terminals:
            terminal.saturates = True
            terminal.ask()
        await asyncio.sleep(WARM_UP_S)
        self.waits_s.clear()
        began_s = time.perf_counter()
        await asyncio.sleep(seconds)
        waits_s, spent_s = self.waits_s.copy(), time.perf_counter() - began_s
        for terminal in self.terminals:
            terminal.saturates = False
        await asyncio.sleep(WARM_UP_S)
        return len(waits_s) / spent_s, waits_s

    async def pace(self, seconds: float) -> list[float]:
        """One request every 1/`PACED_PER_S` s, from each terminal in turn: the waits."""
        self.waits_s.clear()
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        for number in range(int(seconds * PACED_PER_S)):
            terminal = self.terminals[number % len(self.terminals)]
            loop.call_at(began_s + number / PACED_PER_S, terminal.ask)
        await asyncio.sleep(seconds + WARM_UP_S)
        return self.waits_s.copy()


async def _measure(seconds: float, crowd: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        authority = Authority(Path(directory))
        server = Server(authority)
        try:
            return await _rows(server, Site(authority, server.port), seconds, crowd)
        finally:
            server.stop()


async def _rows(server: Server, site: Site, seconds: float, crowd: int) -> list[Row]:
    contexts = site.contexts(0, TERMINALS + crowd)
    await site.connect(contexts[:TERMINALS])
    _, cpu_before_s = server.costs()
    answers_per_s, waits_s = await site.saturate(seconds)
    _, cpu_after_s = server.costs()
    cpu_us = (cpu_after_s - cpu_before_s) / (answers_per_s * (seconds + WARM_UP_S)) * 1e6
    paced_s = await site.pace(seconds)
    memory_before, _ = server.costs()
    connecting_s = await site.connect(contexts[TERMINALS:])
    for terminal in site.terminals[TERMINALS:]:
        terminal.ask()
    await asyncio.sleep(WARM_UP_S)
    memory_after, _ = server.costs()
    each_bytes = (memory_after - memory_before) / crowd
    for terminal in site.terminals:
        terminal.close()
    name = f"bare endpoint's echo, {TERMINALS} terminals"
    rate = crowd / connecting_s
    return [
        {"name": f"{name}, saturated", "value": round(answers_per_s), "unit": "1/s"},
        {"name": f"{name}, saturated, server's processor", "value": round(cpu_us, 1), "unit": "us"},
        {"name": f"{name}, saturated, p50", "value": _ms(waits_s, 0.5), "unit": "ms"},
        {"name": f"{name}, saturated, p99", "value": _ms(waits_s, 0.99), "unit": "ms"},
        {"name": f"{name}, {PACED_PER_S}/s, p50", "value": _ms(paced_s, 0.5), "unit": "ms"},
        {"name": f"{name}, {PACED_PER_S}/s, p99", "value": _ms(paced_s, 0.99), "unit": "ms"},
        {
            "name": "connected terminal",
            "value": round(each_bytes),
            "unit": "bytes",
            "bar": f"<= {MEMORY_LIMIT_BYTES}",
            "holds": each_bytes <= MEMORY_LIMIT_BYTES,
        },
        {
            "name": f"terminals connecting, {crowd} of them",
            "value": round(rate),
            "unit": "1/s",
            "bar": f">= {CROWD_LIMIT_PER_S:.0f} (5000 in 15 s)",
            "holds": rate >= CROWD_LIMIT_PER_S,
        },
    ]


def _ms(waits_s: list[float], share: float) -> float:
    """The wait, in milliseconds, that `share` of them did not exceed."""
    waits_s = sorted(waits_s)
    return round(waits_s[int((len(waits_s) - 1) * share)] * 1000, 3)


def measure(seconds: float = 3.0, crowd: int = CROWD) -> list[Row]:
    """All rows: name, value, unit, and where there is one the bar and whether it is met."""
    return uvloop.run(_measure(seconds, crowd))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        uvloop.run(serve(*map(Path, sys.argv[2:])))
    else:
        for row in measure(crowd=int(sys.argv[1]) if sys.argv[1:] else CROWD):
            print(f"{row['name']:62}{row['value']:>10} {row['unit']:6}{row.get('bar', '')}")
