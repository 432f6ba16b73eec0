"""Where packets end, what is refused before it is there, and what hostile bytes may cause."""

import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_gateway.mqtt.codec import (
    PINGREQ,
    Connect,
    Decoder,
    Disconnect,
    Packet,
    ProtocolError,
    Puback,
    Publish,
    ReasonCode,
    Version,
    encode,
)

LIMIT = 4096


def everything(decoder: Decoder, *chunks: bytes) -> list[Packet]:
    return [packet for chunk in chunks for packet in decoder.feed(chunk)]


def refusal(*chunks: bytes, version: Version | None = None, limit: int = LIMIT) -> ProtocolError:
    decoder = Decoder(limit, version)
    with pytest.raises(ProtocolError) as caught:
        everything(decoder, *chunks)
    return caught.value


def test_a_packet_announced_too_long_is_refused_at_its_header() -> None:
    # 268,435,455 bytes announced, five bytes sent.
    error = refusal(b"\x30\xff\xff\xff\x7f", version=Version.V5)
    assert error.reason_code is ReasonCode.PACKET_TOO_LARGE


@pytest.mark.parametrize("version", Version)
def test_the_limit_counts_the_whole_packet_with_its_header(version: Version) -> None:
    fits = encode(Publish("t", b"x" * 3000), version)
    decoder = Decoder(len(fits), version)
    assert everything(decoder, fits) == [Publish("t", b"x" * 3000)]
    error = refusal(fits, version=version, limit=len(fits) - 1)
    assert error.reason_code is ReasonCode.PACKET_TOO_LARGE


def test_a_remaining_length_of_five_bytes_is_malformed() -> None:
    error = refusal(b"\x30\x80\x80\x80\x80\x01", version=Version.V311)
    assert error.reason_code is ReasonCode.MALFORMED_PACKET


def test_a_padded_remaining_length_is_malformed_in_5_and_read_in_311() -> None:
    assert refusal(b"\xc0\x80\x00", version=Version.V5).reason_code == 0x81
    assert everything(Decoder(LIMIT, Version.V311), b"\xc0\x80\x00") == [PINGREQ]


@pytest.mark.parametrize("version", Version)
def test_a_padded_length_of_connect_is_judged_by_the_version_inside(version: Version) -> None:
    whole = encode(Connect(version=version, client_id="a"), version)
    padded = bytes((whole[0], whole[1] | 0x80, 0)) + whole[2:]
    if version is Version.V5:
        assert refusal(padded).reason_code == 0x81
    else:
        assert len(everything(Decoder(LIMIT), padded)) == 1


def test_the_first_byte_alone_refuses_what_is_not_a_connect() -> None:
    # A TLS client hello, an HTTP request, an SSH banner: one byte is enough.
    for first in (b"\x16", b"G", b"S", b"\x30", b"\x00"):
        assert refusal(first).reason_code in (0x81, 0x82)


def test_a_second_connect_is_a_protocol_error() -> None:
    connect = encode(Connect(version=Version.V5, client_id="a"), Version.V5)
    decoder = Decoder(LIMIT)
    packets = decoder.feed(connect + connect)
    assert isinstance(next(packets), Connect)
    with pytest.raises(ProtocolError) as caught:
        next(packets)
    assert caught.value.reason_code is ReasonCode.PROTOCOL_ERROR


def test_an_error_comes_after_the_good_packets_before_it_and_is_final() -> None:
    decoder = Decoder(LIMIT, Version.V5)
    decoder.feed(encode(Puback(7), Version.V5) + b"\xff\x00")
    assert next(decoder) == Puback(7)
    for _ in range(2):
        with pytest.raises(ProtocolError):
            next(decoder.feed(encode(Puback(8), Version.V5)))


def test_an_unknown_protocol_leaves_the_version_unknown() -> None:
    for body in (b"\x00\x06MQIsdp\x03", b"\x00\x04MQTT\x06", b"\x00\x04MQTT\x03"):
        decoder = Decoder(LIMIT)
        whole = body + b"\x02\x00\x3c\x00\x01a"
        with pytest.raises(ProtocolError) as caught:
            list(decoder.feed(bytes((0x10, len(whole))) + whole))
        assert caught.value.reason_code is ReasonCode.UNSUPPORTED_PROTOCOL_VERSION
        assert decoder.version is None


@pytest.mark.parametrize("version", Version)
def test_packets_come_out_the_same_in_pieces_of_every_size(version: Version) -> None:
    sent: list[Packet] = [
        Connect(version=version, client_id="terminal", keep_alive_s=60),
        Publish("pos/v1/a/request", b"x" * 300, 1, packet_id=1),
        Puback(65_535),
        PINGREQ,
        Publish("t", b""),
        Disconnect(),
    ]
    stream = b"".join(encode(packet, version) for packet in sent)
    for size in (1, 2, 3, 5, 7, 64, 299, len(stream)):
        chunks = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert everything(Decoder(LIMIT), *chunks) == sent


def test_what_was_not_taken_stays_for_the_next_time() -> None:
    decoder = Decoder(LIMIT, Version.V5)
    decoder.feed(b"".join(encode(Puback(n), Version.V5) for n in (1, 2, 3)))
    assert next(decoder) == Puback(1)
    assert list(decoder.feed(encode(Puback(4), Version.V5))) == [Puback(2), Puback(3), Puback(4)]


def test_a_slow_sender_holds_no_more_than_its_one_packet() -> None:
    whole = encode(Publish("t", b"x" * 60_000), Version.V5)
    decoder = Decoder(65_536, Version.V5)
    tracemalloc.start()
    try:
        for index in range(len(whole) - 1):
            assert not list(decoder.feed(whole[index : index + 1]))
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    assert len(list(decoder.feed(whole[-1:]))) == 1


@settings(max_examples=400, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=8), st.sampled_from([None, *Version]))
def test_any_bytes_give_packets_or_a_protocol_error(
    chunks: list[bytes], version: Version | None
) -> None:
    with suppress(ProtocolError):
        everything(Decoder(128, version), *chunks)


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from([None, *Version]), st.integers(0, 255), st.binary(max_size=120), st.booleans()
)
def test_a_well_framed_body_of_any_bytes_gives_a_packet_or_a_protocol_error(
    version: Version | None, first: int, body: bytes, like_connect: bool
) -> None:
    if like_connect:
        first, body = 0x10, b"\x00\x04MQTT" + bytes((4 + len(body) % 2,)) + body
    with suppress(ProtocolError):
        everything(Decoder(LIMIT, version), bytes((first, len(body))) + body)
