"""glamctl about keyrings, with real keys and rows: what it shows, asks, and how it refuses."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from glamd.admin import cli_keys
from glamd.db import Database
from tests.support.admin_world import AdminWorld
from tests.support.at_terminal import at_terminal
from tests.support.keys import local_provider
from tests.support.sealed_rows import Node, seal_tokens, start_node

GLAMCTL = Path(sys.executable).with_name("glamctl")
TOKENS = 40


@pytest.fixture
async def node(database: Database, admin: AdminWorld, tmp_path: Path) -> Node:
    """A node with some tokens, behind the admin socket."""
    made = await start_node(database, local_provider(tmp_path))
    await seal_tokens(database, made.keyrings.payment_tokens.active, TOKENS)
    admin.key_life = made.life
    return made


async def test_a_version_lives_and_ends_by_commands(node: Node, admin: AdminWorld) -> None:
    async with admin.running():
        rotated = await admin.glamctl("keys", "rotate", "payment-tokens", "--json")
        assert rotated.exit_code == 0, rotated.output
        made = json.loads(rotated.stdout)
        assert (made["version"], made["status"]) == ("v2", "active")
        refused = await admin.glamctl("keys", "retire", "payment-tokens", "v1")
        assert refused.exit_code == 1
        assert refused.stderr.startswith("KEY_IN_USE: The version v1 is needed by 40 rows")
        await node.job.work()
        retired = await admin.glamctl("keys", "retire", "payment-tokens", "v1", "--json")
        assert json.loads(retired.stdout)["status"] == "retired"
        unasked = await admin.glamctl("keys", "destroy", "payment-tokens", "v1")
        assert unasked.exit_code == 2
        assert "say --yes" in unasked.stderr
        destroyed = await admin.glamctl("keys", "destroy", "payment-tokens", "v1", "--yes")
        assert destroyed.exit_code == 0
        assert "destroyed" in destroyed.stdout
    assert [(entry[0], entry[3]) for entry in node.written] == [
        ("keys.rotate", "ok"),
        ("keys.retire", "KEY_IN_USE"),
        ("keys.retire", "ok"),
        ("keys.destroy", "ok"),
    ]
    assert all(entry[2].startswith("uid:") for entry in node.written)


async def test_the_status_is_an_object_by_keyring(node: Node, admin: AdminWorld) -> None:
    async with admin.running():
        await admin.glamctl("keys", "rotate", "payment-tokens")
        shown = await admin.glamctl("keys", "status", "--json")
    status = json.loads(shown.stdout)
    assert set(status) == {"payment-tokens", "fingerprints", "audit"}
    tokens = status["payment-tokens"]
    assert (tokens["active"], tokens["remaining"]) == ("v2", TOKENS)
    assert {"rate", "eta_s", "damaged", "warnings"} <= set(tokens)
    assert [(v["version"], v["status"]) for v in tokens["versions"]] == [
        ("v1", "decrypt-only"),
        ("v2", "active"),
    ]
    assert "wrapped" not in shown.stdout


async def test_people_see_a_bar_and_the_versions(node: Node, admin: AdminWorld) -> None:
    async with admin.running():
        await admin.glamctl("keys", "rotate", "payment-tokens")
        before = await admin.glamctl("keys", "status")
        await node.job.work()
        after = await admin.glamctl("keys", "status")
    assert " 0 % " in before.stdout
    assert " 100 % " in after.stdout
    assert "━" in after.stdout
    assert "decrypt-only" in after.stdout


async def test_names_of_keyrings_are_whole_on_a_narrow_terminal(
    node: Node, admin: AdminWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_keys, "PIPE_WIDTH", 80)
    async with admin.running():
        shown = (await admin.glamctl("keys", "status")).stdout
    progress = [line for line in shown.splitlines() if "%" in line]
    assert max(map(len, progress)) <= 80
    names = {line.split()[0] for line in progress}
    assert names == {"payment-tokens", "fingerprints", "audit"}


async def test_a_warning_goes_to_stderr(node: Node, admin: AdminWorld, database: Database) -> None:
    await database.execute("UPDATE cde.encryption_keys SET activated_at = '2020-01-01'")
    async with admin.running():
        shown = await admin.glamctl("keys", "status")
    assert shown.exit_code == 0
    assert "warning: payment-tokens: v1 is past its cryptoperiod: rotate it" in shown.stderr


@pytest.mark.parametrize(
    ("words", "code", "field"),
    [
        (("rotate", "payments"), "KEYRING_NOT_FOUND", "keyring"),
        (("rotate", "fingerprints"), "KEYRING_NEVER_ROTATES", "keyring"),
        (("retire", "payment-tokens", "v9"), "KEY_VERSION_NOT_FOUND", "version"),
        (("retire", "payment-tokens", "v1"), "KEY_STATUS", "version"),
        (("destroy", "payment-tokens", "../x", "--yes"), "KEY_VERSION_NOT_FOUND", "version"),
        (("destroy", "audit", "v1", "--yes"), "KEY_STATUS", "version"),
    ],
)
async def test_what_is_wrong_is_named_in_one_line(
    node: Node, admin: AdminWorld, words: tuple[str, ...], code: str, field: str
) -> None:
    async with admin.running():
        result = await admin.glamctl("keys", *words)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{code}: ")
    assert f"({field}: " in result.stderr
    assert result.stderr.count("\n") == 1
    assert node.written[-1][3] == code


async def test_destroy_asks_at_a_terminal_and_a_no_destroys_nothing(
    node: Node, admin: AdminWorld
) -> None:

    async with admin.running():
        command: list[str | Path] = [
            GLAMCTL,
            "--socket",
            admin.path,
            "keys",
            "destroy",
            "payment-tokens",
            "v1",
        ]
        status, shown = await asyncio.to_thread(
            at_terminal, command, [("Destroy v1 of payment-tokens?", "n")]
        )
    assert status == 1
    assert "Rows that are restored from backups without it stay shut." in shown
    assert node.written == []
