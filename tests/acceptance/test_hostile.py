"""Hostile crowds at every door while a good terminal taps on: none of its taps may notice.

Each test says what the crowd does; that the good terminal's answers go on growing and are all
tokens, that nothing is left behind, and that the log stays clean is the siege's to see.
"""

import asyncio
import secrets
import ssl
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import aiohttp
import orjson
import pytest

from device_gateway.mqtt.codec import (
    Connect,
    Disconnect,
    Puback,
    Publish,
    Suback,
    Subscribe,
    Subscription,
    Version,
    encode,
)
from device_gateway.terminal_device import Device
from glamd.clock import SystemClock
from glamd.embedded.certificates import DevelopmentCertificates, KeyPair
from glamd.embedded.settings import LOOPBACK
from tests.support.looks import CLEAR, look, tap, taps
from tests.support.siege import PACE_S, Siege, besieged, ended
from tests.support.site import ANSWER_TIMEOUT_S

OPENING_LIMIT = 60
CROWD = 100
"""More than may be opening at once, and still cheap."""

MQTT = {
    "max_unauthenticated": OPENING_LIMIT,
    # The good terminal pauses between its taps, and so never gets near it.
    "rate_limit_per_s": 1 / PACE_S,
    "rate_burst": 100,
}
SHORT = {"handshake_timeout_s": 1.0, "connect_timeout_s": 1.0}
AT_ONCE = 16
"""Requests without an acknowledgement: as many as the endpoint has answers under way."""

HALF_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60)
HTTP = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
GARBAGE = (
    b"\x00" * 300,
    b"\xff" * 300,
    bytes(range(256)) * 64,
    HTTP,
    encode(Connect(version=Version.V5, client_id="plain"), Version.V5),
    b"\x16\x03\x01\xff\xff" + bytes(70_000),
    b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00" * 50,
)

Besieged = Callable[..., AbstractAsyncContextManager[Siege]]


