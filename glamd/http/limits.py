"""Every bound of the HTTP side, and the token bucket that holds callers to their rate.

No policy of who is limited lives here (that is `middleware`), no HTTP answer either.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

from glamd.clock import Clock

MAX_BUCKETS = 10_000
"""Callers remembered at once; the one not seen for longest is forgotten first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Sizes in bytes and times in seconds that one listener holds its clients to.

    The contract closes a silent or slow connection within 10 s; the timers are a little shorter,
    so that the close itself still falls inside. A client has `write_timeout_s` for each piece of an
    answer and `answer_timeout_s` for all of it; `unsent_bytes` is about what the kernel keeps of it
    beyond what is on its way. `header_bytes` is for one name or value; it differs from `line_bytes`
    so that the parser's error tells which of them it was.
    """

    body_bytes: int = 256 * 1024
    head_timeout_s: float = 9.5
    body_timeout_s: float = 9.5
    handler_timeout_s: float = 30.0
    write_timeout_s: float = 9.5
    answer_timeout_s: float = 60.0
    handshake_timeout_s: float = 9.5
    keepalive_s: float = 75.0
    linger_s: float = 2.0
    line_bytes: int = 8190
    header_bytes: int = 8192
    headers: int = 64
    unsent_bytes: int = 64 * 1024
    connections: int = 4096
    backlog: int = 512

    def __post_init__(self) -> None:
        assert self.line_bytes != self.header_bytes


class RateLimiter:
    """A token bucket for each caller: `rate_per_s` on average, `burst` at once."""

    def __init__(
        self, *, rate_per_s: float, burst: int, clock: Clock, buckets: int = MAX_BUCKETS
    ) -> None:
        assert rate_per_s > 0
        assert burst >= 1
        assert buckets >= 1
        self._rate_per_s = rate_per_s
        self._burst = float(burst)
        self._clock = clock
        self._limit = buckets
        # Caller to (tokens left, when that was true), least recently seen first.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> int:
        """Take one token; 0 when there was one, else whole seconds (≥ 1) until there is."""
        now = self._clock.monotonic_s()
        tokens = self._tokens(caller, now)
        wait_s = self._wait_s(tokens)
        if not wait_s:
            tokens -= 1.0
        self._buckets[caller] = (tokens, now)
        self._buckets.move_to_end(caller)
        if len(self._buckets) > self._limit:
            self._buckets.popitem(last=False)
        return wait_s

    def peek(self, caller: str) -> int:
        """What `take` would say, taking nothing and remembering nobody."""
        return self._wait_s(self._tokens(caller, self._clock.monotonic_s()))

    def _tokens(self, caller: str, now_s: float) -> float:
        tokens, since_s = self._buckets.get(caller, (self._burst, now_s))
        return min(self._burst, tokens + (now_s - since_s) * self._rate_per_s)

    def _wait_s(self, tokens: float) -> int:
        return 0 if tokens >= 1.0 else max(1, math.ceil((1.0 - tokens) / self._rate_per_s))
