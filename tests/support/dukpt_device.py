"""The device's half of DUKPT, register by register, to compare the host's derivation with.

Written after the algorithms that ANSI X9.24 gives to the device (X9.24-1:2009 A.2 with its future
key registers, X9.24-3:2017 6.5 with its intermediate derivation keys), and on purpose without a
line of `glamd.crypto`: what both had in common would not be tested. Slow, plain, step by step.
"""

import struct

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES

ALGORITHM_INDICATORS = {16: 2, 24: 3, 32: 4}
"""X9.24-3:2017, 6.3.2: AES-128, AES-192 and AES-256 by their key's bytes."""


class ExhaustedError(Exception):
    """The device has used its last counter and ceased operation."""


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


class TdesDevice:
    """X9.24-1:2009, A.1 and A.2: 21 future key registers, a shift register, an encryption counter.

    Future key register n stands here under the shift register's value when its bit n is set.
    """

    def __init__(self, initial_key: bytes, key_serial_number: bytes) -> None:
        """ "Load Initial Key"."""
        self._serial = key_serial_number
        self._counter = 0
        self._future_keys: dict[int, bytes] = {}
        self._shift_register = 1 << 20  # bit 1, the leftmost
        self._fill_from(initial_key)
        self._counter = 1

    def take(self) -> tuple[int, bytes]:
        """ "Request PIN Entry": the counter and its current key, then on to the next "New Key"."""
        if self._counter == 0:
            raise ExhaustedError
        self._set_bit()
        counter, current_key = self._counter, self._future_keys[self._shift_register]
        own_register = self._shift_register
        if counter.bit_count() < 10:
            # "New Key-1": shift right, and derive into every register that is passed.
            self._shift_register >>= 1
            self._fill_from(current_key)
            step = 1
        else:
            # "New Key": skip the counters that would have more than ten one bits.
            step = own_register
        del self._future_keys[own_register]
        self._counter = (self._counter + step) % (1 << 21)
        return counter, current_key

    def skip_to(self, counter: int) -> None:
        """From new to this counter, by the way of registers only and not by a million takes.

        A device may leave out counters: it adds the shift register to the counter ("Request PIN
        Entry 1", where a register's check does not hold). Each one bit of `counter` is reached
        so, and its key fills the registers below, as "New Key-1" does.
        """
        reached = 0
        for bit in reversed(range(21)):
            if counter >> bit & 1:
                reached |= 1 << bit
                self._counter = reached
                if reached != counter:
                    self._set_bit()
                    current_key = self._future_keys[self._shift_register]
                    self._shift_register >>= 1
                    self._fill_from(current_key)

    def _set_bit(self) -> None:
        """ "Set Bit": the shift register holds the counter's rightmost one bit."""
        self._shift_register = 1
        while not self._counter & self._shift_register:
            self._shift_register <<= 1

    def _fill_from(self, current_key: bytes) -> None:
        """ "New Key-3" and "New Key-1" in turns, until the one bit is shifted out."""
        while self._shift_register:
            number = int.from_bytes(self._serial, "big") | self._counter | self._shift_register
            crypto_register_1 = number.to_bytes(10, "big")[2:]
            self._future_keys[self._shift_register] = self._generate(current_key, crypto_register_1)
            self._shift_register >>= 1

    @staticmethod
    def _generate(key_register: bytes, crypto_register_1: bytes) -> bytes:
        """The "Non-reversible Key Generation Process", its eight steps."""
        crypto_register_2 = _xor(crypto_register_1, key_register[8:])
        crypto_register_2 = _dea(key_register[:8], crypto_register_2)
        crypto_register_2 = _xor(crypto_register_2, key_register[8:])
        key_register = _xor(key_register, bytes.fromhex("C0C0C0C000000000C0C0C0C000000000"))
        crypto_register_1 = _xor(crypto_register_1, key_register[8:])
        crypto_register_1 = _dea(key_register[:8], crypto_register_1)
        crypto_register_1 = _xor(crypto_register_1, key_register[8:])
        return crypto_register_1 + crypto_register_2


def _dea(key: bytes, block: bytes) -> bytes:
    context = Cipher(TripleDES(key + key + key), modes.ECB()).encryptor()
    return context.update(block) + context.finalize()


class AesDevice:
    """X9.24-3:2017, 6.5: 32 intermediate derivation key registers, the leftmost bit's the first."""

    def __init__(self, initial_key: bytes, initial_key_id: bytes) -> None:
        """ "Load Initial Key"."""
        self._derivation_id = initial_key_id[4:]
        self._counter = 0
        self._registers: list[bytes | None] = [None] * 32
        self._update_derivation_keys(initial_key, first=0)
        self._counter = 1

    def take(self) -> tuple[int, bytes]:
        """ "Generate Working Keys" up to their derivation key, then "Update State"."""
        if self._counter > 0xFFFFFFFF:
            raise ExhaustedError
        counter, current = self._counter, self._current()
        key = self._registers[current]
        assert key is not None, "a register is filled before its counter comes"
        if counter.bit_count() < 16:
            self._update_derivation_keys(key, first=current + 1)
            self._counter += 1
        else:
            self._counter += 0x80000000 >> current
        self._registers[current] = None
        return counter, key

    def skip_to(self, counter: int) -> None:
        """From new to this counter by the registers, leaving out the counters between."""
        reached = 0
        for number in range(32):
            bit = 0x80000000 >> number
            if counter & bit:
                reached |= bit
                self._counter = reached
                if reached != counter:
                    key = self._registers[self._current()]
                    assert key is not None, "it was filled from the bit before"
                    self._update_derivation_keys(key, first=number + 1)

    def _current(self) -> int:
        """ "Set Shift Register": the register of the counter's rightmost one bit."""
        number = 31
        while not self._counter & 0x80000000 >> number:
            number -= 1
        return number

    def _update_derivation_keys(self, key: bytes, *, first: int) -> None:
        """ "Update Derivation Keys": every register from `first` on, out of the current key."""
        for number in range(first, 32):
            derived = b""
            for block in (1, 2)[: 1 if len(key) == 16 else 2]:
                data = struct.pack(
                    ">BBHHH4sI",
                    1,
                    block,
                    0x8000,
                    ALGORITHM_INDICATORS[len(key)],
                    8 * len(key),
                    self._derivation_id,
                    self._counter | 0x80000000 >> number,
                )
                context = Cipher(AES(key), modes.ECB()).encryptor()
                derived += context.update(data) + context.finalize()
            self._registers[number] = derived[: len(key)]
