"""The search of a process's memory finds what is there, wherever and in whatever form."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.faults.memory_search import PREFIX, numbers
from tests.support.memory_of import CHUNK_BYTES, look_through, may_look

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not may_look(os.getpid()), reason="only root may look everywhere"
)

# The child gets its numbers with their prefix written backwards, so that only what it makes of them
# is to be found, and not what it read.
MAKE = """
import sys
pan = sys.argv[1][::-1] + sys.argv[2]
{made}
print("made", flush=True)
sys.stdin.read()
"""
REST = "00000016"
PAN, OTHER = PREFIX + REST, PREFIX + "00000024"


@contextmanager
def child(made: str) -> Iterator[int]:
    command = [sys.executable, "-c", MAKE.format(made=made), PREFIX[::-1], REST]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        yield process.pid


ACROSS = f"""
import mmap
kept = mmap.mmap(-1, {2 * CHUNK_BYTES})
kept[{CHUNK_BYTES - 8} : {CHUNK_BYTES + 8}] = pan.encode()
"""


@pytest.mark.parametrize(
    ("made", "form"),
    [
        ("kept = pan", "ascii"),
        ("kept = bytearray(pan.encode()); del pan", "ascii"),
        ("kept = pan + '=4912'", "tracks"),
        ("kept = bytes.fromhex(pan)", "packed"),
        (ACROSS, "ascii"),
    ],
)
def test_a_number_is_found_in_each_form_and_across_the_edge_of_a_chunk(
    made: str, form: str
) -> None:
    with child(made) as pid:
        found = look_through(pid, prefix=PREFIX)
    assert found.searched_bytes > 2**20
    assert found.of([PAN]) == 1
    assert found.of([OTHER]) == 0
    seen = {"ascii": found.ascii, "packed": found.packed, "tracks": found.tracks}
    assert PAN in seen[form]
    assert (PAN in found.tracks) == (form == "tracks")


def test_a_fixed_string_is_counted_once_a_place() -> None:
    made = "kept = [bytearray(b'key:' + str(n).encode()) + b'tail-of-it' for n in (1, 1, 2)]"
    with child(made) as pid:
        found = look_through(pid, prefix=PREFIX, strings=[b"key:1tail-of-it", b"not there"])
    assert found.times == {b"key:1tail-of-it": 2, b"not there": 0}


def test_the_numbers_are_distinct_and_pass_the_check_digit() -> None:
    made = numbers(500)
    assert len(set(made)) == 500
    for pan in made:
        digits = [int(digit) for digit in pan]
        doubled = [value * 2 - 9 * (value > 4) for value in digits[::2]]
        assert (sum(doubled) + sum(digits[1::2])) % 10 == 0
