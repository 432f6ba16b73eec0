"""Submissions on both listeners with a fake behind: who may, what is passed on and answered."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from glamd.errors import FieldError, ForbiddenError, InputError, UnavailableError
from glamd.http.limits import HttpLimits
from glamd.http.submissions import KINDS
from glamd.http.tls import worker_tls
from tests.support.http_certificates import Authority, Files
from tests.support.http_fakes import Reply, Wire, client_jwt, code, connected, internal_jwt
from tests.support.http_world import WORKER_URI, World

PATH = "/api/v1/payment-tokens"
PAN = "4242424242424242"
REQUEST = {"v": 1, "id": "r1", "type": "tokenize", "data": "AAAA"}
NAMED = REQUEST | {"device_id": "dev_1"}

STATUSES = {
    "MALFORMED": 422,
    "UNSUPPORTED": 422,
    "DEVICE_UNKNOWN": 403,
    "DEVICE_SUSPENDED": 403,
    "DEVICE_REVOKED": 403,
    "DEVICE_CERTIFICATE_REPLACED": 403,
    "DEVICE_CERTIFICATE_EXPIRED": 403,
    "KEY_SET_UNKNOWN": 422,
    "KSN_MISMATCH": 422,
    "KSN_INVALID": 422,
    "KSN_REPLAYED": 409,
    "KSN_TOO_OLD": 409,
    "MAC_INVALID": 422,
    "DECRYPT_FAILED": 422,
    "REQUEST_ID_REUSED": 409,
    "RATE_LIMITED": 429,
    "UNAVAILABLE": 503,
    "INTERNAL": 503,
}


class Site:
    """Authorities, and the ways in."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        self.workers = Authority(directory, "workers-ca")
        self.devices = Authority(directory, "devices-ca")
        self.server = self.workers.issue("server")

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """A running workers' listener."""
        tls = worker_tls(
            certificate=self.server.certificate,
            key=self.server.key,
            worker_ca=self.workers.path,
            device_ca=self.devices.path,
        )
        async with self.world.worker(tls) as port:
            yield port

    @asynccontextmanager
    async def showing(self, files: Files) -> AsyncIterator[Wire]:
        """A connection to it with this certificate."""
        async with (
            self.listening() as port,
            connected(port, ssl=self.workers.trusting(files)) as wire,
        ):
            yield wire


@pytest.fixture
def site(world: World, tmp_path: Path) -> Site:
    """Certificates of the test's own."""
    return Site(world, tmp_path)


@pytest.fixture
async def device(site: Site) -> AsyncIterator[Wire]:
    """A device's connection."""
    async with site.showing(site.devices.issue("dev_1")) as wire:
        yield wire


async def post(wire: Wire, body: object, *lines: str, kind: str = "application/json") -> Reply:
    """A submission of this body, bytes as they are."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {PATH} HTTP/1.1", f"Content-Length: {len(raw)}", f"Content-Type: {kind}"]
    return await wire.ask("\n".join([*head, *lines]), raw)


def bearer(token: str) -> str:
    """The header of a JWT."""
    return f"Authorization: Bearer {token}"


def error(code: str, message: str, *, retryable: bool) -> dict[str, object]:
    """A session's answer that says no."""
    told: dict[str, object] = {"code": code, "message": message, "retryable": retryable}
    return {"v": 1, "id": "r1", "status": "error"} | told


SERVICE = bearer(internal_jwt("payment:tokenize"))


