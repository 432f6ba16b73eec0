"""glamctl against a running admin server: what it shows, writes, asks, and how it fails."""

import json
import os
import socket
import stat
from datetime import date
from pathlib import Path
from typing import Any

import jwt
import pytest
from click.testing import Result

from device_gateway.terminal_device import load_device
from glamd.admin import cli_db, migrate
from glamd.crypto.dukpt import key_check_value
from glamd.payments.audit_chain import Head
from tests.support.admin_world import INITIAL_KEY, KSN, PRIVATE_KEY, AdminWorld, failed
from tests.support.http_fakes import (
    CLIENT_SECRET,
    INTERNAL_SECRET,
    MERCHANT,
    NOW,
    OTHER_TOKEN,
    TOKEN,
)

IMPORT = ("credentials", "import")
ENROLL = ("device", "enroll", "--merchant", str(MERCHANT), "--key-set", "ks1", "--ksn", KSN)


def done(result: Result) -> str:
    """The output of a command that was done."""
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def done_json(result: Result) -> Any:
    """The same as JSON."""
    return json.loads(done(result))


class TestAnswers:
    """Every command, done."""

    @pytest.mark.parametrize(
        ("args", "expected"),
        [
            (("version",), {"glamd": "9.9.9"}),
            (("status",), {"node_id": "n1", "pid": os.getpid(), "draining": False}),
            (("health",), {"status": "ready", "unavailable": {}, "degraded": {}}),
            (("log-level",), {"level": "info"}),
            (("log-level", "debug"), {"level": "debug"}),
            (("actors", "show", "device", "dev/2"), {"key": "dev/2", "handled": 3}),
            (("tokens", "show", TOKEN), {"token": TOKEN, "last4": "1111"}),
            (("tokens", "revoke", TOKEN, "--yes"), {"token": TOKEN, "status": "revoked"}),
            (("audit", "verify"), {"ok": True, "rows": 12, "partitions": 2}),
            (("drain",), {"draining": True}),
        ],
        ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else "",
    )
    async def test_one_thing_is_an_object_for_programs_and_lines_for_people(
        self, running: AdminWorld, args: tuple[str, ...], expected: dict[str, object]
    ) -> None:
        found = done_json(await running.glamctl(*args, "--json"))
        assert expected.items() <= found.items()
        assert "{" not in done(await running.glamctl(*args))

    async def test_json_is_taken_before_the_group_behind_it_and_behind_the_command(
        self, running: AdminWorld
    ) -> None:
        commands = (
            ("--json", "keys", "list"),
            ("keys", "--json", "list"),
            ("keys", "list", "--json"),
            ("--json", "keys", "list", "--json"),
        )
        answers = [done_json(await running.glamctl(*command)) for command in commands]
        assert all(answer == answers[0] for answer in answers)
        assert answers[0][0]["kcv"] == "A1B2C3"

    async def test_actors_are_listed_and_stopped(self, running: AdminWorld) -> None:
        table = done(await running.glamctl("actors", "list"))
        assert "dev_1" in table
        assert "mailbox" in table
        only = done_json(await running.glamctl("actors", "list", "--kind", "none", "--json"))
        assert only == []
        assert "stops" in done(await running.glamctl("actors", "stop", "device", "dev/2"))
        assert running.actors.stopped == [("device", "dev/2")]

    async def test_merchants_are_made_and_shown(self, running: AdminWorld) -> None:
        create = ("merchant", "create", "--platform", "custom", "--shop-id", "7", "--domain")
        made = done_json(await running.glamctl(*create, "a.example", "--json"))
        assert made["domain"] == "a.example"
        known = done_json(
            await running.glamctl(*create, "b.example", "--id", str(MERCHANT), "--json")
        )
        assert known["merchant_id"] == str(MERCHANT)
        shown = done_json(await running.glamctl("merchant", "show", str(MERCHANT), "--json"))
        assert shown.items() >= known.items()
        listed = done_json(await running.glamctl("merchant", "list", "--json"))
        assert {m["domain"] for m in listed} == {"a.example", "b.example"}
        assert "b.example" in done(await running.glamctl("merchant", "list"))

    async def test_a_long_list_is_fetched_page_by_page(self, running: AdminWorld) -> None:
        for n in range(450):
            await running.merchants.create(platform="custom", shop_id=str(n), domain=f"d{n}")
        listed = done_json(await running.glamctl("merchant", "list", "--limit", "420", "--json"))
        assert len({m["merchant_id"] for m in listed}) == 420
        whole = done_json(await running.glamctl("--json", "merchant", "list", "--limit", "1000"))
        assert len(whole) == 450

    async def test_a_row_in_a_pipe_is_one_line_and_nothing_in_it_is_markup(
        self, running: AdminWorld
    ) -> None:
        done(await running.glamctl(*ENROLL, "--json"))
        table = done(await running.glamctl("device", "list"))
        (row,) = [line for line in table.splitlines() if "dev_1" in line]
        assert str(MERCHANT) in row
        shown = done(await running.glamctl("device", "show", "dev_1"))
        assert "[bold]Reader[/bold]" in shown

    async def test_devices_are_suspended_resumed_and_revoked(self, running: AdminWorld) -> None:
        done(await running.glamctl(*ENROLL, "--json"))
        for command, status in (
            (("suspend", "dev_1"), "suspended"),
            (("resume", "dev_1"), "active"),
            (("revoke", "dev_1", "--yes"), "revoked"),
        ):
            changed = done_json(await running.glamctl("device", *command, "--json"))
            assert changed["status"] == status
        shown = done_json(await running.glamctl("device", "show", "dev_1", "--json"))
        assert (shown["status"], shown["presence"]) == ("revoked", "offline")

    async def test_devices_are_listed_by_merchant(self, running: AdminWorld) -> None:
        done(await running.glamctl(*ENROLL, "--json"))
        other = ("device", "list", "--json", "--merchant")
        assert len(done_json(await running.glamctl(*other, str(MERCHANT)))) == 1
        assert done_json(await running.glamctl(*other, "0" * 8 + str(MERCHANT)[8:])) == []

    async def test_a_head_out_of_the_log_is_what_the_chain_is_held_to(
        self, running: AdminWorld
    ) -> None:
        mac = "0123456789abcdef" * 4
        for month in ("2030-01-01", "2030-01"):
            done(await running.glamctl("audit", "verify", "--head", f"{month}:17:{mac}"))
        done(await running.glamctl("audit", "verify"))
        head = Head(date(2030, 1, 1), 17, bytes.fromhex(mac))
        assert running.audit.heads == [head, head, None]

    @pytest.mark.parametrize(
        "head",
        ["", "2030-01", "2030-13:1:", "2030-01-02:1:", "0000-01:1:", "2030-01:0:", "2030-01:-1:"],
    )
    async def test_what_is_no_head_is_refused_and_nothing_is_verified(
        self, running: AdminWorld, head: str
    ) -> None:
        given = head + "ab" * 32 if head.endswith(":") else head
        result = await running.glamctl("audit", "verify", "--head", given)
        assert result.exit_code == 1
        assert "VALIDATION_ERROR" in result.stderr
        assert running.audit.heads == []

    async def test_a_broken_chain_is_named_and_an_exit_status(self, running: AdminWorld) -> None:
        running.audit.damage()
        result = await running.glamctl("audit", "verify")
        assert result.exit_code == 1
        assert "row 5 of 2030-01" in result.stdout
        result = await running.glamctl("audit", "verify", "--json")
        assert result.exit_code == 1
        assert json.loads(result.stdout)["first_broken"] == {
            "partition": "2030-01",
            "seq": 5,
            "reason": "changed",
            "detail": "its MAC does not fit",
        }

    async def test_health_is_an_exit_status_too(self, running: AdminWorld) -> None:
        running.world.bus = "away"
        assert done_json(await running.glamctl("health", "--json"))["status"] == "degraded"
        running.world.clock.advance(1)
        running.world.database = "away"
        result = await running.glamctl("health")
        assert result.exit_code == 1
        assert "database away" in result.stdout


