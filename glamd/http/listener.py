"""Sockets of a listener: bind, serve, change the certificate, stop.

The listening socket outlives the asyncio server that accepts on it, so that a new certificate
takes effect without a moment in which nobody listens. No request is looked at here.
"""

import asyncio
import os
import socket
import ssl
import stat
from pathlib import Path

import structlog

from glamd.errors import ConfigError
from glamd.http.connections import Dispatch, GuardedServer, Refuse
from glamd.http.limits import HttpLimits

log = structlog.get_logger()

PROBE_TIMEOUT_S = 1.0


class Listener:
    """One listening socket, TCP or unix, and the connections that came in through it."""

    def __init__(self, dispatch: Dispatch, *, name: str, limits: HttpLimits, refuse: Refuse):
        self._dispatch = dispatch
        self._refuse = refuse
        self._name = name
        self._limits = limits
        self._socket: socket.socket | None = None
        self._server: GuardedServer | None = None
        self._accepting: asyncio.Server | None = None
        self._path: Path | None = None
        self._inode: int | None = None

    async def start_tcp(self, host: str, port: int, context: ssl.SSLContext | None) -> int:
        """Listen on `host` and `port` (0: any free one) and return the port.

        Raises `ConfigError` where the address cannot be bound.
        """
        try:
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, _, _, _, address = found[0]
            self._socket = socket.create_server(
                (str(address[0]), port), family=family, backlog=self._limits.backlog
            )
            # Connections have it from here. Without it the kernel takes megabytes for each client
            # that does not read, and what it has taken no timer of ours sees.
            self._socket.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, self._limits.unsent_bytes
            )
        except OSError as error:
            raise ConfigError(
                f"The {self._name} listener cannot bind {host} port {port}: {error.strerror}."
            ) from error
        await self._serve(context)
        return int(self._socket.getsockname()[1])

    async def start_unix(self, path: Path, *, mode: int, gid: int | None) -> None:
        """Listen on a unix socket with this mode and group.

        A socket file that nobody listens on is removed first. Raises `ConfigError` where
        somebody does, where the file is no socket, or where it cannot be made.
        """
        if _is_socket(path):
            await _clear_stale(path)
        self._socket = _bind_unix(path, mode=mode, gid=gid, backlog=self._limits.backlog)
        self._path = path
        self._inode = _inode(path)
        await self._serve(None)

    async def replace_tls(self, context: ssl.SSLContext) -> None:
        """Handshakes from now on use `context`; connections that stand keep what they have."""
        assert self._socket is not None, "replace_tls before start"
        before = self._accepting
        await self._serve(context)
        if before is not None:
            before.close()

    async def stop(self, timeout_s: float) -> None:
        """Stop listening; requests under way have `timeout_s`, then connections are closed."""
        if self._accepting is not None:
            self._accepting.close()
            self._accepting = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._path is not None:
            # Only our own file: a successor may already have put its socket there.
            if _inode(self._path) == self._inode:
                _remove(self._path)
            self._path = None
        if self._server is not None:
            self._server.pre_shutdown()
            # aiohttp waits this long twice: for the handler, and for the task around it.
            await self._server.shutdown(timeout_s / 2)
            await self._server.part(self._limits.linger_s)
            self._server = None

    async def _serve(self, context: ssl.SSLContext | None) -> None:
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        if self._server is None:
            self._server = GuardedServer(
                self._dispatch, name=self._name, limits=self._limits, refuse=self._refuse
            )
        accepting = self._socket.dup()
        accepting.setblocking(False)
        handshake_s = None if context is None else self._limits.handshake_timeout_s
        if self._path is not None:
            self._accepting = await loop.create_unix_server(
                self._server, sock=accepting, backlog=self._limits.backlog
            )
        else:
            self._accepting = await loop.create_server(
                self._server,
                sock=accepting,
                ssl=context,
                backlog=self._limits.backlog,
                ssl_handshake_timeout=handshake_s,
            )


def _bind_unix(path: Path, *, mode: int, gid: int | None, backlog: int) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Nobody else may connect between bind and chmod.
    umask = os.umask(0o177)
    try:
        listening.bind(str(path))
        if gid is not None:
            os.chown(path, -1, gid)
        path.chmod(mode)
        listening.listen(backlog)
    except OSError as error:
        listening.close()
        raise ConfigError(f"The socket {path} cannot be made: {error.strerror}.") from error
    finally:
        os.umask(umask)
    return listening


def _is_socket(path: Path) -> bool:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(kind):
        raise ConfigError(f"{path} exists and is no socket.")
    return True


async def _clear_stale(path: Path) -> None:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_unix_connection(path)
    except (ConnectionRefusedError, FileNotFoundError):
        log.warning("stale_socket_removed", path=str(path))
        _remove(path)
        return
    except TimeoutError as error:
        raise ConfigError(f"Somebody holds {path} and does not answer.") from error
    except OSError as error:
        raise ConfigError(f"The socket {path} cannot be used: {error.strerror}.") from error
    writer.close()
    raise ConfigError(f"Another process already listens on {path}.")


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
