"""A message as it came over the wire, read as far as somebody asks. Pure.

nats-py reads the headers of each message at once, and brings it through a queue to a task; without
both, and with acknowledgements that wait for nothing, consuming takes a quarter less time.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

STATUS: Final = "Status"
DESCRIPTION: Final = "Description"
"""Under these names stands what the server itself says, in a block's first line (NATS ADR-4)."""

FIRST_DELIVERY: Final = 1

_VERSION: Final = "NATS/1.0"
_STATUS_CHARS: Final = 3
# `$JS.ACK.<stream>.<consumer>.<delivered>.…`, with a domain and an account before the stream where
# the server is newer or has them.
_ACK_PREFIX: Final = ("$JS", "ACK")
_SHORT_TOKENS: Final = 9
_LONG_TOKENS: Final = 11


class Message(NamedTuple):
    """What came: `block` are the headers as bytes, empty where there are none.

    `reply` is empty where nobody waits for an answer.
    """

    subject: str
    reply: str
    body: bytes
    block: bytes
    send: Callable[[str, bytes], None]

    def __repr__(self) -> str:
        """Its subject alone: a payload belongs into no log."""
        return f"Message({self.subject})"

    @property
    def headers(self) -> dict[str, str]:
        """The headers; of those that stand there twice, the first."""
        return headers_of(self.block)

    @property
    def deliveries(self) -> int:
        """How often JetStream has delivered it, this time too."""
        tokens = self.reply.split(".")
        if tuple(tokens[:2]) != _ACK_PREFIX:
            return FIRST_DELIVERY
        place = 4 if len(tokens) == _SHORT_TOKENS else 6
        known = len(tokens) == _SHORT_TOKENS or len(tokens) >= _LONG_TOKENS
        return int(tokens[place]) if known and tokens[place].isdecimal() else FIRST_DELIVERY

    def answer(self, word: bytes) -> None:
        """Say what became of it; whether that arrives is not known."""
        self.send(self.reply, word)


def headers_of(block: bytes) -> dict[str, str]:
    """The headers of a block; whatever is not one is passed over."""
    first, *lines = block.decode("utf-8", "replace").split("\r\n")
    found: dict[str, str] = {}
    told = first.removeprefix(_VERSION).strip()
    if told:
        found[STATUS], found[DESCRIPTION] = told[:_STATUS_CHARS], told[_STATUS_CHARS:].strip()
    for line in lines:
        name, separator, value = line.partition(":")
        if separator:
            found.setdefault(name, value.strip())
    return found