class TestEnrolment:
    """The files of a device."""

    async def test_the_devices_files_are_what_a_terminal_reads(
        self, running: AdminWorld, tmp_path: Path
    ) -> None:
        out = tmp_path / "till" / "one"
        text = done(await running.glamctl(*ENROLL, "--export-initial-key", "--out", str(out)))
        assert "dev_1" in text
        assert json.loads((out / "device.json").read_text()) == {
            "device_id": "dev_1",
            "merchant_id": str(MERCHANT),
            "scheme": "tdes-dukpt",
            "key_set": "ks1",
            "ksn": KSN,
            "cert": "cert.pem",
            "key": "key.pem",
            "ca": "ca.pem",
            "mqtt": {"host": "127.0.0.1", "port": 8883},
            "initial_key": INITIAL_KEY,
        }
        assert (out / "key.pem").read_text() == PRIVATE_KEY
        assert (out / "cert.pem").read_text() == "certificate\n"
        assert (out / "ca.pem").read_text() == "server ca\n"
        for file in out.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(out.stat().st_mode) == 0o700
        assert load_device(out).device_id == "dev_1"

    async def test_without_a_ca_of_the_servers_the_devices_is_written(
        self, admin: AdminWorld, tmp_path: Path
    ) -> None:
        admin.server_ca_pem = None
        async with admin.running():
            done(await admin.glamctl(*ENROLL, "--out", str(tmp_path / "d")))
        assert (tmp_path / "d" / "ca.pem").read_text() == "device ca\n"
        assert "initial_key" not in json.loads((tmp_path / "d" / "device.json").read_text())

    async def test_a_request_is_signed_and_no_key_written(
        self, running: AdminWorld, tmp_path: Path
    ) -> None:
        csr = tmp_path / "request.pem"
        csr.write_text("-----BEGIN CERTIFICATE REQUEST-----\n")
        out = tmp_path / "d"
        done(
            await running.glamctl(
                *ENROLL, "--csr", str(csr), "--serial", "s", "--model", "m", "--out", str(out)
            )
        )
        assert not (out / "key.pem").exists()
        assert json.loads((out / "device.json").read_text())["key"] is None
        assert running.registry.enrolled == [
            {
                "serial": "s",
                "model": "m",
                "csr_pem": b"-----BEGIN CERTIFICATE REQUEST-----\n",
                "ksn": bytes.fromhex(KSN),
            }
        ]

    async def test_a_program_gets_all_of_it_in_json(self, running: AdminWorld) -> None:
        found = done_json(await running.glamctl(*ENROLL, "--json"))
        assert found["device_id"] == "dev_1"
        assert found["private_key_pem"] == PRIVATE_KEY
        assert found["initial_key"] is None

    async def test_a_key_is_not_made_that_nobody_would_see(self, running: AdminWorld) -> None:
        assert "--out" in failed(await running.glamctl(*ENROLL), 2)
        assert not running.registry.devices

    async def test_another_devices_files_are_not_overwritten(
        self, running: AdminWorld, tmp_path: Path
    ) -> None:
        (tmp_path / "device.json").write_text("{}")
        line = failed(await running.glamctl(*ENROLL, "--out", str(tmp_path)), 2)
        assert "already" in line
        assert not running.registry.devices

    async def test_files_that_cannot_be_written_are_told_with_the_devices_id(
        self, running: AdminWorld, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        out = str(tmp_path / "file" / "device")
        line = failed(await running.glamctl(*ENROLL, "--out", out), 1)
        assert line.startswith("NOT_WRITTEN: dev_1 is enrolled")

    async def test_what_is_no_request_is_not_sent(
        self, running: AdminWorld, tmp_path: Path
    ) -> None:
        csr = tmp_path / "request.der"
        csr.write_bytes(b"\x30\x82\xff")
        failed(await running.glamctl(*ENROLL, "--csr", str(csr), "--out", str(tmp_path / "d")), 2)
        failed(await running.glamctl(*ENROLL, "--csr", "no-such-file", "--json"), 2)


class TestKeys:
    """The ceremony, and check values instead of keys."""

    async def test_components_from_a_pipe_are_combined(self, running: AdminWorld) -> None:
        parts = ["0123456789ABCDEFFEDCBA9876543210", "1111 2222 3333 4444 5555 6666 7777 8888"]
        keys = [bytes.fromhex(part) for part in parts]
        typed = ["2"]
        for holder, part, key in zip(("Ann", "Ben Ö."), parts, keys, strict=True):
            typed += [holder, part, key_check_value(key, "aes-dukpt").lower()]
        result = await running.glamctl(
            "keys",
            "import-bdk",
            "ks1",
            "--scheme",
            "aes-dukpt",
            "--components",
            "--json",
            "--data-usage",
            "both",
            "--padding",
            "pkcs7",
            "--mac",
            "required",
            stdin="\n".join(typed) + "\n",
        )
        assert done_json(result)["kcv"] == "08D7B4"
        assert "0123" not in result.output
        assert running.keys.bdks["ks1"] == bytes(a ^ b for a, b in zip(*keys, strict=True))
        profile = running.keys.key_sets["ks1"].profile
        assert (profile.data_usage, profile.padding, profile.mac) == ("both", "pkcs7", "required")
        listed = done_json(await running.glamctl("keys", "list-bdk", "--json"))
        assert listed[0]["key_set"] == "ks1"
        assert "required" in done(await running.glamctl("keys", "list-bdk"))

    async def test_a_mistyped_check_value_is_named(self, running: AdminWorld) -> None:
        typed = f"2\nAnn\n{'12' * 16}\n000000\nBen\n{'34' * 16}\n000000\n"
        command = ("keys", "import-bdk", "ks1", "--scheme", "aes-dukpt", "--components")
        line = failed(await running.glamctl(*command, stdin=typed), 1)
        assert line.startswith("VALIDATION_ERROR: ")
        assert "(components.0.kcv: " in line
        assert "1212" not in line

    @pytest.mark.parametrize(
        "typed",
        [
            "",
            "1\n",
            "4\n",
            "2\n",
            "2\nAnn\n",
            "2\nAnn\nxyz\n",
            f"2\nAnn\n{'12' * 15}\n",
            f"2\nAnn\n{'12' * 16}\n1\n",
        ],
    )
    async def test_what_cannot_be_a_component_is_not_sent(
        self, running: AdminWorld, typed: str
    ) -> None:
        command = ("keys", "import-bdk", "ks1", "--scheme", "aes-dukpt", "--components")
        line = failed(await running.glamctl(*command, stdin=typed), 2)
        assert "1212" not in line

    async def test_a_clear_key_is_imported_in_development(self, running: AdminWorld) -> None:
        key = "0123456789ABCDEFFEDCBA9876543210"
        command = ("keys", "import-bdk", "ks2", "--scheme", "tdes-dukpt", "--variant", "pin")
        result = await running.glamctl(*command, "--clear", key)
        assert "08D7B4" in done(result)
        assert key not in result.output
        assert running.keys.bdks["ks2"] == bytes.fromhex(key)
        assert running.keys.key_sets["ks2"].profile.data_usage == "pin"

    async def test_a_clear_key_is_refused_in_production(self, admin: AdminWorld) -> None:
        admin.environment = "production"
        async with admin.running():
            command = ("keys", "import-bdk", "ks2", "--scheme", "aes-dukpt", "--clear", "12" * 16)
            line = failed(await admin.glamctl(*command), 1)
        assert line.startswith("FORBIDDEN: ")
        assert "1212" not in line

    @pytest.mark.parametrize(
        "options",
        [
            (),
            ("--components", "--clear", "12" * 16),
            ("--clear", "12" * 16, "--data-usage", "both"),
            ("--clear", "12" * 16, "--variant", "none"),
        ],
    )
    async def test_options_that_do_not_fit_are_a_wrong_use(
        self, running: AdminWorld, options: tuple[str, ...]
    ) -> None:
        command = ("keys", "import-bdk", "ks2", "--scheme", "tdes-dukpt")
        assert "1212" not in failed(await running.glamctl(*command, *options), 2)


class TestMinting:
    """JWTs in development."""

    async def test_a_clients_token_is_believed_for_twelve_hours(self, running: AdminWorld) -> None:
        command = ("jwt", "mint", "client", "--merchant", str(MERCHANT), "--shop", "a.example")
        token = done_json(await running.glamctl(*command, "--scope", "a b", "--json"))["token"]
        found = decoded(token, CLIENT_SECRET)
        assert found["merchant_id"] == str(MERCHANT)
        assert (found["shop"], found["scope"], found["aud"]) == ("a.example", "a b", "glamd")
        assert found["exp"] == NOW.timestamp() + 12 * 3600
        assert done(await running.glamctl(*command)).count(".") == 2

    async def test_a_services_token_has_no_scope_that_was_not_asked_for(
        self, running: AdminWorld
    ) -> None:
        command = ("jwt", "mint", "internal", "--service", "settler")
        found = decoded(done(await running.glamctl(*command)).strip(), INTERNAL_SECRET)
        assert found["service"] == "settler"
        assert "scope" not in found

    async def test_nothing_is_minted_in_production(self, admin: AdminWorld) -> None:
        admin.environment = "production"
        async with admin.running():
            command = ("jwt", "mint", "internal", "--service", "settler")
            line = failed(await admin.glamctl(*command), 1)
        assert line == "FORBIDDEN: JWTs are minted in development only."


def decoded(token: str, secret: str) -> dict[str, Any]:
    """A token's claims; its times are by the tests' clock."""
    return jwt.decode(
        token,
        secret,
        algorithms=["HS256"],
        audience="glamd",
        options={"verify_exp": False, "verify_iat": False},
    )


class TestDatabaseWithoutOne:
    """What `db` says before it connects to anything."""

    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(cli_db, "SYSTEM_CONFIG", tmp_path / "no-such-file")
        monkeypatch.delenv("DATABASE_URL", raising=False)

    async def test_history_is_newest_first(self, admin: AdminWorld) -> None:
        found = done_json(await admin.glamctl("db", "history", "--json"))
        assert found[-1]["after"] is None
        assert "0001" in done(await admin.glamctl("db", "history"))

    async def test_no_database_at_all_says_how_to_name_one(self, admin: AdminWorld) -> None:
        line = failed(await admin.glamctl("db", "current"), 1)
        assert line.startswith("CONFIG_ERROR: ")
        assert "DATABASE_URL" in line

    async def test_another_kind_of_database_is_named_without_its_password(
        self, admin: AdminWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DATABASE_URL", "mysql://x:secret@y/z")
        line = failed(await admin.glamctl("db", "upgrade"), 1)
        assert line.startswith("CONFIG_ERROR: ")
        assert "database.url" in line
        assert "secret" not in line

    async def test_a_configuration_that_cannot_be_read_is_named(
        self, admin: AdminWorld, tmp_path: Path
    ) -> None:
        (tmp_path / "bad.toml").write_text("[database\nurl = 'secret'")
        line = failed(await admin.glamctl("db", "--config", "bad.toml", "current"), 1)
        assert "bad.toml" in line
        assert "secret" not in line

    async def test_a_revision_file_is_made_and_named(
        self, admin: AdminWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(migrate, "revision", lambda message: Path(f"0002_{message}.py"))
        found = done_json(await admin.glamctl("db", "revision", "more", "--json"))
        assert found == {"file": "0002_more.py"}


class TestFailures:
    """One line on stderr, and an exit status that tells failed from wrongly used."""

    @pytest.mark.parametrize(
        ("args", "line"),
        [
            (("device", "show", "none"), "DEVICE_NOT_FOUND: There is no such device."),
            (("device", "show", "a/b"), "DEVICE_NOT_FOUND: There is no such device."),
            (("tokens", "show", "ptk_x"), "TOKEN_NOT_FOUND: There is no such token."),
            (("merchant", "show", "x"), "MERCHANT_NOT_FOUND: There is no such merchant."),
            (("actors", "show", "a", "b"), "ACTOR_NOT_FOUND: There is no such actor in memory."),
            (
                (
                    "merchant",
                    "create",
                    "--platform",
                    "custom",
                    "--shop-id",
                    "1",
                    "--domain",
                    "taken.example",
                ),
                (
                    "MERCHANT_EXISTS: There is another merchant already: domain."
                    " (domain: another merchant has this domain)"
                ),
            ),
        ],
        ids=range(6),
    )
    async def test_a_refusal_is_its_code_and_its_sentence(
        self, running: AdminWorld, args: tuple[str, ...], line: str
    ) -> None:
        assert failed(await running.glamctl(*args), 1) == line
        assert failed(await running.glamctl(*args, "--json"), 1) == line

    @pytest.mark.parametrize(
        "args",
        [
            ("nope",),
            ("device", "nope"),
            ("device", "show"),
            ("device", "show", "a", "b"),
            ("merchant", "create"),
            ("merchant", "create", "--id", "x"),
            ("log-level", "loud"),
            ("device", "list", "--limit", "0"),
            ("keys", "import-bdk", "a", "--scheme", "rot13"),
            ("--nope", "status"),
        ],
        ids=" ".join,
    )
    async def test_a_wrong_use_is_one_line_that_names_the_help(
        self, running: AdminWorld, args: tuple[str, ...]
    ) -> None:
        assert "--help" in failed(await running.glamctl(*args), 2)

    @pytest.mark.parametrize(
        "args",
        [
            ("device", "revoke", "dev_1"),
            ("tokens", "revoke", TOKEN),
            ("db", "reset"),
            ("db", "downgrade", "-1"),
        ],
        ids=" ".join,
    )
    async def test_what_cannot_be_undone_is_not_done_unasked(
        self, running: AdminWorld, args: tuple[str, ...]
    ) -> None:
        done(await running.glamctl(*ENROLL, "--json"))
        assert "--yes" in failed(await running.glamctl(*args, stdin="y\n"), 2)
        assert running.registry.devices["dev_1"].status == "active"
        assert running.world.tokens.tokens[TOKEN].status == "active"

    async def test_a_second_revocation_says_so(self, running: AdminWorld) -> None:
        done(await running.glamctl(*ENROLL, "--json"))
        done(await running.glamctl("device", "revoke", "dev_1", "--yes"))
        line = failed(await running.glamctl("device", "resume", "dev_1"), 1)
        assert line == "DEVICE_REVOKED: The device is revoked for good."

    async def test_no_daemon_is_said_in_one_line(self, admin: AdminWorld) -> None:
        line = failed(await admin.glamctl("status"), 1)
        assert line == f"UNREACHABLE: there is no socket at {admin.path}; is glamd running?"

    async def test_a_daemon_that_died_is_said_in_one_line(self, admin: AdminWorld) -> None:
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(admin.path))
        dead.close()
        assert "nobody listens" in failed(await admin.glamctl("status"), 1)

    async def test_a_path_that_is_too_long_is_said_in_one_line(self, admin: AdminWorld) -> None:
        admin.path = admin.path / ("x" * 200)
        assert failed(await admin.glamctl("status"), 1).startswith("UNREACHABLE: ")

    async def test_a_failure_inside_the_daemon_shows_nothing_of_it(
        self, running: AdminWorld
    ) -> None:
        running.world.tokens.fails = RuntimeError("SELECT secret")
        line = failed(await running.glamctl("tokens", "show", OTHER_TOKEN), 1)
        assert line.startswith("INTERNAL_ERROR: ")
        assert "SELECT" not in line

    async def test_help_is_there_for_everything(self, running: AdminWorld) -> None:
        for args in ((), ("device",), ("device", "enroll"), ("db",), ("jwt", "mint"), IMPORT):
            assert "Usage:" in done(await running.glamctl(*args, "--help"))
