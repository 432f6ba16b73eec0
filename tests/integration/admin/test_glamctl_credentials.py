"""glamctl about platform tokens and revoked JWTs: what it shows, asks, and how it fails."""

import asyncio
import json
import os
import sys
from collections.abc import MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args
from uuid import UUID

import pytest
from click.testing import Result

from glamd.admin.cli_credentials import (
    BATCH_LIMIT,
    FIELDS,
    HEALTHS,
    HOLD_H,
    HOLD_LIMIT_H,
    PLATFORMS,
)
from glamd.credentials import model
from glamd.credentials.importing import older, service
from glamd.credentials.service import PlatformTokens
from glamd.db import Database
from glamd.revocations.service import Revocations
from tests.support.admin_world import AdminWorld, failed
from tests.support.at_terminal import at_terminal
from tests.support.credential_fakes import FakeCredentials, FakeRevocations, access, connection
from tests.support.http_fakes import MERCHANT, NOW, OTHER_MERCHANT, SHORT_S, Wire
from tests.support.keys import local_provider
from tests.support.platform_vault import CANARY, READER, load_keyring, new_token

GLAMCTL = Path(sys.executable).with_name("glamctl")
IMPORT = ("credentials", "import")


@pytest.fixture
def credentials(running: AdminWorld) -> FakeCredentials:
    """The connections that there are."""
    assert isinstance(running.credentials, FakeCredentials)
    return running.credentials


@pytest.fixture
def revocations(running: AdminWorld) -> FakeRevocations:
    """What was revoked."""
    assert isinstance(running.revocations, FakeRevocations)
    return running.revocations


def done(result: Result) -> str:
    """The output of a command that was done."""
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


async def status_of(admin: AdminWorld, method: str, path: str, body: object = None) -> Any:
    """Status, code and fields of an answer to a request of the test's own making."""
    wire = Wire(*await asyncio.open_unix_connection(admin.path))
    raw = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\nContent-Length: {len(raw)}\nContent-Type: application/json"
    async with asyncio.timeout(SHORT_S):
        reply = await wire.ask(head, raw)
    wire.writer.transport.abort()
    fields = [error["field"] for error in reply.json.get("errors", [])]
    return reply.status, reply.json.get("code"), fields


def test_what_glamctl_knows_by_itself_is_what_the_daemon_knows() -> None:
    assert PLATFORMS == model.PLATFORMS
    assert get_args(model.Health) == HEALTHS
    assert set(older.LIMITS) == set(FIELDS)
    assert service.BATCH_LIMIT == BATCH_LIMIT
    assert (service.HOLD_H, service.HOLD_LIMIT_H) == (HOLD_H, HOLD_LIMIT_H)


