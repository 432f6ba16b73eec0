"""Who gets in: certificates, TLS versions, the gateway's word, and crowds that never speak."""

import asyncio
import hashlib
import socket
import ssl
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from device_gateway.mqtt.codec import Properties, Version, Will
from device_gateway.mqtt.connection import State
from device_gateway.mqtt.endpoint import Refusal
from device_gateway.mqtt.limits import EndpointLimits
from glamd.errors import UnavailableError
from tests.support.mqtt_site import PATIENCE_S, Site, until
from tests.support.mqtt_tls import Authority

V3, V5 = Version.V311, Version.V5


async def refused_in_tls(site: Site, context: ssl.SSLContext) -> str:
    """Connects, as far as TLS lets it; the endpoint's word for why it did not."""
    with suppress(ssl.SSLError, ConnectionError):
        # In TLS 1.3 a client believes that the handshake went well until it reads.
        client = await site.open("pos-1", context)
        await client.connect()
        raise AssertionError("the endpoint let it in")
    await until(lambda: site.endpoint.counts.refused)
    (reason,) = site.endpoint.counts.refused
    assert site.endpoint.stats().opening == 0
    return reason


async def refused_silently(site: Site, context: ssl.SSLContext) -> str:
    try:
        return await refused_in_tls(site, context)
    except EOFError:
        await until(lambda: site.endpoint.counts.refused)
        return next(iter(site.endpoint.counts.refused))


async def test_no_certificate(authority: Authority) -> None:
    async with Site(authority) as site:
        assert await refused_silently(site, authority.client_context(None)) == "no_certificate"


async def test_a_certificate_of_another_authority(authority: Authority, tmp_path: Path) -> None:
    foreign = Authority(tmp_path, "test devices")
    async with Site(authority) as site:
        context = foreign.client_context(foreign.issue("pos-1"), trusts=authority)
        assert await refused_silently(site, context) == "certificate_refused"


@pytest.mark.parametrize(
    ("starts", "ends"),
    [
        (-timedelta(days=2), -timedelta(days=1)),
        (timedelta(days=1), timedelta(days=2)),
    ],
)
async def test_a_certificate_that_is_not_valid_today(
    authority: Authority, starts: timedelta, ends: timedelta
) -> None:
    async with Site(authority) as site:
        pair = authority.issue("pos-1", starts=starts, ends=ends)
        context = authority.client_context(pair)
        assert await refused_silently(site, context) == "certificate_refused"


async def test_a_server_certificate_is_no_device(authority: Authority) -> None:
    async with Site(authority) as site:
        context = authority.client_context(authority.issue("pos-1", server=True))
        assert await refused_silently(site, context) == "certificate_refused"


async def test_tls_1_1_is_too_old(authority: Authority) -> None:
    # A ClientHello by hand: today's OpenSSL does not even send one that old.
    hello = b"\x03\x02" + bytes(32) + b"\x00" + b"\x00\x04\xc0\x13\x00\x2f" + b"\x01\x00"
    message = b"\x01" + len(hello).to_bytes(3, "big") + hello
    async with Site(authority) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message)
        async with asyncio.timeout(PATIENCE_S):
            alert = await reader.read()
        writer.close()
        assert alert[0] == 0x15
        assert alert[-2:] == b"\x02\x46"  # fatal, protocol_version
        assert dict(site.endpoint.counts.refused) == {"tls_version": 1}


async def test_tls_1_2_is_enough_and_is_not_resumed(authority: Authority) -> None:
    async with Site(authority) as site:
        context = authority.client_context(site.pair("pos-1"))
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        client = await site.open("pos-1", context)
        await client.connect()
        tls = client._writer.get_extra_info("ssl_object")
        assert tls.version() == "TLSv1.2"
        assert not tls.session.has_ticket


async def test_the_gateway_learns_the_certificate_and_its_common_name(authority: Authority) -> None:
    async with Site(authority) as site:
        await site.client("Pos_1-a")
        certificate = x509.load_pem_x509_certificate(site.pair("Pos_1-a")[0].read_bytes())
        digest = hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
        assert site.gateway.admitted == [("Pos_1-a", digest)]


@pytest.mark.parametrize("name", ["pos 1", "pos/1", "pos+1", "pos.1", "pös", "#"])
async def test_a_common_name_that_is_no_device_id_is_told_so(
    authority: Authority, name: str
) -> None:
    async with Site(authority) as site:
        pair = authority.issue(name)
        five = await site.open(name, authority.client_context(pair))
        assert (await five.connect()).reason_code == 0x87
        three = await site.open(name, authority.client_context(pair))
        assert (await three.connect(V3)).reason_code == 5
        assert site.gateway.admitted == []


async def test_a_refused_device_is_told_why(authority: Authority) -> None:
    async with Site(authority) as site:
        site.gateway.refuses = Refusal("the device is revoked")
        five = await site.open("pos-1")
        connack = await five.connect()
        assert connack.reason_code == 0x87
        assert connack.properties.reason_string == "the device is revoked"
        assert await five.ending() == []
        three = await site.open("pos-1")
        assert (await three.connect(V3)).reason_code == 5
        terse = await site.open("pos-1")
        connack = await terse.connect(properties=Properties(request_problem_information=0))
        assert connack.properties.reason_string is None
        small = await site.open("pos-1")
        connack = await small.connect(properties=Properties(maximum_packet_size=20))
        assert connack.reason_code == 0x95
        assert site.gateway.events == []


