"""Headers and delivery counts of messages, as servers and strangers may write them."""

from hypothesis import given
from hypothesis import strategies as st

from glamd.events.message import DESCRIPTION, STATUS, Message, headers_of


def message(reply: str = "", block: bytes = b"", body: bytes = b"{}") -> Message:
    """A message whose answer nobody hears."""
    return Message("evt.x", reply, body, block, lambda _subject, _word: None)


@given(block=st.binary(max_size=200))
def test_no_block_of_headers_is_an_error(block: bytes) -> None:
    assert all(isinstance(value, str) for value in headers_of(block).values())


@given(reply=st.text(max_size=100) | st.from_regex(r"\$JS\.ACK(\.[0-9a-z_²]{1,3}){0,12}"))
def test_no_reply_makes_a_count_that_is_no_number(reply: str) -> None:
    assert message(reply).deliveries >= 0


def test_a_block_that_has_nothing_but_its_version_has_no_headers() -> None:
    assert headers_of(b"NATS/1.0\r\n\r\n") == headers_of(b"") == {}


def test_of_a_header_that_stands_there_twice_the_first_counts() -> None:
    block = b"NATS/1.0\r\nce-source: glamd\r\nce-source:other\r\nce-id:  a:b \r\n\r\n"
    assert headers_of(block) == {"ce-source": "glamd", "ce-id": "a:b"}


def test_what_the_server_says_stands_under_status_with_what_else_it_has_to_tell() -> None:
    assert headers_of(b"NATS/1.0 503\r\n\r\n") == {STATUS: "503", DESCRIPTION: ""}
    assert headers_of(b"NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 1\r\n\r\n") == {
        STATUS: "408",
        DESCRIPTION: "Request Timeout",
        "Nats-Pending-Messages": "1",
    }


def test_deliveries_are_counted_by_servers_with_and_without_domains() -> None:
    assert message("$JS.ACK.GLAM_EVENTS.c.7.10.11.1700000000000000000.0").deliveries == 7
    assert message("$JS.ACK._.hash.GLAM_EVENTS.c.7.10.11.1700000000000000000.0").deliveries == 7
    assert message("$JS.ACK._.h.GLAM_EVENTS.c.7.10.11.1700000000000000000.0.r").deliveries == 7


def test_a_reply_that_is_not_jetstreams_counts_as_the_first_delivery() -> None:
    for reply in ("", "_INBOX.x", "$JS.ACK", "$JS.ACK.a.b.c", "$JS.ACK.s.c.x.1.1.1.0"):
        assert message(reply).deliveries == 1


def test_a_message_shows_no_payload() -> None:
    assert "secret" not in repr(message(body=b"secret", block=b"secret"))
