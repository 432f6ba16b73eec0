"""Topics: what is not a device's topic is none, and no device id can reach beside its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_gateway import topics
from glamd.errors import InputError


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "pos/v1",
        "pos/v1/",
        "pos/v1/dev",
        "pos/v1/dev/",
        "pos/v1//request",
        "pos/v1/dev/requests",
        "pos/v1/dev/request/",
        "pos/v1/dev/request/more",
        "pos/v1/a/b/request",
        "pos/v1/+/request",
        "pos/v1/#",
        "pos/v1/dev\n/request",
        "pos/v1/dev\0/request",
        "pos/v1/dév/request",
        "pos/v2/dev/request",
        "/pos/v1/dev/request",
        "POS/v1/dev/request",
        "pos/v1/dev/Request",
        f"pos/v1/{'a' * 65}/request",
    ],
)
def test_what_is_not_exactly_a_devices_topic_is_none(topic: str) -> None:
    assert topics.parse(topic) is None


@pytest.mark.parametrize(
    "device_id", ["", "a" * 65, "a/b", "+", "#", "a\n", "é", "a b", "a.b", "\0"]
)
def test_a_bad_device_id_builds_no_topic(device_id: str) -> None:
    with pytest.raises(InputError):
        topics.build(device_id, "request")


@given(
    st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    st.sampled_from(sorted(topics.UPLINK | topics.DOWNLINK)),
)
def test_what_is_built_parses_back(device_id: str, channel: topics.Channel) -> None:
    assert topics.parse(topics.build(device_id, channel)) == topics.Topic(device_id, channel)


@given(st.text())
def test_any_text_is_parsed_or_none(text: str) -> None:
    parsed = topics.parse(text)
    if parsed is not None:
        assert topics.build(parsed.device_id, parsed.channel) == text


def test_no_channel_goes_both_ways() -> None:
    assert not topics.UPLINK & topics.DOWNLINK
