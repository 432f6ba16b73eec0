"""The tree that DUKPT's keys hang on: which transaction counters exist, and the key at each.

In both of DUKPT's forms the key of a counter is derived from the key of the same counter with its
lowest one bit cleared, and the initial key is that of counter 0. A counter's one bits, highest
first, are therefore the way from the root to its key, and neighbours share almost all of that way.
How one step is computed belongs to `dukpt_tdes` and `dukpt_aes`, and so does what becomes of a key.
"""

from collections.abc import Callable
from dataclasses import dataclass

from glamd.errors import CryptoError, FieldError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterRule:
    """A counter has `width_bits` bits, of which 1 to `ones_limit` are one; others are skipped.

    The limit bounds the steps from an initial key to any of its keys.
    """

    width_bits: int
    ones_limit: int

    def valid(self, counter: int) -> bool:
        """Whether a device may use this counter."""
        return 0 < counter < 1 << self.width_bits and counter.bit_count() <= self.ones_limit

    def next_after(self, counter: int) -> int | None:
        """The smallest counter above this one that a device may use; None where none is left."""
        counter = max(counter, 0)
        while True:
            # At the limit, everything up to the next carry has more ones still: go there at once.
            # Each round with too many ones carries one of them away: fewer rounds than bits.
            full = counter.bit_count() >= self.ones_limit
            counter += counter & -counter if full else 1
            if counter >> self.width_bits:
                return None
            if counter.bit_count() <= self.ones_limit:
                return counter


class KeyTree:
    """The keys of one initial key by counter, remembering those that later counters start from.

    For each bit one key is held: of the last way whose lowest one bit it was. That makes at most
    `rule.width_bits` keys; counters in sequence cost one step each, and in any other order the
    result is the same, only dearer (at most `rule.ones_limit` steps).
    """

    __slots__ = ("_held", "_root", "_rule", "_step")

    def __init__(
        self, rule: CounterRule, initial_key: bytes, step: Callable[[bytes, int], bytes]
    ) -> None:
        """`step(parent_key, counter)` derives the key of `counter` from its parent's.

        It must not refer back to this object: such a cycle would keep keys alive until the
        garbage collector comes by.
        """
        self._rule = rule
        # What is held for long is held in bytearrays, which `forget` can overwrite. The bytes that
        # a derivation takes and makes live as long as one message, and are freed as they are.
        self._root: bytearray | None = bytearray(initial_key)
        self._step = step
        self._held: dict[int, tuple[int, bytearray]] = {}

    def key_at(self, counter: int) -> bytes:
        """The key of this counter.

        Raises `InputError` (`KSN_INVALID`) for a counter that a device must skip, and `CryptoError`
        after `forget`.
        """
        if not self._rule.valid(counter):
            raise InputError(
                "the KSN has a transaction counter that a device must skip",
                code="KSN_INVALID",
                fields=(FieldError("ksn", "its counter is 0 or has too many one bits"),),
            )
        if self._root is None:
            raise CryptoError("the key of this device has been dropped from memory")
        key, missing = self._nearest(counter, self._root)
        held = self._held
        while missing:
            ancestor = missing.pop()
            key = self._step(key, ancestor)
            bit = ancestor & -ancestor
            before = held.get(bit)
            if before is None:
                held[bit] = (ancestor, bytearray(key))
            else:
                before[1][:] = key
                held[bit] = (ancestor, before[1])
        return key

    def _nearest(self, counter: int, root: bytearray) -> tuple[bytes, list[int]]:
        """The key of the nearest ancestor that is held, and the counters to derive, lowest last."""
        missing: list[int] = []
        while counter:
            held = self._held.get(counter & -counter)
            if held is not None and held[0] == counter:
                return bytes(held[1]), missing
            missing.append(counter)
            counter &= counter - 1
        return bytes(root), missing

    def forget(self) -> None:
        """Overwrite and drop the initial key and every held one; `key_at` raises from now on."""
        for _, key in self._held.values():
            key[:] = bytes(len(key))
        self._held.clear()
        if self._root is not None:
            self._root[:] = bytes(len(self._root))
            self._root = None

    def __len__(self) -> int:
        """How many derived keys are held, at most `rule.width_bits`."""
        return len(self._held)

    def __repr__(self) -> str:
        return f"<KeyTree of {self._rule.width_bits} bits, keys masked>"
