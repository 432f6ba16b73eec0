"""The admin socket: its file, who may use it, what it answers and logs."""

import asyncio
import grp
import json
import os
import pwd
import socket
import stat
from collections.abc import MutableMapping
from typing import Any

import pytest

from glamd.admin.peers import Operators
from glamd.errors import ConfigError
from glamd.keys.key_sets.service import HsmKey, ProtectedKey
from tests.support.admin_world import KSN, AdminWorld
from tests.support.http_fakes import MERCHANT, OTHER_MERCHANT, SHORT_S, TOKEN, Reply, Wire

NOBODY = 65534


async def connect(admin: AdminWorld) -> Wire:
    """A connection to the socket."""
    async with asyncio.timeout(SHORT_S):
        return Wire(*await asyncio.open_unix_connection(admin.path))


async def ask(admin: AdminWorld, method: str, path: str, body: object = None) -> Reply:
    """One request on a connection of its own."""
    wire = await connect(admin)
    raw = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\nContent-Length: {len(raw)}\nContent-Type: application/json"
    reply = await wire.ask(head, raw)
    wire.writer.transport.abort()
    return reply


class TestFile:
    """The socket file."""

    async def test_only_its_owner_and_group_may_use_it(self, running: AdminWorld) -> None:
        assert stat.S_IMODE(running.path.stat().st_mode) == 0o660

    async def test_it_has_the_operators_group(self, admin: AdminWorld) -> None:
        gid = os.getgroups()[0] if os.getgroups() else os.getgid()
        admin.operators = Operators(gid=gid)
        async with admin.running():
            assert admin.path.stat().st_gid == gid

    async def test_it_is_gone_after_the_stop(self, admin: AdminWorld) -> None:
        async with admin.running():
            assert admin.path.exists()
        assert not admin.path.exists()

    async def test_one_that_a_dead_daemon_left_is_replaced(self, admin: AdminWorld) -> None:
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(admin.path))
        dead.close()
        async with admin.running():
            assert (await ask(admin, "GET", "/v1/version")).json == {"version": "9.9.9"}

    async def test_one_that_somebody_listens_on_is_left_alone(self, running: AdminWorld) -> None:
        with pytest.raises(ConfigError, match="already listens"):
            await running.server().start(running.path)
        assert (await ask(running, "GET", "/v1/version")).status == 200

    async def test_a_file_that_is_no_socket_is_left_alone(self, admin: AdminWorld) -> None:
        admin.path.write_text("precious")
        with pytest.raises(ConfigError, match="no socket"):
            await admin.server().start(admin.path)
        assert admin.path.read_text() == "precious"

    async def test_a_directory_that_is_not_there_is_a_mistake_of_the_configuration(
        self, admin: AdminWorld
    ) -> None:
        with pytest.raises(ConfigError, match="cannot be made"):
            await admin.server().start(admin.path / "deeper" / "admin.sock")

    async def test_a_successors_socket_survives_our_stop(self, admin: AdminWorld) -> None:
        first = admin.server()
        await first.start(admin.path)
        admin.path.unlink()
        async with admin.running():
            await first.stop(1.0)
            assert (await ask(admin, "GET", "/v1/version")).status == 200


