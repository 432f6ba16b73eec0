"""glamctl as a process of its own: at a terminal, in a pipe, and straight at the database."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from glamd.crypto.dukpt import key_check_value
from glamd.keys.key_sets.service import ProtectedKey
from tests.support.admin_world import AdminWorld, make_device
from tests.support.at_terminal import at_terminal

GLAMCTL = Path(sys.executable).with_name("glamctl")
LONG_S = 20.0


async def run(
    *args: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, without a terminal."""
    return await asyncio.to_thread(
        subprocess.run,
        [str(GLAMCTL), *args],
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], **(env or {})},
    )


def ceremony(running: AdminWorld) -> list[str]:
    args = ["--socket", str(running.path), "keys", "import-bdk", "ks1"]
    return [str(GLAMCTL), *args, "--scheme", "aes-dukpt", "--components"]


class TestTerminal:
    """Questions."""

    @pytest.mark.parametrize(("answer", "status"), [("y", "revoked"), ("n", "active")])
    async def test_a_revocation_asks_first(
        self, running: AdminWorld, answer: str, status: str
    ) -> None:
        running.registry.devices["dev_1"] = make_device("dev_1")
        args = ["--socket", str(running.path), "device", "revoke", "dev_1"]
        code, _ = await asyncio.to_thread(
            at_terminal, [GLAMCTL, *args], [("Revoke dev_1 for good?", answer)]
        )
        assert code == (0 if answer == "y" else 1)
        assert running.registry.devices["dev_1"].status == status

    async def test_each_component_is_typed_unseen_by_another_and_asked_again_when_it_is_wrong(
        self, running: AdminWorld
    ) -> None:
        keys = [bytes.fromhex("0123456789ABCDEFFEDCBA9876543210"), bytes(range(16))]
        kcvs = [key_check_value(key, "aes-dukpt") for key in keys]
        code, shown = await asyncio.to_thread(
            at_terminal,
            ceremony(running),
            [
                ("How many components", "2"),
                ("holder of component 1", "Ann"),
                ("Component 1 of 2", "not hex"),
                ("Component 1 of 2", keys[1].hex()),
                ("Check value of component 1", kcvs[0]),
                ("Component 1 of 2", keys[0].hex()),
                ("Check value of component 1", kcvs[0].lower()),
                ("holder of component 2", " ANN "),
                ("holder of component 2", "Ben"),
                ("Component 2 of 2", keys[1].hex()),
                ("Check value of component 2", kcvs[1]),
            ],
        )
        assert code == 0
        assert running.keys.bdks["ks1"] == bytes(a ^ b for a, b in zip(*keys, strict=True))
        assert "The check value does not fit" in shown
        assert "This person has typed a component already" in shown
        assert shown.count("Hand the keyboard to the next holder now.") == 1
        for secret in (keys[0].hex(), keys[1].hex(), "not hex"):
            assert secret not in shown
        assert "08D7B4" in shown

    async def test_a_component_that_stays_wrong_ends_the_ceremony_and_the_daemon_is_told(
        self, running: AdminWorld
    ) -> None:
        attempt = [("Component 1 of 3", "12" * 16), ("Check value of component 1", "000000")]
        code, shown = await asyncio.to_thread(
            at_terminal,
            ceremony(running),
            [("How many components", "3"), ("holder of component 1", "Ann"), *attempt * 3],
        )
        assert code == 1
        assert shown.splitlines()[-1].startswith("VALIDATION_ERROR: ")
        assert "components.0.kcv" in shown
        assert "1212" not in shown
        assert running.keys.bdks == {}

    async def test_a_protection_key_is_typed_as_components_are(
        self, running: AdminWorld, tmp_path: Path
    ) -> None:
        file = tmp_path / "bdk.tr31"
        file.write_text("D0016B0AX00E0000\n")
        keys = [bytes(range(32)), bytes(range(100, 132))]
        conversation = [("How many protection key components", "2")]
        for number, (holder, key) in enumerate(zip(("Ann", "Ben"), keys, strict=True), 1):
            conversation += [
                (f"holder of protection key component {number}", holder),
                (f"Protection key component {number} of 2", key.hex()),
                ("Check value of protection", key_check_value(key, "aes-dukpt")),
            ]
        args = [*ceremony(running)[:-1], "--key-block", str(file)]
        code, shown = await asyncio.to_thread(at_terminal, args, conversation)
        assert code == 0
        kept = running.keys.bdks["ks1"]
        assert isinstance(kept, ProtectedKey)
        assert [part.key for part in kept.kbpk] == keys
        assert kept.block == "D0016B0AX00E0000\n"
        for key in keys:
            assert key.hex() not in shown

    async def test_a_table_at_a_narrow_terminal_still_has_whole_ids(
        self, running: AdminWorld
    ) -> None:
        running.registry.devices["dev_1"] = make_device("dev_1")
        args = ["--socket", str(running.path), "device", "list"]
        code, shown = await asyncio.to_thread(at_terminal, [GLAMCTL, *args], [])
        assert code == 0
        assert "…" not in shown


