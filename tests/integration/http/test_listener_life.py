"""How a listener starts and stops: addresses, requests under way, connections that idle."""

import asyncio
import socket
import ssl
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from glamd.errors import ConfigError
from glamd.http.tls import api_tls, mutual_tls, worker_tls
from tests.support.http_certificates import Authority
from tests.support.http_fakes import SHORT_S, TOKEN, Wire, client_jwt, connected
from tests.support.http_world import World


async def begin(wire: Wire, world: World) -> None:
    """A request that is under way when this returns, and waits for the world's gate."""
    world.tokens.gate = asyncio.Event()
    await wire.send(
        f"GET /api/v1/payment-tokens/{TOKEN} HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {client_jwt()}\r\n\r\n".encode()
    )
    async with asyncio.timeout(SHORT_S):
        await world.tokens.entered.wait()


async def test_a_request_under_way_is_answered_and_then_the_connection_ends(world: World) -> None:
    server = world.api_server()
    port = await server.start("127.0.0.1", 0, None)
    async with connected(port) as busy, connected(port) as idle:
        assert (await idle.ask("GET /healthz HTTP/1.1")).status == 200
        await begin(busy, world)
        stopping = asyncio.create_task(server.stop(SHORT_S))
        assert await idle.closed()
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", port)
        assert world.tokens.gate is not None
        world.tokens.gate.set()
        assert (await busy.reply()).status == 200
        assert await busy.closed()
        await stopping


async def test_a_request_that_does_not_end_does_not_hold_up_the_stop(world: World) -> None:
    server = world.api_server()
    port = await server.start("127.0.0.1", 0, None)
    async with connected(port) as busy:
        await begin(busy, world)
        async with asyncio.timeout(SHORT_S):
            await server.stop(0.2)
        assert await busy.closed()


async def test_a_client_that_never_hangs_up_is_cut_off_at_the_stop(
    world: World, tmp_path: Path
) -> None:
    files = Authority(tmp_path, "ca").issue("server")
    server = world.api_server()
    context = api_tls(certificate=files.certificate, key=files.key)
    port = await server.start("127.0.0.1", 0, context)

    def hold() -> ssl.SSLSocket:
        # With TLS both sides say goodbye; a blocking socket that nobody reads says nothing.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        held = context.wrap_socket(socket.create_connection(("127.0.0.1", port), SHORT_S))
        held.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert held.recv(4096).startswith(b"HTTP/1.1 200")
        return held

    with await asyncio.to_thread(hold):
        before = cut("stopping")
        async with asyncio.timeout(SHORT_S):
            await server.stop(0.2)
        assert cut("stopping") == before + 1


def cut(reason: str) -> float:
    """How many connections of the api listener were cut for this reason."""
    labels = {"listener": "api", "reason": reason}
    return REGISTRY.get_sample_value("glamd_http_connections_cut_total", labels) or 0.0


async def test_an_address_that_is_taken_is_a_mistake_of_the_configuration(
    world: World, api: int
) -> None:
    with pytest.raises(ConfigError, match=f"cannot bind 127.0.0.1 port {api}"):
        await world.api_server().start("127.0.0.1", api, None)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1", "not a host"])
async def test_a_host_that_is_not_ours_is_a_mistake_of_the_configuration(
    world: World, host: str
) -> None:
    with pytest.raises(ConfigError, match="cannot bind"):
        await world.api_server().start(host, 0, None)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
async def test_names_and_both_families_are_listened_on(world: World, host: str) -> None:
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = world.api_server()
    port = await server.start(host, 0, None)
    try:
        reader, writer = await asyncio.open_connection(host, port)
        wire = Wire(reader, writer)
        assert (await wire.ask("GET /healthz HTTP/1.1")).status == 200
        writer.transport.abort()
    finally:
        await server.stop(1.0)


async def test_the_api_listener_speaks_tls_and_says_so(world: World, authority: Authority) -> None:
    files = authority.issue("api")
    context = api_tls(certificate=files.certificate, key=files.key)
    async with world.api(context) as port:
        async with connected(port, ssl=authority.trusting()) as wire:
            reply = await wire.ask("GET /healthz HTTP/1.1")
        assert reply.headers["strict-transport-security"].startswith("max-age=")
        async with connected(port) as clear:
            await clear.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await clear.closed()


class TestTlsFiles:
    """Files that cannot be used are named, and their contents are not."""

    def test_a_key_of_another_certificate(self, authority: Authority) -> None:
        one, two = authority.issue("one"), authority.issue("two")
        with pytest.raises(ConfigError, match=r"one\.pem"):
            api_tls(certificate=one.certificate, key=two.key)

    def test_a_certificate_that_is_not_there(self, authority: Authority) -> None:
        files = authority.issue("one")
        with pytest.raises(ConfigError, match=r"none\.pem"):
            api_tls(certificate=files.certificate.with_name("none.pem"), key=files.key)

    def test_a_ca_that_is_none(self, authority: Authority) -> None:
        files = authority.issue("one")
        with pytest.raises(ConfigError, match=r"one\.key"):
            mutual_tls(certificate=files.certificate, key=files.key, client_cas=[files.key])

    def test_an_authority_that_is_the_workers_and_the_devices_too(
        self, authority: Authority, tmp_path: Path
    ) -> None:
        files, devices = authority.issue("one"), Authority(tmp_path, "devices-ca")
        both = tmp_path / "both.pem"
        both.write_bytes(devices.path.read_bytes() + authority.renewed().path.read_bytes())
        for device_ca in (authority.path, both):
            with pytest.raises(ConfigError, match="in common") as caught:
                worker_tls(
                    certificate=files.certificate,
                    key=files.key,
                    worker_ca=authority.path,
                    device_ca=device_ca,
                )
            assert [each.field for each in caught.value.fields] == ["worker.client_ca"]