class TestWho:
    """Peer credentials."""

    async def test_the_daemons_own_user_is_an_operator_and_named_in_the_log(
        self, running: AdminWorld, logs: list[MutableMapping[str, Any]]
    ) -> None:
        assert (await ask(running, "POST", "/v1/drain")).status == 202
        (event,) = [entry for entry in logs if entry["event"] == "http_request"]
        assert event["name"] == f"uid:{os.geteuid()}"
        assert (event["listener"], event["method"]) == ("admin", "POST")
        assert (event["route"], event["status"]) == ("/v1/drain", 202)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can connect as somebody else")
    async def test_another_user_is_refused_even_where_the_file_lets_them_in(
        self, running: AdminWorld, logs: list[MutableMapping[str, Any]]
    ) -> None:
        running.path.parent.chmod(0o755)
        running.path.chmod(0o666)
        end = socket.socket(socket.AF_UNIX)
        # The kernel notes the credentials of the moment of the connect.
        os.seteuid(NOBODY)
        try:
            end.connect(str(running.path))
        finally:
            os.seteuid(0)
        wire = Wire(*await asyncio.open_unix_connection(sock=end))
        reply = await wire.ask("POST /v1/drain HTTP/1.1")
        assert (reply.status, reply.json["code"]) == (403, "FORBIDDEN")
        assert not running.world.draining
        assert any(entry.get("status") == 403 for entry in logs)
        wire.writer.transport.abort()

    def test_root_the_daemon_the_listed_and_the_group_may(self) -> None:
        operators = Operators(uids=frozenset({4001}), gid=5001)
        assert operators.may(uid=0, gid=0)
        assert operators.may(uid=os.geteuid(), gid=4000)
        assert operators.may(uid=4001, gid=4001)
        assert operators.may(uid=4002, gid=5001)
        assert not operators.may(uid=4002, gid=4002)
        assert not Operators().may(uid=4002, gid=5001)

    def test_membership_counts_and_not_only_the_first_group(self) -> None:
        member = next(
            (
                (pwd.getpwnam(name), group.gr_gid)
                for group in grp.getgrall()
                for name in group.gr_mem
                if name in {user.pw_name for user in pwd.getpwall()}
            ),
            None,
        )
        if member is None:
            pytest.skip("this machine has no user in a second group")
        user, gid = member
        assert Operators(gid=gid).may(uid=user.pw_uid, gid=user.pw_gid)

    def test_operators_are_named_by_user_and_group(self) -> None:
        user = pwd.getpwuid(os.getuid()).pw_name
        found = Operators.named(group=grp.getgrgid(0).gr_name, users=[user])
        assert found == Operators(uids=frozenset({os.getuid()}), gid=0)
        with pytest.raises(ConfigError, match="no-such-user"):
            Operators.named(group=None, users=["no-such-user"])
        with pytest.raises(ConfigError, match="no-such-group"):
            Operators.named(group="no-such-group", users=[])


class TestAnswers:
    """What the routes take and answer, beyond what glamctl sends."""

    async def test_a_success_is_the_thing_itself(self, running: AdminWorld) -> None:
        reply = await ask(running, "GET", "/v1/log-level")
        assert reply.json == {"level": "info"}
        assert reply.headers["x-request-id"]

    @pytest.mark.parametrize(
        ("asked", "body", "expected"),
        [
            ("GET /v1/nope", None, (404, "NOT_FOUND", [])),
            ("PUT /v1/devices", None, (405, "METHOD_NOT_ALLOWED", [])),
            ("GET /v1/devices/none", None, (404, "DEVICE_NOT_FOUND", [])),
            ("GET /v1/devices/%00", None, (404, "DEVICE_NOT_FOUND", [])),
            ("POST /v1/devices/none/revoke", None, (404, "DEVICE_NOT_FOUND", [])),
            ("GET /v1/devices?limit=0", None, (422, "VALIDATION_ERROR", ["limit"])),
            ("GET /v1/devices?limit=201", None, (422, "VALIDATION_ERROR", ["limit"])),
            ("GET /v1/devices?limit=%D9%A3", None, (422, "VALIDATION_ERROR", ["limit"])),
            ("GET /v1/devices?merchant_id=x", None, (422, "VALIDATION_ERROR", ["merchant_id"])),
            ("GET /v1/devices?after=%00", None, (422, "VALIDATION_ERROR", ["after"])),
            ("GET /v1/merchants/x", None, (404, "MERCHANT_NOT_FOUND", [])),
            (f"GET /v1/merchants/{OTHER_MERCHANT}", None, (404, "MERCHANT_NOT_FOUND", [])),
            ("GET /v1/merchants?after=x", None, (422, "VALIDATION_ERROR", ["after"])),
            ("GET /v1/tokens/x", None, (404, "TOKEN_NOT_FOUND", [])),
            ("GET /v1/actors/device/none", None, (404, "ACTOR_NOT_FOUND", [])),
            ("PUT /v1/log-level", {"level": "loud"}, (422, "VALIDATION_ERROR", ["level"])),
            ("PUT /v1/log-level", {}, (422, "VALIDATION_ERROR", ["level"])),
            ("POST /v1/devices", [], (422, "VALIDATION_ERROR", ["body"])),
            ("POST /v1/jwt/internal", {"service": "a b"}, (422, "VALIDATION_ERROR", ["service"])),
        ],
        ids=lambda value: str(value)[:30],
    )
    async def test_a_wrong_request_is_a_problem(
        self, running: AdminWorld, asked: str, body: object, expected: tuple[int, str, list[str]]
    ) -> None:
        method, path = asked.split(" ", 1)
        reply = await ask(running, method, path, body)
        fields = [e["field"] for e in reply.json.get("errors", [])]
        assert (reply.status, reply.json["code"], fields) == expected

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"ksn": KSN[:-1]}, "ksn"),
            ({"ksn": KSN + "00"}, "ksn"),
            ({"ksn": "x" * 20}, "ksn"),
            ({"ksn": KSN + "\n"}, "ksn"),
            ({"merchant_id": "x"}, "merchant_id"),
            ({"merchant_id": 7}, "merchant_id"),
            ({"key_set": ""}, "key_set"),
            ({"serial": "x" * 65}, "serial"),
            ({"csr": "x" * 16_385}, "csr"),
            ({"export_initial_key": "yes"}, "export_initial_key"),
            ({"extra": 1}, "extra"),
        ],
        ids=str,
    )
    async def test_an_enrolment_names_what_is_wrong(
        self, running: AdminWorld, change: dict[str, object], field: str
    ) -> None:
        good = {"merchant_id": str(MERCHANT), "key_set": "ks1", "ksn": KSN}
        reply = await ask(running, "POST", "/v1/devices", good | change)
        assert (reply.status, reply.json["code"]) == (422, "VALIDATION_ERROR")
        assert [e["field"] for e in reply.json["errors"]] == [field]
        assert not running.registry.devices

    async def test_a_ksn_in_any_case_is_the_same_ksn(self, running: AdminWorld) -> None:
        body = {"merchant_id": str(MERCHANT), "key_set": "ks1", "ksn": KSN.lower()}
        reply = await ask(running, "POST", "/v1/devices", body)
        assert reply.status == 201
        assert reply.json["device"]["ksn"] == KSN
        body["ksn"] = KSN
        again = await ask(running, "POST", "/v1/devices", body)
        assert (again.status, again.json["code"]) == (409, "KSN_IN_USE")

    async def test_a_tokens_merchant_is_told_to_operators(self, running: AdminWorld) -> None:
        reply = await ask(running, "GET", f"/v1/tokens/{TOKEN}")
        assert reply.json["merchant_id"] == str(MERCHANT)

    async def test_operators_may_look_on_while_the_daemon_drains(self, running: AdminWorld) -> None:
        await ask(running, "POST", "/v1/drain")
        reply = await ask(running, "GET", "/v1/status")
        assert reply.json["draining"] is True
        assert reply.json["health"]["status"] == "unavailable"

    async def test_a_wrapped_key_is_not_shown(self, running: AdminWorld) -> None:
        assert b"wrapped" not in (await ask(running, "GET", "/v1/keys")).body