class TestProcess:
    """Its environment, its start, its end."""

    async def test_the_socket_is_the_variables_then_the_working_directorys(
        self, running: AdminWorld
    ) -> None:
        found = await run("version", "--json", env={"GLAMD_ADMIN_SOCKET": str(running.path)})
        assert json.loads(found.stdout)["glamd"] == "9.9.9"
        home = running.path.parent
        (home / ".glamd" / "dev").mkdir(parents=True)
        (home / ".glamd" / "dev" / "admin.sock").symlink_to(running.path)
        found = await run("version", "--json", cwd=home)
        assert json.loads(found.stdout)["glamd"] == "9.9.9"

    async def test_without_either_it_is_the_systems(self, tmp_path: Path) -> None:
        found = await run("status", cwd=tmp_path)
        assert found.returncode == 1
        assert "/run/glamd/admin.sock" in found.stderr

    async def test_a_reader_that_has_seen_enough_is_no_trouble(self, running: AdminWorld) -> None:
        for n in range(200):
            running.registry.devices[f"dev_{n}"] = make_device(f"dev_{n}")
        command = f"{GLAMCTL} --socket {running.path} device list --limit 200 --json | head -c 1"
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        async with asyncio.timeout(LONG_S):
            out, err = await process.communicate()
        assert (out, err) == (b"[", b"")

    async def test_it_starts_without_the_daemons_libraries(self) -> None:
        script = (
            "import sys, glamd.admin.cli;"
            "heavy = {'aiohttp', 'pydantic', 'sqlalchemy', 'asyncpg', 'cryptography', 'rich',"
            " 'structlog', 'uvloop'};"
            "print(sorted(heavy & set(sys.modules)))"
        )
        found = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=LONG_S,
            check=True,
        )
        assert found.stdout == "[]\n"

    async def test_the_shell_completes_commands(self, running: AdminWorld) -> None:
        env = {
            "_GLAMCTL_COMPLETE": "bash_complete",
            "COMP_WORDS": "glamctl device re",
            "COMP_CWORD": "2",
        }
        found = await run(env=env)
        assert found.stdout.split() == ["plain,rekey", "plain,resume", "plain,revoke"]


class TestDatabase:
    """`glamctl db`, with a real PostgreSQL and no daemon."""

    async def test_a_fresh_database_is_brought_up_and_emptied(
        self, empty_database_url: str
    ) -> None:
        env = {"DATABASE_URL": empty_database_url}
        before = await state(env, "current")
        assert (before["current"], before["state"]) == (None, "older")
        assert before["mend"] == "glamctl db upgrade"
        upgraded = await state(env, "upgrade")
        assert upgraded["state"] == "same"
        assert upgraded["current"] == upgraded["expected"]
        assert (await state(env, "reset", "--yes"))["state"] == "same"
        assert (await state(env, "downgrade", "base", "--yes"))["current"] is None

    async def test_the_configuration_names_the_database(
        self, tmp_path: Path, database_url: str
    ) -> None:
        config = tmp_path / "glamd.toml"
        config.write_text(f'[database]\nurl = "{database_url}"\n')
        found = await run("db", "--config", str(config), "current", "--json")
        assert json.loads(found.stdout)["state"] == "same"
        assert found.stderr == ""

    async def test_the_database_of_glamd_dev_is_found(
        self, tmp_path: Path, database_url: str
    ) -> None:
        described = tmp_path / ".glamd" / "dev" / "dev.json"
        described.parent.mkdir(parents=True)
        # The daemon's own login may not change the schema; that of the tables' owner is taken.
        nobody = "postgresql://nobody@127.0.0.1:1/none"
        described.write_text(json.dumps({"database": {"url": nobody, "admin_url": database_url}}))
        found = await run("db", "current", "--json", cwd=tmp_path)
        assert json.loads(found.stdout)["state"] == "same"

    async def test_a_database_that_is_not_there_is_one_line_without_its_password(
        self, tmp_path: Path
    ) -> None:
        env = {"DATABASE_URL": "postgresql://nobody:secret@127.0.0.1:1/none"}
        found = await run("db", "current", env=env, cwd=tmp_path)
        assert found.returncode == 1
        assert found.stderr.startswith("UNAVAILABLE: ")
        assert found.stderr.count("\n") == 1
        assert "secret" not in found.stderr

    async def test_a_revision_that_does_not_exist_is_one_line(self, database_url: str) -> None:
        env = {"DATABASE_URL": database_url}
        found = await run("db", "upgrade", "9999", env=env)
        assert found.returncode == 1
        assert found.stderr.count("\n") == 1
        assert "9999" in found.stderr


async def state(env: dict[str, str], *args: str) -> dict[str, object]:
    """What a `db` command says afterwards."""
    found = await run("db", *args, "--json", env=env)
    assert found.returncode == 0, found.stderr
    answer: dict[str, object] = json.loads(found.stdout)
    return answer
