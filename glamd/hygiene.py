"""What a process does about its own memory before there is a key in it.

Called once, at the very start, by whatever may come to hold keys or card data. Clearing buffers
after use is done where the buffers are; keeping memory out of swap is the service manager's, for
which docs/memory.md says why.
"""

import resource
from dataclasses import dataclass
from typing import Final

import structlog

log = structlog.get_logger()

_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
"""prctl(2), <linux/prctl.h>; the same on every architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """What holds for this process now."""

    no_core_file: bool
    """The limit for core files is 0 and cannot be raised again."""
    not_dumpable: bool
    """No core dump, not even to a pipe, and none but root may read its memory or attach to it."""

    @property
    def whole(self) -> bool:
        """Whether both hold."""
        return self.no_core_file and self.not_dumpable


def protect_memory() -> Protection:
    """Allow no core dump of this process, and nobody but root to look into its memory.

    Never raises: what did not hold is logged (`memory_unprotected`), and the caller decides. The
    files of a process that is not dumpable in /proc are root's, also for the process itself, except
    where it is root's. A program that it starts is dumpable again, but keeps the limit of 0.
    """
    found = Protection(no_core_file=_without_core_file(), not_dumpable=_made_undumpable())
    if not found.whole:
        log.warning(
            "memory_unprotected",
            no_core_file=found.no_core_file,
            not_dumpable=found.not_dumpable,
        )
    return found


def _without_core_file() -> bool:
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError):
        return False
    return resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)


def _made_undumpable() -> bool:
    # The limit alone is not enough: the kernel ignores it where core_pattern is a pipe, which is
    # how systemd-coredump gets its dumps.
    try:
        # Its import makes a callback, for which some systems with MemoryDenyWriteExecute= have no
        # memory to give.
        import ctypes  # noqa: PLC0415 - a failure of the import itself is one of ours to report

        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (ImportError, MemoryError, OSError, AttributeError):
        return False
    prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
    prctl.restype = ctypes.c_int
    prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    return bool(prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 0)