class TestWhoMay:
    """Callers that are not let in, and those that are."""

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("X-Nobody: 1", (401, "UNAUTHENTICATED")),
            (bearer(client_jwt()), (403, "FORBIDDEN")),
            (bearer(internal_jwt("payment:read payment:revoke")), (403, "FORBIDDEN")),
        ],
    )
    async def test_on_the_api_listener_only_a_service_with_the_scope(
        self, world: World, wire: Wire, line: str, expected: tuple[int, str]
    ) -> None:
        assert code(await post(wire, NAMED, line)) == expected
        assert not world.submissions.submitted

    async def test_a_worker_is_no_device(self, world: World, site: Site) -> None:
        async with site.showing(site.workers.issue("settler", WORKER_URI)) as wire:
            assert code(await post(wire, NAMED)) == (403, "FORBIDDEN")
            # Nor does a token help that would do on the other listener.
            assert code(await post(wire, NAMED, SERVICE)) == (403, "FORBIDDEN")
        assert not world.submissions.submitted
        assert not world.detokenizer.refusals

    @pytest.mark.parametrize("failure", ["DEVICE_REVOKED", "DEVICE_CERTIFICATE_REPLACED"])
    async def test_a_device_that_is_not_wanted_is_refused_before_its_body_is_read(
        self, world: World, device: Wire, failure: str
    ) -> None:
        world.submissions.refuses = ForbiddenError("no", code=failure)
        assert code(await post(device, b"{")) == (403, failure)
        assert not world.submissions.submitted

    async def test_whether_it_is_wanted_is_asked_at_each_request_of_a_connection(
        self, world: World, device: Wire
    ) -> None:
        assert (await post(device, REQUEST)).status == 201
        world.submissions.refuses = ForbiddenError("no", code="DEVICE_REVOKED")
        assert code(await post(device, REQUEST)) == (403, "DEVICE_REVOKED")
        world.submissions.refuses = UnavailableError("The database is away.")
        reply = await post(device, REQUEST)
        assert code(reply) == (503, "UNAVAILABLE")
        assert reply.headers["retry-after"] == "1"
        assert len(world.submissions.submitted) == 1

    async def test_a_device_speaks_for_itself_alone(self, world: World, device: Wire) -> None:
        for other in ("dev_2", "", None, ["dev_1"], 7):
            reply = await post(device, REQUEST | {"device_id": other})
            assert code(reply) == (403, "FORBIDDEN")
        assert not world.submissions.submitted
        assert (await post(device, NAMED)).status == 201
        assert [who for who, _ in world.submissions.submitted] == ["dev_1"]

    @pytest.mark.parametrize(
        "named", [None, "", "dev 1", "dev/1", "+", "d" * 65, 7, [PAN], PAN + "é"]
    )
    async def test_a_service_has_to_name_a_device(
        self, world: World, wire: Wire, named: object
    ) -> None:
        reply = await post(wire, REQUEST | {"device_id": named}, SERVICE)
        assert code(reply) == (422, "VALIDATION_ERROR")
        assert [each["field"] for each in reply.json["errors"]] == ["device_id"]
        assert PAN.encode() not in reply.body
        assert code(await post(wire, REQUEST, SERVICE)) == (422, "VALIDATION_ERROR")
        assert not world.submissions.submitted

    async def test_a_device_is_held_to_the_listeners_rate_and_another_one_is_not(
        self, world: World, site: Site
    ) -> None:
        world.burst, world.rate_per_s = 2, 0.5
        async with (
            site.listening() as port,
            connected(port, ssl=site.workers.trusting(site.devices.issue("dev_1"))) as one,
            connected(port, ssl=site.workers.trusting(site.devices.issue("dev_2"))) as two,
        ):
            statuses = [(await post(one, REQUEST)).status for _ in range(2)]
            reply = await post(one, REQUEST)
            assert (statuses, code(reply)) == ([201, 201], (429, "RATE_LIMITED"))
            assert reply.headers["retry-after"] == "2"
            assert (await post(two, REQUEST)).status == 201

    async def test_a_draining_daemon_takes_nothing_more(self, world: World, device: Wire) -> None:
        world.draining = True
        reply = await post(device, REQUEST)
        assert code(reply) == (503, "UNAVAILABLE")
        assert "retry-after" in reply.headers
        assert not world.submissions.admitted


