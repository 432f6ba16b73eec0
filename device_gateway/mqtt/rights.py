"""What a device may do on which of its topics (spec 2), by the names of `device_gateway.topics`.

Pure. A device's filters can only cover its own three downlink topics, so that a subscription is
looked up and never matched.
"""

from typing import Final

from device_gateway import topics

_DOWNLINK: Final = tuple(sorted(topics.DOWNLINK))
_FILTERS: Final[dict[str, tuple[str, ...]]] = {
    **{channel: (channel,) for channel in _DOWNLINK},
    "+": _DOWNLINK,
    "#": _DOWNLINK,
}


def prefix(device_id: str) -> str:
    """What every topic of the device starts with, slash included."""
    return topics.build(device_id, "request").removesuffix("request")


def may_publish(own_prefix: str, topic: str) -> bool:
    """Whether the device of `own_prefix` may publish on `topic`."""
    return topic.startswith(own_prefix) and topic[len(own_prefix) :] in topics.UPLINK


def may_receive(own_prefix: str, topic: str) -> bool:
    """Whether `topic` is one on which the device of `own_prefix` is spoken to."""
    return topic.startswith(own_prefix) and topic[len(own_prefix) :] in topics.DOWNLINK


def covered(own_prefix: str, topic_filter: str) -> tuple[str, ...]:
    """The device's own downlink topics that the filter covers; none if it may not have it."""
    if not topic_filter.startswith(own_prefix):
        return ()
    channels = _FILTERS.get(topic_filter[len(own_prefix) :], ())
    return tuple(own_prefix + channel for channel in channels)
