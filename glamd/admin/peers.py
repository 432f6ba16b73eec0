"""Who is at the other end of the admin socket, by the kernel's word, and who may be.

The socket file's mode keeps others out already; this check holds also where somebody has loosened
it, and gives each command a name in the log. Nothing that the client says about itself counts.
"""

import grp
import os
import pwd
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from glamd.errors import ConfigError, ForbiddenError, UnauthenticatedError
from glamd.http.connections import GuardedHandler
from glamd.http.identity import Identity, Operator

_UCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operators:
    """Who may use the socket besides root and the daemon's own user."""

    uids: frozenset[int] = frozenset()
    gid: int | None = None

    @classmethod
    def named(cls, *, group: str | None, users: Sequence[str]) -> "Operators":
        """The operators by their names; raises `ConfigError` for one that does not exist."""
        try:
            return cls(
                uids=frozenset(pwd.getpwnam(user).pw_uid for user in users),
                gid=None if group is None else grp.getgrnam(group).gr_gid,
            )
        except KeyError as error:
            raise ConfigError(
                f"The admin socket is for somebody who is not here: {error}"
            ) from None

    def may(self, *, uid: int, gid: int) -> bool:
        """Whether a process of this user and group may give commands."""
        if uid in (0, os.geteuid()) or uid in self.uids:
            return True
        return self.gid is not None and self.gid in (gid, *_groups_of(uid, gid))


class PeerIdentity:
    """Recognises the operator by the credentials of the connection's other end."""

    def __init__(self, operators: Operators) -> None:
        self._operators = operators

    async def __call__(self, request: web.BaseRequest) -> Identity:
        """The operator; raises `ForbiddenError` for a user who is none."""
        handler = request.protocol
        assert isinstance(handler, GuardedHandler)
        if handler.identity is None:
            handler.identity = self._recognise(request)
        return handler.identity

    def _recognise(self, request: web.BaseRequest) -> Operator:
        if request.transport is None:
            raise UnauthenticatedError("The connection is gone.")
        end: socket.socket = request.transport.get_extra_info("socket")
        raw = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, gid = _UCRED.unpack(raw)
        if not self._operators.may(uid=uid, gid=gid):
            raise ForbiddenError(f"User {uid} is no operator of this daemon.")
        return Operator(uid=uid, gid=gid, pid=pid)


def _groups_of(uid: int, gid: int) -> list[int]:
    """The groups that a user is in; a user without a name is in none but its own."""
    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        return []