class TestRefusals:
    """What is asked for wrongly, or is not there."""

    @pytest.mark.parametrize(
        ("asked", "body", "expected"),
        [
            ("GET /v1/credentials?limit=0", None, (422, "VALIDATION_ERROR", ["limit"])),
            ("GET /v1/credentials?limit=201", None, (422, "VALIDATION_ERROR", ["limit"])),
            ("GET /v1/credentials?platform=etsy", None, (422, "VALIDATION_ERROR", ["platform"])),
            ("GET /v1/credentials?health=well", None, (422, "VALIDATION_ERROR", ["health"])),
            ("GET /v1/credentials?merchant_id=x", None, (422, "VALIDATION_ERROR", ["merchant_id"])),
            ("GET /v1/credentials?after=x", None, (422, "VALIDATION_ERROR", ["after"])),
            (
                f"GET /v1/credentials?after={MERCHANT}:etsy",
                None,
                (422, "VALIDATION_ERROR", ["after"]),
            ),
            ("GET /v1/credentials/x", None, (404, "MERCHANT_NOT_FOUND", [])),
            (f"GET /v1/credentials/{MERCHANT}", None, (404, "PLATFORM_TOKEN_NOT_FOUND", [])),
            (f"GET /v1/credentials/{MERCHANT}/etsy", None, (404, "PLATFORM_TOKEN_NOT_FOUND", [])),
            (
                f"GET /v1/credentials/{MERCHANT}/magento",
                None,
                (404, "PLATFORM_TOKEN_NOT_FOUND", []),
            ),
            (
                f"GET /v1/credentials/{MERCHANT}/access-log?before=0",
                None,
                (422, "VALIDATION_ERROR", ["before"]),
            ),
            ("GET /v1/credentials/import", None, (409, "IMPORT_KEY_MISSING", [])),
            ("POST /v1/credentials/import", {"rows": []}, (422, "VALIDATION_ERROR", ["rows"])),
            (
                "POST /v1/credentials/import",
                {"rows": [{}] * 501},
                (422, "VALIDATION_ERROR", ["rows"]),
            ),
            (
                "POST /v1/credentials/import",
                {"rows": [{"access_count": 7}]},
                (422, "VALIDATION_ERROR", ["rows.0.access_count"]),
            ),
            (
                "POST /v1/credentials/import",
                {"rows": [{}], "hold_renewal_h": 145},
                (422, "VALIDATION_ERROR", ["hold_renewal_h"]),
            ),
            ("POST /v1/jwt/revocations", {}, (422, "VALIDATION_ERROR", ["jti"])),
            (
                "POST /v1/jwt/revocations",
                {"jti": "a", "kid": "b"},
                (422, "VALIDATION_ERROR", ["jti"]),
            ),
            ("POST /v1/jwt/revocations", {"jti": ""}, (422, "VALIDATION_ERROR", ["jti"])),
            ("POST /v1/jwt/revocations", {"kid": "k" * 257}, (422, "VALIDATION_ERROR", ["kid"])),
            ("POST /v1/jwt/revocations", {"kid": "a\nb"}, (422, "VALIDATION_ERROR", ["kid"])),
        ],
        ids=range(22),
    )
    async def test_a_wrong_request_is_a_problem(
        self, running: AdminWorld, asked: str, body: object, expected: tuple[int, str, list[str]]
    ) -> None:
        method, path = asked.split(" ", 1)
        assert await status_of(running, method, path, body) == expected

    @pytest.mark.parametrize(
        "args",
        [
            ("credentials", "list", "--platform", "etsy"),
            ("credentials", "list", "--merchant", "x"),
            ("credentials", "show"),
            ("credentials", "show", str(MERCHANT), "etsy"),
            ("credentials", "show", str(MERCHANT), "--log", "0"),
            ("credentials", "show", str(MERCHANT), "--log", "2", "--before", "0"),
            ("credentials", "show", str(MERCHANT), "--before", "7"),
            IMPORT,
            (*IMPORT, "--from-url", "postgresql://a/b", "--from-file", "setup.cfg"),
            (*IMPORT, "--from-file", "no-such-file"),
            (*IMPORT, "--from-file", "/dev/null"),
            (*IMPORT, "--from-url-file", "setup.cfg"),
            (*IMPORT, "--from-url", "postgresql://a/b", "--batch", "501"),
            (*IMPORT, "--from-url", "postgresql://a/b", "--hold-renewal", "145"),
            (*IMPORT, "--from-url", "postgresql://a/b", "--column", "domain"),
            (*IMPORT, "--from-url", "postgresql://a/b", "--column", "shop=domain"),
            ("jwt", "revoke", "--yes"),
            ("jwt", "revoke", "--jti", "a", "--kid", "b", "--yes"),
        ],
        ids=" ".join,
    )
    async def test_a_wrong_use_is_one_line_that_names_the_help(
        self, running: AdminWorld, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("GLAMD_IMPORT_URL", raising=False)
        assert "--help" in failed(await running.glamctl(*args), 2)

    async def test_without_the_older_key_nothing_is_read(
        self, running: AdminWorld, tmp_path: Path
    ) -> None:
        (tmp_path / "rows").write_text("{}\n")
        line = failed(await running.glamctl(*IMPORT, "--from-file", str(tmp_path / "rows")), 1)
        assert line.startswith("IMPORT_KEY_MISSING: ")
        assert "credentials.import_key" in line

    async def test_a_revocation_is_not_done_unasked(
        self, running: AdminWorld, revocations: FakeRevocations
    ) -> None:
        line = failed(await running.glamctl("jwt", "revoke", "--jti", "j-1", stdin="y\n"), 2)
        assert "--yes" in line
        assert not revocations.all

    async def test_what_no_token_can_have_is_not_revoked(
        self, running: AdminWorld, revocations: FakeRevocations
    ) -> None:
        line = failed(await running.glamctl("jwt", "revoke", "--kid", "k" * 257, "--yes"), 1)
        assert line.startswith("VALIDATION_ERROR: ")
        assert "(kid: " in line
        assert not revocations.all


class TestList:
    """Connections of all merchants."""

    async def test_those_asked_for_are_listed(
        self, running: AdminWorld, credentials: FakeCredentials
    ) -> None:
        credentials.all = [
            connection(),
            connection(platform="magento", expires_at=NOW - timedelta(hours=1)),
            connection(OTHER_MERCHANT, refresh_failures=2, refresh_error="REFUSED"),
        ]
        listing = ("credentials", "list", "--json")
        for options, expected in (
            ((), 3),
            (("--merchant", str(MERCHANT)), 2),
            (("--platform", "shopify"), 2),
            (("--health", "valid"), 1),
            (("--health", "expired"), 1),
            (("--health", "refresh-failing"), 1),
            (("--limit", "2"), 2),
            (("--after", f"{OTHER_MERCHANT}:shopify"), 2),
            (("--merchant", str(OTHER_MERCHANT), "--platform", "magento"), 0),
        ):
            found = json.loads(done(await running.glamctl(*listing, *options)))
            assert len(found) == expected, options
        table = done(await running.glamctl("credentials", "list"))
        assert str(OTHER_MERCHANT) in table
        assert "refresh-failing" in table

    async def test_a_long_list_is_fetched_page_by_page(
        self, running: AdminWorld, credentials: FakeCredentials
    ) -> None:
        credentials.all = [connection(UUID(int=n)) for n in range(450)]
        found = json.loads(
            done(await running.glamctl("credentials", "list", "--limit", "420", "--json"))
        )
        assert [one["merchant_id"] for one in found] == [str(UUID(int=n)) for n in range(420)]


class TestShow:
    """One merchant's."""

    async def test_one_connection_is_an_object_and_lines(
        self, running: AdminWorld, credentials: FakeCredentials
    ) -> None:
        later = NOW + timedelta(minutes=5)
        credentials.all = [
            connection(refresh_failures=2, refresh_error="HTTP_500", refresh_not_before=later)
        ]
        show = ("credentials", "show", str(MERCHANT), "shopify")
        found = json.loads(done(await running.glamctl(*show, "--json")))
        assert found["health"] == "refresh-failing"
        assert (found["refresh_failures"], found["refresh_error"]) == (2, "HTTP_500")
        assert found["refresh_not_before"] == "2030-01-01T12:05:00Z"
        assert (found["key_version"], found["access_count"]) == ("v1", 3)
        assert "access_log" not in found
        text = done(await running.glamctl(*show))
        assert "refresh-failing" in text
        assert "read_products; write_orders" in text

    async def test_all_of_a_merchants_are_shown_with_the_last_accesses(
        self, running: AdminWorld, credentials: FakeCredentials
    ) -> None:
        credentials.all = [connection(), connection(platform="magento")]
        credentials.log = [access(n) for n in range(1, 6)]
        credentials.log.append(access(6, action="delete", error="SERVICE_NOT_ALLOWED"))
        show = ("credentials", "show", str(MERCHANT), "--log", "3")
        found = json.loads(done(await running.glamctl(*show, "--json")))
        assert [one["platform"] for one in found["connections"]] == ["magento", "shopify"]
        assert [one["id"] for one in found["access_log"]] == [6, 5, 4]
        assert found["access_log"][0]["success"] is False
        text = done(await running.glamctl(*show))
        assert "SERVICE_NOT_ALLOWED" in text
        assert "order-77" in text
        assert text.count("key version") == 2

    async def test_the_access_log_goes_back_as_far_as_there_are_rows(
        self, running: AdminWorld, credentials: FakeCredentials
    ) -> None:
        credentials.all = [connection()]
        credentials.log = [access(n) for n in range(1, 451)]
        show = ("credentials", "show", str(MERCHANT), "--log", "200")
        text = done(await running.glamctl(*show))
        assert "Older rows: --before 251" in text
        ids: list[int] = []
        before: tuple[str, ...] = ()
        for _ in range(3):
            found = json.loads(done(await running.glamctl(*show, *before, "--json")))
            ids += [one["id"] for one in found["access_log"]]
            before = ("--before", str(found["access_log_next"]))
        assert ids == list(range(450, 0, -1))
        assert found["access_log_next"] is None
        assert "Older rows" not in done(await running.glamctl(*show, "--before", "50"))


class TestRevocation:
    """JWTs that are not believed any more."""

    async def test_a_jwt_and_a_key_are_revoked_by_the_operator_who_says_so(
        self,
        running: AdminWorld,
        revocations: FakeRevocations,
        logs: list[MutableMapping[str, Any]],
    ) -> None:
        revoke = ("jwt", "revoke", "--yes", "--json")
        made = json.loads(done(await running.glamctl(*revoke, "--jti", "j-1")))
        assert (made["kind"], made["value"]) == ("jti", "j-1")
        assert made["revoked_by"] == f"uid:{os.geteuid()}"
        assert "kid" in done(await running.glamctl("jwt", "revoke", "--yes", "--kid", "k 1/ä"))
        assert [(one.kind, one.value, one.expires_at) for one in revocations.all] == [
            ("jti", "j-1", None),
            ("kid", "k 1/ä", None),
        ]
        listed = json.loads(done(await running.glamctl("jwt", "revoked", "--json")))
        assert [one["value"] for one in listed] == ["k 1/ä", "j-1"]
        assert "k 1/ä" in done(await running.glamctl("jwt", "revoked"))
        assert {e["status"] for e in logs if e.get("method") == "POST"} == {201}

    async def test_it_is_there_in_production_where_minting_is_not(self, admin: AdminWorld) -> None:
        admin.environment = "production"
        async with admin.running():
            done(await admin.glamctl("jwt", "revoke", "--jti", "j-1", "--yes"))
            assert "j-1" in done(await admin.glamctl("jwt", "revoked"))

    @pytest.mark.parametrize(("answer", "revoked"), [("y", 1), ("n", 0)])
    async def test_at_a_terminal_it_asks_first(
        self, running: AdminWorld, revocations: FakeRevocations, answer: str, revoked: int
    ) -> None:
        command = (GLAMCTL, "--socket", running.path, "jwt", "revoke", "--kid", "k-1")
        conversation = [("Revoke the key k-1 for good?", answer)]
        code, _ = await asyncio.to_thread(at_terminal, command, conversation)
        assert code == 1 - revoked
        assert len(revocations.all) == revoked


class TestRealParts:
    """The same with the vault and the revocations themselves behind."""

    async def test_what_is_in_the_vault_is_shown_without_its_secret(
        self, admin: AdminWorld, database: Database, tmp_path: Path
    ) -> None:
        clock = admin.world.clock
        keyring = await load_keyring(database, local_provider(tmp_path), clock)
        vault = PlatformTokens(database, keyring=keyring, clock=clock)
        admin.credentials = vault
        await vault.store(new_token(MERCHANT), accessor=READER)
        await vault.store(new_token(OTHER_MERCHANT, "magento", expires_at=NOW), accessor=READER)
        await vault.read(MERCHANT, platform=None, accessor=READER)
        async with admin.running():
            pages = ("credentials", "list", "--limit", "1", "--json")
            first = json.loads(done(await admin.glamctl(*pages)))
            place = f"{first[0]['merchant_id']}:{first[0]['platform']}"
            second = json.loads(done(await admin.glamctl(*pages, "--after", place)))
            assert {one["merchant_id"] for one in first + second} == {
                str(MERCHANT),
                str(OTHER_MERCHANT),
            }
            expired = json.loads(done(await admin.glamctl(*pages, "--health", "expired")))
            assert [one["platform"] for one in expired] == ["magento"]
            show = ("credentials", "show", str(MERCHANT), "--log", "5")
            shown = done(await admin.glamctl(*show)) + done(await admin.glamctl(*show, "--json"))
        assert "platform-connector" in shown
        assert shown.count("order-77") >= 2
        assert CANARY not in shown

    async def test_what_is_revoked_is_not_believed_any_more(
        self, admin: AdminWorld, database: Database
    ) -> None:
        revocations = Revocations(database, clock=admin.world.clock)
        admin.revocations = revocations
        async with admin.running():
            for option, value in (("--jti", "j-1"), ("--kid", "k-1"), ("--jti", "j-1")):
                done(await admin.glamctl("jwt", "revoke", option, value, "--yes"))
            assert revocations.is_revoked(jti="j-1", kid=None)
            assert revocations.is_revoked(jti=None, kid="k-1")
            assert not revocations.is_revoked(jti="k-1", kid="j-1")
            listed = json.loads(done(await admin.glamctl("jwt", "revoked", "--json")))
        assert {(one["kind"], one["value"]) for one in listed} == {("jti", "j-1"), ("kid", "k-1")}
