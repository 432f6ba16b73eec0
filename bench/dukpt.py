"""DUKPT on one core: derive and decrypt, against the same block operations called bare.

What the rival does is the least that `cryptography` can be asked for the same message: for every
counter the same number of contexts over the same number of blocks, under keys made beforehand, with
nothing between them. The ratio is therefore what our own Python costs (the bar: 0.6 or more). Both
sides take turns in short slices, so that a noisy machine is noisy to both.

Run by itself: `python -m bench.dukpt`.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import cycle

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from glamd.crypto import dukpt

BAR = 0.6
TRACK_BYTES = 48
SLICE_S = 0.02
CALLS_BETWEEN_LOOKS = 50
"""Calls made before the time is looked at again, so that looking costs next to nothing."""
BARE_KEYS = 4096
"""More than any cache would keep, and little enough to make in no time."""
COUNTERS = 20_000
"""A device's first counters; they begin again when they are spent, which costs one derivation."""

_ECB = modes.ECB()

Call = Callable[[], object]


def measure(seconds: float = 2.0) -> list[dict[str, object]]:
    """A row each for TDES and AES-128 (per second, the rival's too, their ratio, the bar)."""
    rows: list[dict[str, object]] = []
    for label, scheme, bare in (
        ("TDES", dukpt.TDES_DUKPT, _bare_tdes()),
        ("AES-128", dukpt.AES_DUKPT, _bare_aes()),
    ):
        value, rival = _side_by_side(_derive_and_decrypt(scheme), bare, seconds / 2)
        rows.append(
            {
                "name": f"DUKPT derive + decrypt, {label}, {TRACK_BYTES} bytes, one core",
                "value": round(value),
                "unit": "1/s",
                "rival": round(rival),
                "rival_name": "the same block operations called bare through cryptography",
                "ratio": round(value / rival, 3),
                "bar": BAR,
            }
        )
    return rows


def _side_by_side(ours: Call, bare: Call, seconds: float) -> tuple[float, float]:
    """Calls per second of both, in turns of `SLICE_S`, for about `seconds` in all."""
    calls, spent_s = [0, 0], [0.0, 0.0]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for side, call in enumerate((ours, bare)):
            start = now = time.perf_counter()
            while now - start < SLICE_S:
                for _ in range(CALLS_BETWEEN_LOOKS):
                    call()
                calls[side] += CALLS_BETWEEN_LOOKS
                now = time.perf_counter()
            spent_s[side] += now - start
    return calls[0] / spent_s[0], calls[1] / spent_s[1]


def _derive_and_decrypt(scheme: str) -> Call:
    """One message after the other of one device, as the payment path calls it."""
    key_id = dukpt.initial_key_id(scheme, os.urandom(dukpt.ksn_length_bytes(scheme)))
    device = dukpt.Dukpt(dukpt.Profile(scheme=scheme), os.urandom(16), key_id)
    ciphertext = os.urandom(TRACK_BYTES)
    counters = cycle(_counters(scheme))
    decrypt = device.decrypt
    return lambda: decrypt(next(counters), ciphertext)


def _counters(scheme: str) -> list[int]:
    counters: list[int] = []
    counter: int | None = 0
    while len(counters) < COUNTERS and counter is not None:
        counter = dukpt.next_counter(scheme, counter)
        if counter is not None:
            counters.append(counter)
    return counters


def _keys(length_bytes: int) -> Iterator[bytes]:
    return cycle([os.urandom(length_bytes) for _ in range(BARE_KEYS)])


def _bare_tdes() -> Call:
    """Two DEA for the next key, the data key's two blocks, and the message in CBC."""
    halves, keys = _keys(8), _keys(16)
    block, key_blocks, message = os.urandom(8), os.urandom(16), os.urandom(TRACK_BYTES)
    cbc = modes.CBC(bytes(8))

    def call() -> None:
        for _ in range(2):
            half = next(halves)
            Cipher(TripleDES(half * 3), _ECB).encryptor().update(block)
        key = next(keys)
        Cipher(TripleDES(key + key[:8]), _ECB).encryptor().update(key_blocks)
        key = next(keys)
        Cipher(TripleDES(key + key[:8]), cbc).decryptor().update(message)

    return call


def _bare_aes() -> Call:
    """One block for the next key, one for the data key, and the message in CBC."""
    keys = _keys(16)
    block, message = os.urandom(16), os.urandom(TRACK_BYTES)
    cbc = modes.CBC(bytes(16))

    def call() -> None:
        Cipher(AES(next(keys)), _ECB).encryptor().update(block)
        Cipher(AES(next(keys)), _ECB).encryptor().update(block)
        Cipher(AES(next(keys)), cbc).decryptor().update(message)

    return call


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
