"""Which transaction counters an initial key has spent: a sliding bit window. Pure arithmetic.

The rule is spec'd for DUKPT devices that store taps while offline: a counter may come late, but
never twice, and never from further behind than the window. Where the window is kept, and what
fences two gateways that move it at once, is the business of `glamd.payments.store`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CounterWindow:
    """The highest counter seen and a bit for each of the `size_bits` counters at and below it.

    Bit i of `seen` stands for the counter `highest - i`. A new window has spent nothing.
    """

    size_bits: int
    highest: int = 0
    seen: int = 0

    def refusal(self, counter: int) -> str | None:
        """The error code that refuses this counter, or None where it may be spent."""
        behind = self.highest - counter
        if behind < 0:
            return None
        if behind >= self.size_bits:
            return "KSN_TOO_OLD"
        return "KSN_REPLAYED" if self.seen >> behind & 1 else None

    def spend(self, counter: int) -> "CounterWindow":
        """The window after this counter, which must be one that `refusal` lets pass."""
        behind = self.highest - counter
        if behind >= 0:
            return CounterWindow(self.size_bits, self.highest, self.seen | 1 << behind)
        mask = (1 << self.size_bits) - 1
        # A jump beyond the window forgets it whole; shifting by so much would cost memory.
        kept = 0 if -behind >= self.size_bits else self.seen << -behind & mask
        return CounterWindow(self.size_bits, counter, kept | 1)

    def seen_bytes(self) -> bytes:
        """`seen` as `size_bits` / 8 bytes, big-endian, for the database."""
        return self.seen.to_bytes(self.size_bits // 8, "big")

    @classmethod
    def load(cls, *, size_bits: int, highest: int, seen: bytes) -> "CounterWindow":
        """From the database; a window that was made smaller since forgets its far end."""
        mask = (1 << size_bits) - 1
        return cls(size_bits, highest, int.from_bytes(seen, "big") & mask)
