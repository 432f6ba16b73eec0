"""The token bucket and the caller's address."""

from ipaddress import ip_network
from unittest.mock import Mock

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from glamd.http.addresses import ClientAddress
from glamd.http.limits import RateLimiter
from tests.support.http_fakes import ManualClock


class TestRateLimiter:
    """Tokens come back with time, and only so many are kept."""

    def test_a_burst_is_taken_and_then_nothing(self) -> None:
        limiter = RateLimiter(rate_per_s=1, burst=3, clock=ManualClock())
        assert [limiter.take("a") for _ in range(5)] == [0, 0, 0, 1, 1]

    def test_asking_in_vain_costs_nothing(self) -> None:
        clock = ManualClock()
        limiter = RateLimiter(rate_per_s=1, burst=1, clock=clock)
        limiter.take("a")
        for _ in range(9):
            clock.advance(0.1)
            assert limiter.take("a") == 1
        clock.advance(0.11)
        assert limiter.take("a") == 0

    def test_looking_takes_nothing_and_remembers_nobody(self) -> None:
        clock = ManualClock()
        limiter = RateLimiter(rate_per_s=0.1, burst=1, clock=clock, buckets=1)
        assert [limiter.peek("a") for _ in range(3)] == [0, 0, 0]
        assert limiter.take("a") == 0
        # Whoever is looked at takes no place of those that are held to something.
        assert limiter.peek("b") == 0
        assert [limiter.peek("a"), limiter.take("a"), limiter.peek("a")] == [10, 10, 10]
        clock.advance(10)
        assert [limiter.peek("a"), limiter.peek("a"), limiter.take("a")] == [0, 0, 0]

    def test_a_long_pause_gives_a_burst_and_no_more(self) -> None:
        clock = ManualClock()
        limiter = RateLimiter(rate_per_s=100, burst=2, clock=clock)
        limiter.take("a")
        clock.advance(3600)
        assert [limiter.take("a") for _ in range(3)] == [0, 0, 1]

    @pytest.mark.parametrize(("rate", "wait"), [(1000.0, 1), (1.0, 1), (0.5, 2), (0.3, 4)])
    def test_the_wait_is_in_whole_seconds_and_enough(self, rate: float, wait: int) -> None:
        clock = ManualClock()
        limiter = RateLimiter(rate_per_s=rate, burst=1, clock=clock)
        limiter.take("a")
        assert limiter.take("a") == wait
        clock.advance(wait)
        assert limiter.take("a") == 0

    def test_the_longest_unseen_caller_is_forgotten_first(self) -> None:
        limiter = RateLimiter(rate_per_s=0.001, burst=1, clock=ManualClock(), buckets=2)
        assert [limiter.take(caller) for caller in "abab"] == [0, 0, 1000, 1000]
        limiter.take("a")
        assert limiter.take("c") == 0
        assert limiter.take("a") == 1000
        assert limiter.take("b") == 0


PROXIES = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]


def address(peer: object, *forwarded: str) -> str:
    """The address that a request from `peer` with these headers has."""
    transport = Mock()
    transport.get_extra_info = {"peername": peer}.get
    request: web.Request = make_mocked_request(
        "GET", "/", headers=[("X-Forwarded-For", f) for f in forwarded], transport=transport
    )
    handler = Mock(peername=peer)
    request._protocol = handler
    return ClientAddress(PROXIES).of(request)


class TestClientAddress:
    """`X-Forwarded-For` counts only from proxies that the operator named."""

    @pytest.mark.parametrize(
        ("peer", "forwarded", "expected"),
        [
            (("203.0.113.1", 1), (), "203.0.113.1"),
            (("203.0.113.1", 1), ("198.51.100.7",), "203.0.113.1"),
            (("203.0.113.1", 1), ("10.0.0.1",), "203.0.113.1"),
            (("10.0.0.1", 1), ("198.51.100.7",), "198.51.100.7"),
            (("10.0.0.1", 1), ("1.2.3.4, 198.51.100.7",), "198.51.100.7"),
            (("10.0.0.1", 1), ("198.51.100.7, 10.0.0.2, 10.0.0.3",), "198.51.100.7"),
            (("10.0.0.1", 1), ("1.2.3.4", "198.51.100.7"), "198.51.100.7"),
            (("10.0.0.1", 1), ("10.0.0.2",), "10.0.0.2"),
            (("10.0.0.1", 1), ("198.51.100.7, nonsense",), "10.0.0.1"),
            (("10.0.0.1", 1), ("nonsense, 10.0.0.2",), "10.0.0.2"),
            (("10.0.0.1", 1), ("",), "10.0.0.1"),
            (("10.0.0.1", 1), ("198.51.100.7:443",), "10.0.0.1"),
            (("10.0.0.1", 1), ("1.2.3.4," + "10.0.0.2," * 5000,), "10.0.0.1"),
            (("10.0.0.1", 1), ("1.2.3.4" + ",10.0.0.2" * 20,), "10.0.0.2"),
            (("::ffff:10.0.0.1", 1, 0, 0), ("::ffff:198.51.100.7",), "198.51.100.7"),
            (("fd00::1", 1, 0, 0), ("2001:db8::1",), "2001:db8::1"),
            (("fe80::1%eth0", 1, 0, 2), (), "fe80::1%eth0"),
            ("", ("198.51.100.7",), "-"),
            (None, ("198.51.100.7",), "-"),
        ],
        ids=str,
    )
    def test_the_nearest_hop_that_nobody_trusted_vouches_for(
        self, peer: object, forwarded: tuple[str, ...], expected: str
    ) -> None:
        assert address(peer, *forwarded) == expected
