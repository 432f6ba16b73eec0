"""A command at a pseudo-terminal: all it shows is read, its questions answered as they come."""

import os
import pty
import select
import signal
import time
from collections.abc import Sequence
from pathlib import Path

LONG_S = 30.0


def at_terminal(
    command: Sequence[str | Path], conversation: Sequence[tuple[str, str]]
) -> tuple[int, str]:
    """Run it to its end and return its exit status and all that was shown.

    `conversation` pairs what has to be shown with what is typed then. Blocks; after LONG_S the
    command is killed.
    """
    words = [str(word) for word in command]
    pid, end = pty.fork()
    if pid == 0:
        os.execv(words[0], words)
    shown, seen, ended = "", 0, False
    answers = list(conversation)
    deadline_s = time.monotonic() + LONG_S
    try:
        while not ended and time.monotonic() < deadline_s:
            if not select.select([end], [], [], 0.1)[0]:
                continue
            try:
                shown += os.read(end, 65536).decode(errors="replace")
            except OSError:
                ended = True  # This is how Linux says that nobody holds the other end any more.
            if answers and answers[0][0] in shown[seen:]:
                seen = len(shown)
                os.write(end, answers.pop(0)[1].encode() + b"\n")
        if not ended:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(end)
        _, status = os.waitpid(pid, 0)
    assert not answers, f"never shown {answers[0][0]!r}: {shown}"
    return os.waitstatus_to_exitcode(status), shown