@pytest.fixture
def siege(
    state_dir: Path,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> Besieged:
    """Starts the siege of a daemon whose endpoint has these settings, and those given."""

    def start(**mqtt: float) -> AbstractAsyncContextManager[Siege]:
        changes = {"mqtt": MQTT | mqtt}
        return besieged(state_dir, database_url, changes=changes, caplog=caplog, capfd=capfd)

    return start


def trusting(siege: Siege, pair: KeyPair | None) -> ssl.SSLContext:
    """A client that trusts our servers and shows this certificate."""
    authority = siege.site.certificates.server_ca
    context = ssl.create_default_context(cafile=str(authority.certificate_file))
    if pair is not None:
        context.load_cert_chain(pair.certificate_file, pair.key_file)
    return context


def foreign(siege: Siege, directory: Path) -> list[ssl.SSLContext]:
    """Certificates that open no device's door: none, a stranger's, a worker's, a server's."""
    stranger = DevelopmentCertificates(directory / "stranger", SystemClock())
    ours = siege.site.certificates
    return [
        trusting(siege, None),
        trusting(siege, stranger.device(siege.good_device.device_id)),
        trusting(siege, ours.worker("spiffe://glamd/worker/demo")),
        trusting(siege, ours.server()),
    ]


# ---- strangers at the terminals' port


async def test_strangers_who_speak_anything_but_tls_are_closed_at_once(siege: Besieged) -> None:
    async with siege() as under:
        port = under.site.daemon.mqtt_port
        readers = [
            reader for first in GARBAGE for reader in await under.crowd(port, CROWD // 5, first)
        ]
        await under.good.goes_on()
        await ended(readers)


async def test_a_crowd_that_never_finishes_what_it_begins_keeps_nobody_out(
    siege: Besieged,
) -> None:
    async with siege(**SHORT) as under:
        port = under.site.daemon.mqtt_port
        crowd = await under.crowd(port, CROWD)
        crowd += await under.crowd(port, CROWD, HALF_HELLO)
        connect = encode(Connect(version=Version.V5, client_id="slow"), Version.V5)
        device = await under.site.enroll()
        for size in (0, 1, len(connect) - 1):
            crowd += await under.crowd(port, 5, connect[:size], tls=device.tls())
        await under.good.goes_on()
        # There is no room for the whole crowd, but there is for whoever says who he is.
        newcomer = await under.site.enroll()
        terminal = await under.site.terminal(newcomer)
        request = taps(newcomer)
        answer = await terminal.ask(
            orjson.loads(request)["id"], request, timeout_s=ANSWER_TIMEOUT_S
        )
        assert answer.ok
        terminal.close()
        # None of the crowd closes anything: the time that each of them has is over.
        await ended(crowd)
        await under.good.goes_on()


async def test_certificates_of_others_open_no_connection(siege: Besieged, tmp_path: Path) -> None:
    async with siege() as under:
        port = under.site.daemon.mqtt_port
        connect = encode(Connect(version=Version.V5, client_id="x"), Version.V5)
        for context in foreign(under, tmp_path):
            for reader in await under.crowd(port, 5, connect, tls=context):
                assert await _first_byte(reader) == b""
        await under.good.goes_on()
        status = await under.site.daemon.registry.show(under.good_device.device_id)
        assert status.presence == "online"


async def _first_byte(reader: asyncio.StreamReader) -> bytes:
    """The first byte that comes, none where the connection ended without a word."""
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        try:
            return await reader.read(1)
        except (ssl.SSLError, ConnectionError):
            return b""


# ---- devices with a certificate of ours that break the rules


async def test_a_device_that_floods_is_told_to_come_again_and_slows_nobody_down(
    siege: Besieged,
) -> None:
    async with siege() as under:
        device = await under.site.enroll()
        client = await under.client(device)
        assert await client.subscribe() == 1
        fields = orjson.loads(taps(device))
        codes: Counter[str] = Counter()
        while codes["RATE_LIMITED"] < 100:
            for number in range(1, AT_ONCE + 1):
                again = orjson.dumps(fields | {"id": secrets.token_hex(8)})
                client.request(again, packet_id=number)
            for packet in [await client.receive() for _ in range(2 * AT_ONCE)]:
                if isinstance(packet, Publish):
                    answer = orjson.loads(packet.payload)
                    codes[answer.get("code", "ok")] += 1
                    client.send(Puback(packet.packet_id))
        await under.good.goes_on()
        # One counter makes one token, however often it is sent.
        assert codes["ok"] == 1
        assert codes.keys() == {"ok", "KSN_REPLAYED", "RATE_LIMITED"}


async def test_a_device_that_does_not_wait_for_acknowledgements_is_cut_off(
    siege: Besieged,
) -> None:
    async with siege() as under:
        clients = [await under.client(await under.site.enroll()) for _ in range(5)]
        for client in clients:
            for number in range(2000):
                client.request(b'{"v":1,"id":"p","type":"ping"}', packet_id=number + 1)
        await under.good.goes_on()
        for client in clients:
            goodbye = (await client.ending())[-1]
            assert isinstance(goodbye, Disconnect)
            assert goodbye.reason_code == 0x93
        await under.good.goes_on()


async def test_a_packet_of_100_mb_is_refused_when_it_is_announced(siege: Besieged) -> None:
    async with siege() as under:
        for version in Version:
            client = await under.client(await under.site.enroll(), version)
            client.send_bytes(b"\x30\x80\x80\x80\x32")
            if version is Version.V5:
                assert await client.goodbye() == 0x95
            else:
                assert await client.ending() == []
        await under.good.goes_on()


def topic(device: Device, leaf: str) -> str:
    """A topic of a device."""
    return f"pos/v1/{device.device_id}/{leaf}"


async def test_another_devices_topics_can_be_neither_written_nor_read(siege: Besieged) -> None:
    async with siege() as under:
        victim = under.good_device
        device = await under.site.enroll()
        client = await under.client(device)
        ping = b'{"v":1,"id":"forged","type":"ping"}'
        for number, (leaf, retain) in enumerate(
            [("request", False), ("status", True), ("config", True), ("response", False)], 1
        ):
            client.send(Publish(topic(victim, leaf), ping, 1, retain=retain, packet_id=number))
            assert await client.receive() == Puback(number, 0x87)
        filters = ["#", "+/#", "pos/v1/+/response", "pos/#", topic(victim, "response"), "$SYS/#"]
        wanted = [Subscription(topic_filter=each, qos=1) for each in filters]
        client.send(Subscribe(7, tuple(wanted)))
        answer = await client.receive()
        assert isinstance(answer, Suback)
        assert all(code >= 0x80 for code in answer.reason_codes), answer.reason_codes
        await under.good.goes_on()
        # Had it heard anything of the good terminal, that would come before this answer.
        assert await client.subscribe() == 1
        client.request(ping, packet_id=9)
        assert orjson.loads((await client.receive_publish()).payload)["id"] == "forged"


async def test_who_writes_to_another_devices_topic_without_wanting_an_answer_is_cut_off(
    siege: Besieged,
) -> None:
    async with siege() as under:
        forged = Publish(topic(under.good_device, "request"), taps(under.good_device), 0)
        for version, expected in ((Version.V311, []), (Version.V5, [0x87])):
            client = await under.client(await under.site.enroll(), version)
            client.send(forged)
            goodbyes = [one for one in await client.ending() if isinstance(one, Disconnect)]
            assert [one.reason_code for one in goodbyes] == expected
        await under.good.goes_on()


async def test_connections_that_come_and_go_at_once_leave_nothing_behind(siege: Besieged) -> None:
    async with siege() as under:
        device = await under.site.enroll()
        connect = encode(Connect(version=Version.V5, client_id="brief"), Version.V5)
        for _ in range(10):
            # Each takes the session over from the one before, some before they were admitted.
            await under.crowd(under.site.daemon.mqtt_port, 8, connect, tls=device.tls())
            under.leave()
        await under.good.goes_on()


# ---- the HTTP listeners


async def test_crowds_at_the_http_doors_keep_neither_taps_nor_callers_waiting(
    siege: Besieged,
) -> None:
    async with siege() as under:
        site = under.site
        token = await tap(site)
        api, worker = site.daemon.http_port, site.daemon.worker_port
        assert worker is not None
        refused: list[asyncio.StreamReader] = []
        for port in (api, worker):
            await under.crowd(port, CROWD)
            await under.crowd(port, CROWD // 2, HALF_HELLO)
            for first in GARBAGE:
                await under.crowd(port, 5, first)
        # Heads and bodies that never end, or are too much, over plain HTTP and as a worker.
        tls = trusting(under, site.certificates.worker("spiffe://glamd/worker/demo"))
        post = f"POST /internal/v1/payment-tokens/{token}/decrypt HTTP/1.1\r\nHost: x\r\n".encode()
        announced = post + b"Content-Type: application/json\r\nContent-Length: 104857600\r\n\r\n"
        for port, context in ((api, None), (worker, tls)):
            await under.crowd(port, CROWD // 5, post, tls=context)
            await under.crowd(port, CROWD // 5, post + b"X-Slow: 1", tls=context)
            refused += await under.crowd(port, 5, announced + b"{" * 1000, tls=context)
            refused += await under.crowd(port, 5, post + b"X: " + b"x" * 20_000, tls=context)
        await under.good.goes_on()
        assert (await look(site.worker, token)).data == CLEAR
        path = f"/api/v1/payment-tokens/{token}"
        async with site.http.get(path, headers=site.client()) as reply:
            assert reply.status == 200
        for reader in refused:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                assert (await reader.readline()).split()[1].startswith(b"4")


async def test_a_terminals_certificate_and_a_strangers_open_no_workers_door(
    siege: Besieged, tmp_path: Path
) -> None:
    async with siege() as under:
        port = under.site.daemon.worker_port
        assert port is not None
        stranger = DevelopmentCertificates(tmp_path / "stranger", SystemClock())
        contexts = [
            trusting(under, None),
            trusting(under, stranger.worker("spiffe://glamd/worker/demo")),
        ]
        for context in contexts:
            for reader in await under.crowd(port, 5, HTTP, tls=context):
                assert await _first_byte(reader) == b""
        # A terminal comes in to submit its taps, and to nothing of a worker's.
        path = "/internal/v1/payment-tokens/ptk_x/decrypt"
        ask = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
        for reader in await under.crowd(port, 5, ask, tls=under.good_device.tls()):
            assert (await reader.readline()).split()[1] == b"403"
        await under.good.goes_on()


async def test_wrong_tokens_by_the_hundred_keep_nobody_else_out(siege: Besieged) -> None:
    async with siege() as under:
        site = under.site

        async with aiohttp.ClientSession(f"http://{LOOPBACK}:{site.daemon.http_port}") as thieves:

            async def guess() -> int:
                headers = {"Authorization": f"Bearer {secrets.token_urlsafe(20)}.e30.x"}
                async with thieves.get("/api/v1/payment-tokens", headers=headers) as reply:
                    return reply.status

            for _ in range(5):
                assert set(await asyncio.gather(*(guess() for _ in range(CROWD)))) == {401}
            await under.good.goes_on()
        async with site.http.get("/api/v1/payment-tokens", headers=site.client()) as reply:
            assert reply.status == 200