@pytest.mark.parametrize("error", [UnavailableError("away"), RuntimeError("a bug")])
async def test_a_gateway_that_cannot_say_sends_the_client_away_for_now(
    authority: Authority, error: Exception
) -> None:
    async with Site(authority) as site:
        site.gateway.refuses = error
        five = await site.open("pos-1")
        assert (await five.connect()).reason_code == 0x88
        three = await site.open("pos-1")
        assert (await three.connect(V3)).reason_code == 3


async def test_a_gateway_that_does_not_answer_is_waited_for_so_long(authority: Authority) -> None:
    async with Site(authority, EndpointLimits(admit_timeout_s=0.02)) as site:
        site.gateway.admission = asyncio.Event()
        client = await site.open("pos-1")
        assert (await client.connect()).reason_code == 0x88


async def test_a_device_cut_off_while_it_is_being_admitted_does_not_slip_in(
    authority: Authority,
) -> None:
    async with Site(authority) as site:
        site.gateway.admission = asyncio.Event()
        client = await site.open("pos-1")
        connecting = asyncio.ensure_future(client.connect())
        await until(lambda: site.gateway.admitted)
        site.endpoint.disconnect("pos-1", "DEVICE_REVOKED")
        site.gateway.admission.set()
        with pytest.raises((EOFError, ConnectionError, ssl.SSLError)):
            await connecting
        assert site.gateway.events == []


async def test_a_connect_that_cannot_be_kept_is_refused(authority: Authority) -> None:
    foreign = Will(topic="pos/v1/pos-2/status", payload=b"")
    twice = Will(topic="pos/v1/pos-1/status", payload=b"", qos=2)
    async with Site(authority) as site:
        client = await site.open("pos-1")
        assert (await client.connect(will=foreign)).reason_code == 0x87
        client = await site.open("pos-1")
        assert (await client.connect(will=twice)).reason_code == 0x9B
        client = await site.open("pos-1")
        assert (await client.connect(V3, will=foreign)).reason_code == 5
        client = await site.open("pos-1")
        with pytest.raises(EOFError):
            await client.connect(V3, will=twice)
        client = await site.open("pos-1")
        assert (await client.connect(V3, client_id="", clean_start=False)).reason_code == 2
        client = await site.open("pos-1")
        wish = Properties(authentication_method="SCRAM-SHA-1")
        assert (await client.connect(properties=wish)).reason_code == 0x8C
        assert site.gateway.admitted == []


async def test_new_connections_get_the_replaced_certificate(
    authority: Authority, tmp_path: Path
) -> None:
    async with Site(authority) as site:
        old = await site.client("pos-1")
        renewed = Authority(tmp_path, "renewed")
        context = renewed.server_context()
        context.load_verify_locations(authority.ca_file)
        site.endpoint.replace_tls(context)
        context = authority.client_context(site.pair("pos-2"), trusts=renewed)
        new = await site.open("pos-2", context)
        await new.connect()
        await site.works(old)


async def test_hundreds_without_a_handshake_disturb_nobody(authority: Authority) -> None:
    limits = EndpointLimits(
        max_opening=300, sweep_interval_s=0.01, handshake_timeout_s=10, close_timeout_s=0.1
    )
    async with Site(authority, limits) as site:
        good = await site.client("pos-1")
        silent = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(600)]
        await until(lambda: site.endpoint.counts.connections == 601)
        await site.works(good)
        assert site.endpoint.stats().opening == 300
        assert site.endpoint.counts.refused["made_room"] == 300
        late = await site.client("pos-2")  # a newcomer gets in past the crowd
        await site.works(late)
        site.clock.advance(10.1)
        await until(lambda: site.endpoint.stats().opening == 0)
        assert site.endpoint.counts.refused["handshake_timeout"] == 299
        await site.works(good)
        for one in silent:
            one.close()


async def test_beyond_the_maximum_a_connection_is_closed_at_once(authority: Authority) -> None:
    async with Site(authority, EndpointLimits(max_connections=1)) as site:
        good = await site.client("pos-1")
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        await site.works(good)
        assert site.endpoint.counts.refused == {"too_many_connections": 1}


async def test_half_a_handshake_and_no_connect_are_not_waited_for_long(
    authority: Authority,
) -> None:
    limits = EndpointLimits(sweep_interval_s=0.01, handshake_timeout_s=5, connect_timeout_s=3)
    async with Site(authority, limits) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(b"\x16\x03\x01\x02\x00\x01")
        client = await site.open("pos-1")
        await until(lambda: site.in_state(State.CONNECT) == 1)
        await until(lambda: site.in_state(State.HANDSHAKE) == 1)
        site.clock.advance(3.1)
        assert await client.ending() == []
        site.clock.advance(2)
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        assert site.endpoint.counts.refused == {"connect_timeout": 1, "handshake_timeout": 1}
