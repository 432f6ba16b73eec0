"""Latencies by their size: a bounded histogram, exact below 128 µs and within 1 % above it. Pure.

An array of counters and nothing else, because the load generator shares its cores with what it
measures. Showing it to people is the command's business.
"""

from collections.abc import Iterator
from typing import Final

_EXACT_BITS: Final = 7
_PER_OCTAVE: Final = 1 << (_EXACT_BITS - 1)
_LONGEST_BITS: Final = 32  # 71 minutes; anything longer counts as that
_BUCKETS: Final = (_LONGEST_BITS - _EXACT_BITS + 2) * _PER_OCTAVE


class Histogram:
    """Counts durations in microseconds; `percentile` never says less than what was measured."""

    __slots__ = ("_counts", "count", "max_us")

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0
        self.max_us = 0

    def record(self, duration_us: int) -> None:
        """Count one duration; a negative one, from a clock's hiccup, is none at all."""
        value = min(max(duration_us, 0), (1 << _LONGEST_BITS) - 1)
        shift = max(value.bit_length() - _EXACT_BITS, 0)
        self._counts[shift * _PER_OCTAVE + (value >> shift)] += 1
        self.count += 1
        self.max_us = max(self.max_us, value)

    def percentile(self, share: float) -> int:
        """The duration in µs that `share` (0 to 1) of all do not exceed; 0 when there is none."""
        wanted = max(1, -int(-share * self.count // 1))
        seen = 0
        for upper_us, count in self._upper_bounds():
            seen += count
            if seen >= wanted:
                return min(upper_us, self.max_us)
        return 0

    def octaves(self) -> list[tuple[int, int]]:
        """For showing: (upper bound in µs, count) by powers of two, from the first to the last."""
        sums: dict[int, int] = {}
        for upper_us, count in self._upper_bounds():
            bits = upper_us.bit_length()
            sums[bits] = sums.get(bits, 0) + count
        if not sums:
            return []
        return [(1 << bits, sums.get(bits, 0)) for bits in range(min(sums), max(sums) + 1)]

    def _upper_bounds(self) -> Iterator[tuple[int, int]]:
        """(largest µs that falls in it, count) of each bucket that is not empty, in order."""
        for index, count in enumerate(self._counts):
            if count:
                shift = max(index // _PER_OCTAVE - 1, 0)
                yield ((index - shift * _PER_OCTAVE + 1) << shift) - 1, count
