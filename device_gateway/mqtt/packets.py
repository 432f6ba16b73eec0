"""The packets of MQTT as values: what was said, not how it stood on the wire.

No rule of the protocol is checked here; the codec does that when it reads and when it writes.
Payloads, passwords and authentication data are kept out of every `repr`.
"""

from dataclasses import dataclass, field
from typing import Final

from device_gateway.mqtt.properties import NO_PROPERTIES, Properties
from device_gateway.mqtt.reasons import Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Will:
    """What the server publishes for a client that vanishes (3.1.2.5)."""

    topic: str
    payload: bytes = field(repr=False)
    qos: int = 0
    retain: bool = False
    properties: Properties = field(default=NO_PROPERTIES, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Client to server, first and once (3.1). `clean_start` is 3.1.1's clean session."""

    version: Version
    client_id: str
    clean_start: bool = True
    keep_alive_s: int = 0
    will: Will | None = None
    username: str | None = field(default=None, repr=False)
    password: bytes | None = field(default=None, repr=False)
    properties: Properties = field(default=NO_PROPERTIES, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connack:
    """Server to client, its answer to CONNECT (3.2). In 3.1.1 the code is a `ReturnCode`."""

    session_present: bool = False
    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Publish:
    """A message, either way (3.3). `packet_id` is 0 exactly when `qos` is."""

    topic: str
    payload: bytes = field(repr=False)
    qos: int = 0
    retain: bool = False
    dup: bool = False
    packet_id: int = 0
    properties: Properties = field(default=NO_PROPERTIES, repr=False)


@dataclass(frozen=True, slots=True)
class Puback:
    """The answer to a QoS 1 PUBLISH (3.4)."""

    packet_id: int
    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Pubrec:
    """The first answer to a QoS 2 PUBLISH (3.5)."""

    packet_id: int
    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Pubrel:
    """The answer to PUBREC (3.6)."""

    packet_id: int
    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Pubcomp:
    """The answer to PUBREL (3.7)."""

    packet_id: int
    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """One topic filter of a SUBSCRIBE with its options (5:3.8.3.1); 3.1.1 has only the QoS."""

    topic_filter: str
    qos: int = 0
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Client to server (3.8), with at least one subscription."""

    packet_id: int
    subscriptions: tuple[Subscription, ...]
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Suback:
    """Server to client (3.9): one code for each subscription, in their order."""

    packet_id: int
    reason_codes: tuple[int, ...]
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Client to server (3.10), with at least one topic filter."""

    packet_id: int
    topic_filters: tuple[str, ...]
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Unsuback:
    """Server to client (3.11): one code for each topic filter; in 3.1.1 there are none."""

    packet_id: int
    reason_codes: tuple[int, ...] = ()
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Pingreq:
    """Client to server (3.12)."""


@dataclass(frozen=True, slots=True)
class Pingresp:
    """Server to client (3.13)."""


@dataclass(frozen=True, slots=True)
class Disconnect:
    """The last packet of a connection (3.14); in 3.1.1 only a client sends it, without a code."""

    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Auth:
    """A step of enhanced authentication, MQTT 5 only (5:3.15)."""

    reason_code: int = 0
    properties: Properties = field(default=NO_PROPERTIES, repr=False)


Acknowledgement = Puback | Pubrec | Pubrel | Pubcomp
Packet = (
    Connect
    | Connack
    | Publish
    | Acknowledgement
    | Subscribe
    | Suback
    | Unsubscribe
    | Unsuback
    | Pingreq
    | Pingresp
    | Disconnect
    | Auth
)

PINGREQ: Final = Pingreq()
PINGRESP: Final = Pingresp()