COMPONENTS = [
    {"holder": "Ann", "hex": "1123" * 8, "kcv": "000000"},
    {"holder": "Ben", "hex": "2234" * 8, "kcv": "000000"},
]


class TestKeyImport:
    """A key that comes in wrong is refused without a byte of it in the answer or the log."""

    @pytest.mark.parametrize(
        ("body", "fields"),
        [
            ({}, ["components"]),
            ({"clear": "33" * 16, "components": COMPONENTS}, ["components"]),
            ({"clear": "33" * 15}, ["clear"]),
            ({"clear": "xx" * 16}, ["clear"]),
            ({"components": COMPONENTS[:1]}, ["components.0.kcv"]),
            ({"components": []}, ["components"]),
            ({"components": COMPONENTS * 2}, ["components"]),
            ({"components": COMPONENTS}, ["components.0.kcv"]),
            (
                {"components": [COMPONENTS[0], COMPONENTS[1] | {"hex": "zz" * 16}]},
                ["components.1.hex"],
            ),
            (
                {"components": [COMPONENTS[0], COMPONENTS[1] | {"kcv": "0000"}]},
                ["components.1.kcv"],
            ),
            (
                {"components": [{"hex": "11" * 16, "kcv": "000000"}] * 2},
                ["components.0.holder", "components.1.holder"],
            ),
            ({"components": [COMPONENTS[0] | {"holder": "a" * 65}]}, ["components.0.holder"]),
            ({"hsm_label": "bdk-1", "clear": "33" * 16}, ["hsm_label"]),
            ({"hsm_label": ""}, ["hsm_label"]),
            ({"key_block": "B0016B0TX00E0000"}, ["kbpk"]),
            ({"key_block": "B" * 17_000, "kbpk": COMPONENTS}, ["key_block"]),
            ({"clear": "33" * 16, "kbpk": COMPONENTS}, ["kbpk"]),
            ({"clear": "33" * 16, "reader": ""}, ["reader"]),
            ({"clear": "33" * 16, "scheme": "rot13"}, ["scheme"]),
            ({"clear": "33" * 16, "padding": "some"}, ["padding"]),
            ({"clear": "33" * 16, "counter_window": "many"}, ["counter_window"]),
        ],
        ids=range(21),
    )
    async def test_what_is_wrong_is_named(
        self,
        running: AdminWorld,
        logs: list[MutableMapping[str, Any]],
        body: dict[str, object],
        fields: list[str],
    ) -> None:
        whole = {"key_set": "ks1", "scheme": "tdes-dukpt"} | body
        reply = await ask(running, "POST", "/v1/key-sets", whole)
        assert (reply.status, reply.json["code"]) == (422, "VALIDATION_ERROR")
        named = [e["field"] for e in reply.json["errors"]]
        assert named == fields
        for secret in ("1111", "1123", "2234", "3333", "zzzz", "xxxx", "BBBB"):
            assert secret not in reply.body.decode()
            assert secret not in json.dumps(logs, default=str)
        assert not running.keys.bdks

    async def test_a_clear_key_is_not_taken_in_production(self, admin: AdminWorld) -> None:
        admin.environment = "production"
        body = {"key_set": "ks1", "scheme": "aes-dukpt", "clear": "33" * 16}
        async with admin.running():
            reply = await ask(admin, "POST", "/v1/key-sets", body)
        assert (reply.status, reply.json["code"]) == (403, "FORBIDDEN")
        assert not admin.keys.bdks

    async def test_a_source_that_may_not_be_is_recorded_as_refused(
        self, running: AdminWorld
    ) -> None:
        body = {"key_set": "ks1", "scheme": "aes-dukpt"}
        await ask(running, "POST", "/v1/key-sets", body)
        assert running.keys.refused == [("ks1", f"uid:{os.geteuid()}", "VALIDATION_ERROR")]

    @pytest.mark.parametrize("name", ["nobody", "a%2Fb", "%00", "a" * 65])
    async def test_a_key_set_that_is_not_there_cannot_be_retired(
        self, running: AdminWorld, name: str
    ) -> None:
        reply = await ask(running, "POST", f"/v1/key-sets/{name}/retire")
        assert (reply.status, reply.json["code"]) == (404, "KEY_SET_UNKNOWN")

    async def test_a_retired_key_set_stays_in_the_list(self, running: AdminWorld) -> None:
        body = {"key_set": "ks1", "scheme": "aes-dukpt", "clear": "33" * 16}
        await ask(running, "POST", "/v1/key-sets", body)
        reply = await ask(running, "POST", "/v1/key-sets/ks1/retire")
        assert (reply.status, reply.json["status"]) == (200, "retired")
        (listed,) = (await ask(running, "GET", "/v1/key-sets")).json["key_sets"]
        assert (listed["status"], listed["devices"], listed["reader"]) == ("retired", 3, "generic")
        assert listed["retired_at"] is not None

    async def test_where_an_import_comes_from_is_handed_on_as_it_was_given(
        self, running: AdminWorld
    ) -> None:
        whole: dict[str, object] = {"key_set": "ks1", "scheme": "aes-dukpt"}
        whole |= {"hsm_label": "bdk-1", "counter_window": 64, "reader": "idtech"}
        assert (await ask(running, "POST", "/v1/key-sets", whole)).status == 201
        assert running.keys.bdks["ks1"] == HsmKey("bdk-1")
        made = running.keys.key_sets["ks1"]
        assert (made.counter_window, made.reader) == (64, "idtech")
        block = {"key_set": "ks2", "scheme": "aes-dukpt", "key_block": "D…", "kbpk": COMPONENTS}
        assert (await ask(running, "POST", "/v1/key-sets", block)).status == 201
        kept = running.keys.bdks["ks2"]
        assert isinstance(kept, ProtectedKey)
        assert [part.holder for part in kept.kbpk] == ["Ann", "Ben"]
        assert "1123" not in repr(kept)
        assert "D…" not in repr(kept)

    async def test_the_one_who_imports_is_noted(self, running: AdminWorld) -> None:
        body = {"key_set": "ks1", "scheme": "aes-dukpt", "clear": "33" * 16}
        reply = await ask(running, "POST", "/v1/key-sets", body)
        assert reply.json["kcv"] == "08D7B4"
        assert "3333" not in reply.body.decode()
        assert running.keys.actors == [f"uid:{os.geteuid()}"]
