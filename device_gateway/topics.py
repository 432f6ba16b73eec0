"""The five topics of a device: building and parsing `pos/v1/{device_id}/{channel}`. Pure.

Who may use which topic is decided by the endpoint and the session, with the names from here. No
payload is looked at in this file, and nothing of MQTT but the shape of a topic.
"""

import re
from dataclasses import dataclass
from typing import Final, Literal

from glamd.errors import InputError

Channel = Literal["request", "response", "status", "config", "command"]

DEVICE_ID_LIMIT_CHARS: Final = 64
_DEVICE_ID: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{DEVICE_ID_LIMIT_CHARS}}}")
_PREFIX: Final = "pos/v1/"
_CHANNELS: Final[dict[str, Channel]] = {
    "request": "request",
    "response": "response",
    "status": "status",
    "config": "config",
    "command": "command",
}
UPLINK: Final[frozenset[Channel]] = frozenset({"request", "status"})
DOWNLINK: Final[frozenset[Channel]] = frozenset({"response", "config", "command"})


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic of one device, taken apart."""

    device_id: str
    channel: Channel


def is_device_id(text: str) -> bool:
    """Whether `text` is a device id: 1 to 64 of `A-Z a-z 0-9 _ -` (spec 2)."""
    return _DEVICE_ID.fullmatch(text) is not None


def build(device_id: str, channel: Channel) -> str:
    """The topic of `device_id` for `channel`; InputError when the id is none.

    An id with `/`, `+` or `#` in it would name other devices' topics, so none gets through here.
    """
    if not is_device_id(device_id):
        raise InputError("not a device id", code="MALFORMED")
    return f"{_PREFIX}{device_id}/{channel}"


def parse(topic: str) -> Topic | None:
    """The device and channel of `topic`, or None where it is not a device's topic at all."""
    if not topic.startswith(_PREFIX):
        return None
    device_id, separator, name = topic[len(_PREFIX) :].partition("/")
    channel = _CHANNELS.get(name)
    if not separator or channel is None or not is_device_id(device_id):
        return None
    return Topic(device_id, channel)
