"""Looks through another process's memory for card numbers; needs the right to trace it.

The numbers looked for begin with one prefix of eight digits, by which a pass over the memory finds
candidates, in ASCII (a track's begins so too) and packed two to a byte as chips send them. Fixed
strings, such as keys, are looked for one by one, so there should be few.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

CHUNK_BYTES: Final = 8 * 2**20
OVERLAP_BYTES: Final = 64
_UNREADABLE: Final = ("[vvar", "[vsyscall]")


@dataclass(slots=True)
class Sighting:
    """What was seen: distinct numbers by form, and how often each fixed string was there."""

    ascii: set[str] = field(default_factory=set)
    packed: set[str] = field(default_factory=set)
    tracks: set[str] = field(default_factory=set)
    """Of those in ASCII, the ones that a track goes on behind."""
    times: dict[bytes, int] = field(default_factory=dict)
    searched_bytes: int = 0

    def of(self, pans: Sequence[str]) -> int:
        """How many of these were seen, in whatever form."""
        return len(set(pans) & (self.ascii | self.packed))


def may_look(pid: int) -> bool:
    """Whether this process may read that one's memory."""
    try:
        with Path(f"/proc/{pid}/mem").open("rb"):
            return True
    except OSError:
        return False


def look_through(pid: int, *, prefix: str, strings: Sequence[bytes] = ()) -> Sighting:
    """Search all that is mapped readable in the process; PermissionError where we may not."""
    plain = re.compile(re.escape(prefix).encode() + rb"([0-9]{8})(?![0-9])([=D^])?")
    packed = re.compile(re.escape(bytes.fromhex(prefix)) + rb"([\x00-\x99]{4})", re.DOTALL)
    found = Sighting(times=dict.fromkeys(strings, 0))
    seen: set[tuple[bytes, int]] = set()
    for start, data in _memory(pid):
        found.searched_bytes += len(data)
        for match in plain.finditer(data):
            pan = prefix + match[1].decode()
            found.ascii.add(pan)
            if match[2]:
                found.tracks.add(pan)
        for match in packed.finditer(data):
            rest = match[1].hex()
            if rest.isdecimal():
                found.packed.add(prefix + rest)
        for string in strings:
            at = data.find(string)
            while at >= 0:
                seen.add((string, start + at))
                at = data.find(string, at + 1)
    for string, _ in seen:
        found.times[string] += 1
    return found


def _memory(pid: int) -> Iterator[tuple[int, bytes]]:
    """Pieces of readable memory with their addresses; they overlap, so that nothing is cut."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            place, mode, _, _, _, *name = line.split(maxsplit=5)
            if not mode.startswith("r") or (name and name[0].startswith(_UNREADABLE)):
                continue
            at, end = (int(edge, 16) for edge in place.split("-"))
            while at < end:
                try:
                    data = os.pread(memory.fileno(), min(CHUNK_BYTES, end - at), at)
                except OSError:
                    break  # device memory, or gone since
                if not data:
                    break
                yield at, data
                at += len(data)
                if at < end:
                    at -= OVERLAP_BYTES
