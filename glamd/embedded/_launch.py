"""Becomes a child process: enters its directory, changes the user, ties its life to ours, execs.

Run by path with `python -I -S`, never imported by the daemon: it may use the standard library only,
and must work where the child's user cannot read our checkout. What happens between fork and exec
belongs here and not into a `preexec_fn`, which is unsafe in a process that has threads.

    _launch.py PARENT_PID DEATH_SIGNAL DIRECTORY UID GID COMMAND [ARGUMENT ...]

UID -1 keeps the user.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1
KEEP_USER = -1


def main(arguments: list[str]) -> None:
    """Turn this process into the command; ends with a message when one of the steps fails."""
    parent, death_signal, uid, gid = (int(arguments[n]) for n in (0, 1, 3, 4))
    directory, command = arguments[2], arguments[5:]
    os.setsid()  # a Ctrl-C in the terminal is for the daemon, which stops its children in order
    # Entered before the change of user: below it the new user need not be able to walk the way.
    os.chdir(directory)
    if uid != KEEP_USER:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # A change of user clears the death signal, so this comes after it.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit("the parent ended before its child began")
    os.umask(0o077)
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main(sys.argv[1:])
