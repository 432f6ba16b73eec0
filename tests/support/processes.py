"""What the kernel knows of processes: who lives below whom, and who works in which directory.

For tests that start daemons and want to see that nothing of them stays. Reads `/proc` only.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 10.0
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told by its start (in clock ticks since boot) from a later one of its number."""

    pid: int
    started: int
    command: str

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie that nobody has waited for does not."""
        found = _stat(self.pid)
        return found is not None and found.state not in "ZX" and found.started == self.started


@dataclass(frozen=True, slots=True)
class _Stat:
    command: str
    state: str
    parent: int
    started: int


def descendants(pid: int) -> frozenset[Process]:
    """All processes below this one that live now."""
    found = _all()
    below: set[int] = {pid}
    while more := {child for child, stat in found.items() if stat.parent in below} - below:
        below |= more
    return frozenset(
        Process(each, found[each].started, found[each].command) for each in below - {pid}
    )


def at_work_in(directory: Path) -> frozenset[Process]:
    """All processes whose working directory is this one or lies below it."""
    home = str(directory.resolve())
    found = set()
    for pid, stat in _all().items():
        try:
            where = str(Path(f"/proc/{pid}/cwd").readlink())
        except OSError:
            continue
        if where == home or where.startswith(f"{home}/"):
            found.add(Process(pid, stat.started, stat.command))
    return frozenset(found)


def until(condition: Callable[[], object], *, timeout_s: float = TIMEOUT_S) -> None:
    """Wait for something that another process does; TimeoutError when it does not."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not so within {timeout_s:g} s")
        time.sleep(POLL_S)


def _all() -> dict[int, _Stat]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            found[int(entry.name)] = stat
    return found


def _stat(pid: int) -> _Stat | None:
    """proc_pid_stat(5); the command stands in parentheses and may hold any character."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    command, _, rest = text.partition(" (")[2].rpartition(") ")
    fields = rest.split()
    return _Stat(command=command, state=fields[0], parent=int(fields[1]), started=int(fields[19]))