class TestAnswers:
    """What becomes of the session's answer."""

    def test_every_code_of_the_contract_has_its_status(self) -> None:
        assert STATUSES.keys() == KINDS.keys()

    @pytest.mark.parametrize(("told", "status"), STATUSES.items())
    async def test_an_error_has_the_status_of_its_code(
        self, world: World, device: Wire, told: str, status: int
    ) -> None:
        world.submissions.answer = error(told, "so it is", retryable=status >= 429)
        reply = await post(device, REQUEST)
        assert code(reply) == (status, told)
        assert reply.json["detail"] == "so it is"
        assert ("retry-after" in reply.headers) == (status in (429, 503))
        named = {"KSN": "ksn", "MAC": "mac", "DECRYPT": "data", "REQUEST": "id"}
        about = named.get(told.partition("_")[0])
        errors = reply.json.get("errors", [])
        assert [each["field"] for each in errors] == ([about] if about else [])

    async def test_a_remembered_failure_is_said_to_be_one(self, world: World, device: Wire) -> None:
        failed = error("DECRYPT_FAILED", "no card", retryable=False)
        world.submissions.answer = failed | {"replayed": True}
        reply = await post(device, REQUEST)
        assert code(reply) == (422, "DECRYPT_FAILED")
        assert reply.headers["idempotent-replayed"] == "true"

    async def test_the_answer_is_data_as_it_came_and_a_replay_is_201_as_well(
        self, world: World, wire: Wire
    ) -> None:
        answer = world.submissions.answer
        first = await post(wire, NAMED, SERVICE)
        assert (first.status, first.json["data"]) == (201, answer)
        assert "idempotent-replayed" not in first.headers
        world.submissions.answer = answer | {"replayed": True}
        again = await post(wire, NAMED, SERVICE)
        assert (again.status, again.json["data"]) == (201, answer | {"replayed": True})
        assert again.headers["idempotent-replayed"] == "true"

    async def test_what_came_is_passed_on_byte_for_byte_and_logged_nowhere(
        self, world: World, device: Wire
    ) -> None:
        raw = b'{ "id":"r\\u0031",\n "data": "c2VjcmV0", "newer": 1.50 }'
        with structlog.testing.capture_logs() as logs:
            assert (await post(device, raw)).status == 201
        assert world.submissions.submitted == [("dev_1", raw)]
        assert logs
        assert "c2VjcmV0" not in json.dumps(logs)

    async def test_the_field_that_is_wrong_is_named(self, world: World, device: Wire) -> None:
        world.submissions.fails = InputError(
            "ksn is missing", code="MALFORMED", fields=[FieldError("ksn", "is missing")]
        )
        reply = await post(device, REQUEST)
        assert code(reply) == (422, "MALFORMED")
        assert reply.json["errors"] == [{"field": "ksn", "message": "is missing"}]


class TestBodies:
    """Bodies that never come to a session."""

    @pytest.mark.parametrize(
        ("raw", "expected"),
        [
            (b"", (400, "MALFORMED_JSON")),
            (b"{", (400, "MALFORMED_JSON")),
            (b'{"id": "a", "id": "b"}', (400, "MALFORMED_JSON")),
            (b'{"amount": {"value": 1, "value": 2}}', (400, "MALFORMED_JSON")),
            (b'{"id": NaN}', (400, "MALFORMED_JSON")),
            (b'{"id": "\\ud800"}', (400, "MALFORMED_JSON")),
            (b"\xef\xbb\xbf{}", (400, "MALFORMED_JSON")),
            (b"[" * 50_000, (400, "MALFORMED_JSON")),
            (b"[]", (422, "MALFORMED")),
            (b'"r1"', (422, "MALFORMED")),
            (b"null", (422, "MALFORMED")),
            (b" " * 262_145, (413, "BODY_TOO_LARGE")),
        ],
    )
    async def test_what_is_no_object_of_json_is_refused_on_both_listeners(
        self, *, world: World, device: Wire, wire: Wire, raw: bytes, expected: tuple[int, str]
    ) -> None:
        assert code(await post(device, raw)) == expected
        assert code(await post(wire, raw, SERVICE)) == expected
        assert not world.submissions.submitted

    async def test_another_type_or_a_compressed_body_is_refused(
        self, world: World, device: Wire
    ) -> None:
        unsupported = (415, "UNSUPPORTED_MEDIA_TYPE")
        assert code(await post(device, REQUEST, kind="text/plain")) == unsupported
        assert code(await post(device, REQUEST, "Content-Encoding: gzip")) == unsupported
        assert not world.submissions.submitted

    async def test_a_body_that_stops_is_cut_off(self, world: World, site: Site) -> None:
        world.limits = replace(HttpLimits(), body_timeout_s=0.2)
        async with site.showing(site.devices.issue("dev_1")) as wire:
            await wire.send(
                f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                'Content-Length: 500\r\n\r\n{"v'.encode()
            )
            assert await wire.closed()
        assert not world.submissions.submitted

    async def test_ten_at_once_on_ten_connections_are_ten(self, world: World, site: Site) -> None:
        files = site.devices.issue("dev_1")

        async def one(port: int) -> int:
            async with connected(port, ssl=site.workers.trusting(files)) as wire:
                return (await post(wire, REQUEST)).status

        async with site.listening() as port:
            assert set(await asyncio.gather(*(one(port) for _ in range(10)))) == {201}
        assert len(world.submissions.submitted) == 10
