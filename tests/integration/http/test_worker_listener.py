"""The workers' listener over real mutual TLS: who gets in, what decrypt takes and answers."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from glamd.errors import (
    ConfigError,
    ForbiddenError,
    GlamError,
    GoneError,
    NotFoundError,
    RateLimitedError,
    UnavailableError,
)
from glamd.http.limits import HttpLimits
from glamd.http.tls import WorkerTls, api_tls, worker_tls
from tests.support.http_certificates import Authority, Files
from tests.support.http_fakes import SHORT_S, TOKEN, Reply, Wire, code, connected, counted
from tests.support.http_world import TRUST_DOMAIN, WORKER_URI, World

PATH = f"/internal/v1/payment-tokens/{TOKEN}/decrypt"
GOOD = {"purpose": "settlement", "fields": ["pan", "expiry"]}


class Workers:
    """The authorities of workers and devices, the listener's own certificate, and a worker's."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory, "workers-ca")
        self.devices = Authority(directory, "devices-ca")
        self.server = self.authority.issue("server")
        self.worker = self.authority.issue("settler", WORKER_URI)

    def context(self, server: Files | None = None) -> WorkerTls:
        """What the listener speaks TLS with."""
        files = server or self.server
        return worker_tls(
            certificate=files.certificate,
            key=files.key,
            worker_ca=self.authority.path,
            device_ca=self.devices.path,
        )

    def trusting(self, worker: Files | None = None) -> ssl.SSLContext:
        """The worker's context."""
        return self.authority.trusting(worker or self.worker)


@pytest.fixture
def workers(tmp_path: Path) -> Workers:
    """Certificates of the test's own."""
    return Workers(tmp_path)


@pytest.fixture
async def port(world: World, workers: Workers) -> AsyncIterator[int]:
    """A running listener's port."""
    async with world.worker(workers.context()) as port:
        yield port


@asynccontextmanager
async def as_worker(port: int, context: ssl.SSLContext) -> AsyncIterator[Wire]:
    """A worker's connection."""
    async with connected(port, ssl=context) as wire:
        yield wire


@pytest.fixture
async def wire(port: int, workers: Workers) -> AsyncIterator[Wire]:
    """The good worker's connection."""
    async with as_worker(port, workers.trusting()) as wire:
        yield wire


async def post(
    wire: Wire, body: object, *lines: str, path: str = PATH, kind: str = "application/json"
) -> Reply:
    """A decrypt with this body, bytes as they are."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", f"Content-Length: {len(raw)}", *lines]
    if kind:
        head.append(f"Content-Type: {kind}")
    return await wire.ask("\n".join(head), raw)


class TestDecrypt:
    """What a worker in good standing gets."""

    async def test_the_fields_asked_for_come_by_name_and_the_look_is_whole(
        self, world: World, workers: Workers, wire: Wire
    ) -> None:
        body = {"purpose": "settlement", "fields": ["expiry", "pan", "emv", "track2"]}
        reply = await post(wire, body, "X-Correlation-ID: order-7", "X-Forwarded-For: 192.0.2.1")
        assert reply.status == 200
        assert reply.json["data"] == {
            "expiry": "3112",
            "pan": "4111111111111111",
            "emv": None,
            "track2": None,
        }
        certificate = x509.load_pem_x509_certificate(workers.worker.certificate.read_bytes())
        (look,) = world.detokenizer.looks
        assert look.worker == "settler"
        assert look.certificate_sha256 == certificate.fingerprint(hashes.SHA256()).hex()
        assert look.ip == "127.0.0.1"
        assert look.token == TOKEN
        assert look.fields == ("expiry", "pan", "emv", "track2")
        assert look.purpose == "settlement"
        assert look.correlation_id == "order-7"
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["strict-transport-security"]

    async def test_nothing_of_the_card_is_logged(self, wire: Wire) -> None:
        with structlog.testing.capture_logs() as logs:
            await post(wire, GOOD)
        assert logs
        assert "4111111111111111" not in json.dumps(logs)

    async def test_a_body_in_chunks_after_continue_is_a_body(self, wire: Wire) -> None:
        lines = (
            f"POST {PATH} HTTP/1.1",
            "Host: x",
            "Expect: 100-continue",
            "Content-Type: application/json; charset=UTF-8",
            "Transfer-Encoding: chunked\r\n\r\n",
        )
        await wire.send("\r\n".join(lines).encode())
        async with asyncio.timeout(SHORT_S):
            assert await wire.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw = json.dumps(GOOD).encode()
        for part in (raw[:10], raw[10:]):
            await wire.send(b"%x\r\n%b\r\n" % (len(part), part))
        await wire.send(b"0\r\n\r\n")
        assert (await wire.reply()).status == 200

    @pytest.mark.parametrize(
        ("failure", "status", "expected"),
        [
            (ForbiddenError("Outside the grant."), 403, "FORBIDDEN"),
            (NotFoundError("No such token.", code="TOKEN_NOT_FOUND"), 404, "TOKEN_NOT_FOUND"),
            (GoneError("It expired.", code="TOKEN_EXPIRED"), 410, "TOKEN_EXPIRED"),
            (GoneError("It was revoked.", code="TOKEN_REVOKED"), 410, "TOKEN_REVOKED"),
            (RateLimitedError("Over the rate."), 429, "RATE_LIMITED"),
            (UnavailableError("No audit row, no answer."), 503, "UNAVAILABLE"),
        ],
        ids=lambda value: value.code if isinstance(value, GlamError) else "",
    )
    async def test_each_refusal_has_its_code(
        self, world: World, wire: Wire, failure: GlamError, status: int, expected: str
    ) -> None:
        world.detokenizer.fails = failure
        reply = await post(wire, GOOD)
        assert code(reply) == (status, expected)
        assert ("retry-after" in reply.headers) == (status in (429, 503))

    async def test_what_cannot_be_a_token_is_the_detokenizers_to_refuse(
        self, world: World, wire: Wire
    ) -> None:
        # The grant is judged before anything is said about a token, however it is spelt.
        world.detokenizer.fails = ForbiddenError("Outside the grant.")
        for token in ("4111111111111111", "ptk_short", "ptk_%00%2F" + "a" * 20, "ptk_" + "a" * 65):
            path = f"/internal/v1/payment-tokens/{token}/decrypt"
            assert code(await post(wire, GOOD, path=path)) == (403, "FORBIDDEN")
        assert [look.token for look in world.detokenizer.looks] == ["-"] * 4
        assert not world.detokenizer.refusals

    async def test_the_rate_of_a_worker_is_its_grants_and_not_the_listeners(
        self, world: World, workers: Workers
    ) -> None:
        world.burst, world.rate_per_s = 1, 0.5
        async with (
            world.worker(workers.context()) as port,
            as_worker(port, workers.trusting()) as wire,
        ):
            for _ in range(5):
                assert (await post(wire, GOOD)).status == 200
            world.detokenizer.fails = RateLimitedError("Over the grant's rate.", retry_after_s=7)
            reply = await post(wire, GOOD)
            assert code(reply) == (429, "RATE_LIMITED")
            assert reply.headers["retry-after"] == "7"
        assert len(world.detokenizer.looks) == 6

    async def test_whoever_is_no_worker_is_held_to_the_listeners_rate(
        self, world: World, workers: Workers
    ) -> None:
        world.burst, world.rate_per_s = 1, 0.5
        nobody = workers.authority.issue("nobody")
        async with (
            world.worker(workers.context()) as port,
            as_worker(port, workers.trusting(nobody)) as wire,
        ):
            assert (await post(wire, GOOD)).status == 401
            assert (await post(wire, GOOD)).status == 429

    async def test_a_draining_daemon_reveals_nothing(self, world: World, wire: Wire) -> None:
        world.draining = True
        assert code(await post(wire, GOOD)) == (503, "UNAVAILABLE")
        assert not world.detokenizer.looks
        assert [said for _, said in world.detokenizer.refusals] == ["UNAVAILABLE"]

    async def test_the_api_listeners_routes_are_not_here(self, wire: Wire) -> None:
        reply = await wire.ask(f"GET /api/v1/payment-tokens/{TOKEN} HTTP/1.1")
        assert code(reply) == (404, "NOT_FOUND")
        assert code(await wire.ask(f"GET {PATH} HTTP/1.1")) == (405, "METHOD_NOT_ALLOWED")


PAN = "4242424242424242"


class TestRefusedBeforeTheDetokenizer:
    """Requests of a worker that never come to be judged: each of them is one row all the same."""

    @pytest.mark.parametrize(
        ("body", "lines", "expected", "purpose", "fields"),
        [
            (b"{", (), "MALFORMED_JSON", "", ()),
            (b'{"purpose": "a", "purpose": "b"}', (), "MALFORMED_JSON", "", ()),
            ([], (), "VALIDATION_ERROR", "", ()),
            ({}, (), "VALIDATION_ERROR", "", ()),
            (GOOD | {"why": PAN}, (), "VALIDATION_ERROR", "settlement", ("pan", "expiry")),
            (GOOD | {"purpose": f"for {PAN}"}, (), "VALIDATION_ERROR", "-", ("pan", "expiry")),
            (GOOD | {"purpose": "a\n"}, (), "VALIDATION_ERROR", "-", ("pan", "expiry")),
            (GOOD | {"purpose": None}, (), "VALIDATION_ERROR", "-", ("pan", "expiry")),
            (GOOD | {"purpose": {"a": PAN}}, (), "VALIDATION_ERROR", "-", ("pan", "expiry")),
            (GOOD | {"fields": ["pan", "pan"]}, (), "VALIDATION_ERROR", "settlement", ("pan",) * 2),
            (GOOD | {"fields": ["emv", PAN]}, (), "VALIDATION_ERROR", "settlement", ("emv", "-")),
            (GOOD | {"fields": [[], {}]}, (), "VALIDATION_ERROR", "settlement", ("-", "-")),
            (GOOD | {"fields": [7] * 999}, (), "VALIDATION_ERROR", "settlement", ("-",) * 16),
            (GOOD | {"fields": PAN}, (), "VALIDATION_ERROR", "settlement", ("-",)),
            (GOOD, ("Content-Type: text/plain",), "UNSUPPORTED_MEDIA_TYPE", "", ()),
            (GOOD, ("Content-Encoding: gzip",), "UNSUPPORTED_MEDIA_TYPE", "", ()),
            (b" " * 262_145, (), "BODY_TOO_LARGE", "", ()),
        ],
    )
    async def test_what_is_wrong_with_a_body_is_the_outcome_of_one_row(
        self,
        *,
        world: World,
        wire: Wire,
        body: object,
        lines: tuple[str, ...],
        expected: str,
        purpose: str,
        fields: tuple[str, ...],
    ) -> None:
        kind = "" if any("Content-Type" in line for line in lines) else "application/json"
        reply = await post(wire, body, "X-Correlation-ID: order-7", *lines, kind=kind)
        assert code(reply)[1] == expected
        ((look, said),) = world.detokenizer.refusals
        assert said == expected
        assert (look.worker, look.ip, look.token) == ("settler", "127.0.0.1", TOKEN)
        assert len(look.certificate_sha256) == 64
        assert (look.purpose, look.fields, look.correlation_id) == (purpose, fields, "order-7")
        assert not world.detokenizer.looks

    async def test_neither_is_a_wrong_path_with_a_wrong_body_kept_as_it_came(
        self, world: World, wire: Wire
    ) -> None:
        reply = await post(wire, b"{", path=f"/internal/v1/payment-tokens/{PAN}/decrypt")
        assert code(reply) == (400, "MALFORMED_JSON")
        ((look, said),) = world.detokenizer.refusals
        assert (look.token, said) == ("-", "MALFORMED_JSON")

    @pytest.mark.parametrize("lines", [(), ("Content-Encoding: gzip",)], ids=["body", "head"])
    async def test_without_a_row_not_even_the_refusal_is_answered(
        self, world: World, wire: Wire, lines: tuple[str, ...]
    ) -> None:
        world.detokenizer.fails = UnavailableError("The audit row cannot be written.")
        reply = await post(wire, b"{", *lines)
        assert code(reply) == (503, "UNAVAILABLE")
        assert "retry-after" in reply.headers

    async def test_chunks_that_grow_too_large_are_a_row(self, world: World, wire: Wire) -> None:
        await wire.send(
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        await wire.send((b"10000\r\n" + b" " * 65536 + b"\r\n") * 5)
        assert code(await wire.reply()) == (413, "BODY_TOO_LARGE")
        assert [said for _, said in world.detokenizer.refusals] == ["BODY_TOO_LARGE"]

    async def test_a_card_number_is_no_correlation_id(self, world: World, wire: Wire) -> None:
        for name in ("X-Request-ID", "X-Correlation-ID"):
            for given in (PAN, "4242-4242-4242-4242", f"order-{PAN}"):
                reply = await post(wire, GOOD, f"{name}: {given}")
                assert "4242" not in json.dumps(reply.headers)
                assert "4242" not in json.dumps(reply.json["meta"])
        assert not [look for look in world.detokenizer.looks if "4242" in look.correlation_id]

    async def test_other_methods_and_other_paths_leave_no_row(
        self, world: World, wire: Wire
    ) -> None:
        assert (await wire.ask(f"GET {PATH} HTTP/1.1")).status == 405
        assert (await wire.ask("GET /healthz HTTP/1.1")).status == 200
        assert not world.detokenizer.refusals

    @pytest.mark.parametrize(
        ("uris", "expected"),
        [((), "UNAUTHENTICATED"), ((f"spiffe://{TRUST_DOMAIN}/device/dev_1",), "FORBIDDEN")],
    )
    async def test_a_certificate_that_names_no_worker_is_a_row_and_counted(
        self, world: World, workers: Workers, port: int, uris: tuple[str, ...], expected: str
    ) -> None:
        outcome = "no_worker" if uris else "certificate_name"
        before = counted("unknown", outcome)
        files = workers.authority.issue("odd", *uris)
        async with as_worker(port, workers.trusting(files)) as wire:
            assert code(await post(wire, GOOD))[1] == expected
        ((look, said),) = world.detokenizer.refusals
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        assert (look.worker, look.token, said) == ("-", TOKEN, expected)
        assert look.certificate_sha256 == certificate.fingerprint(hashes.SHA256()).hex()
        assert counted("unknown", outcome) == before + 1

    async def test_without_a_row_nobody_is_told_that_they_are_nobody(
        self, world: World, workers: Workers, port: int
    ) -> None:
        world.detokenizer.fails = UnavailableError("The audit row cannot be written.")
        files = workers.authority.issue("odd")
        async with as_worker(port, workers.trusting(files)) as wire:
            assert code(await post(wire, GOOD)) == (503, "UNAVAILABLE")


class TestWho:
    """Certificates that are not a worker's."""

    @pytest.mark.parametrize(
        ("uris", "status"),
        [
            ((), 401),
            (("spiffe://elsewhere/worker/settler",), 401),
            ((f"spiffe://{TRUST_DOMAIN}.evil/worker/settler",), 401),
            ((f"https://{TRUST_DOMAIN}/worker/settler",), 401),
            ((WORKER_URI, WORKER_URI + "2"), 401),
            ((f"spiffe://{TRUST_DOMAIN}/device/dev_1",), 403),
            ((f"spiffe://{TRUST_DOMAIN}/worker/",), 403),
            ((f"spiffe://{TRUST_DOMAIN}/worker/a/b",), 403),
            ((f"spiffe://{TRUST_DOMAIN}/worker/..",), 403),
            ((WORKER_URI + "\n",), 403),
        ],
    )
    async def test_a_certificate_without_a_workers_name_is_refused(
        self, world: World, workers: Workers, port: int, uris: tuple[str, ...], status: int
    ) -> None:
        files = workers.authority.issue("odd", *uris)
        async with as_worker(port, workers.trusting(files)) as wire:
            reply = await post(wire, GOOD)
        assert code(reply) == (status, {401: "UNAUTHENTICATED", 403: "FORBIDDEN"}[status])
        assert not world.detokenizer.looks

    async def test_no_certificate_does_not_get_in(self, workers: Workers, port: int) -> None:
        await refused(port, workers.authority.trusting())

    async def test_a_certificate_of_another_authority_does_not_get_in(
        self, tmp_path: Path, workers: Workers, port: int
    ) -> None:
        foreign = Authority(tmp_path, "foreign-ca").issue("foreign", WORKER_URI)
        await refused(port, workers.trusting(foreign))

    async def test_an_expired_certificate_does_not_get_in(
        self, workers: Workers, port: int
    ) -> None:
        expired = workers.authority.issue("expired", WORKER_URI, expired=True)
        await refused(port, workers.trusting(expired))

    async def test_tls_1_1_does_not_get_in(self, workers: Workers, port: int) -> None:
        context = workers.trusting()
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        await refused(port, context)

    async def test_a_bearer_token_does_not_help(self, workers: Workers, port: int) -> None:
        files = workers.authority.issue("nobody")
        async with as_worker(port, workers.trusting(files)) as wire:
            reply = await post(wire, GOOD, "Authorization: Bearer x.y.z")
        assert reply.status == 401

    async def test_a_listener_that_would_not_ask_for_a_certificate_does_not_start(
        self, world: World, workers: Workers
    ) -> None:
        lax = api_tls(certificate=workers.server.certificate, key=workers.server.key)
        server = world.worker_server()
        try:
            with pytest.raises(ConfigError, match="client certificates"):
                await server.start("127.0.0.1", 0, replace(workers.context(), context=lax))
        finally:
            await server.stop(1.0)


async def refused(port: int, context: ssl.SSLContext) -> None:
    """Check that no answer is to be had with this context.

    With TLS 1.3 the client's side of the handshake is over before its certificate is looked at,
    so that the refusal may come with the first read.
    """
    try:
        async with as_worker(port, context) as wire:
            await post(wire, GOOD)
    except (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError):
        return
    pytest.fail("the connection was let in")


class TestBodies:
    """Bodies that are not what they should be; none of them is ever a 500, or an echo."""

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b" ",
            b"{",
            b"nonsense 4111111111111111",
            b'{"purpose": "a", "purpose": "b", "fields": ["pan"]}',
            b'{"purpose": "a", "fields": ["pan"], "x": {"y": 1, "y": 2}}',
            b'{"purpose": "a", "\\u0070urpose": "b", "fields": ["pan"]}',
            b'{"purpose": NaN, "fields": ["pan"]}',
            b'{"purpose": Infinity}',
            b'{"purpose": "\xff\xfe", "fields": ["pan"]}',
            b'{"purpose": "\\ud800", "fields": ["pan"]}',
            b'\xef\xbb\xbf{"purpose": "a", "fields": ["pan"]}',
            b'{"purpose": "a", "fields": ["pan"]} {}',
            b'{"purpose": "a", "fields": ["pan"],}',
            b"{'purpose': 'a'}",
            b"[" * 100_000,
            b"[" * 100_000 + b"]" * 100_000,
            b'{"a":' * 40_000 + b"1" + b"}" * 40_000,
            b'{"purpose": ' + b"9" * 5_000 + b"}",
            '{"purpose": "a", "fields": ["pan"]}'.encode("utf-16"),
        ],
        ids=range(20),
    )
    async def test_what_is_not_strictly_json_is_malformed(self, wire: Wire, raw: bytes) -> None:
        reply = await post(wire, raw)
        assert code(reply) == (400, "MALFORMED_JSON")
        assert b"41111111" not in reply.body

    @pytest.mark.parametrize(
        ("body", "fields"),
        [
            ([], ["body"]),
            ("settlement", ["body"]),
            (None, ["body"]),
            (7, ["body"]),
            ({}, ["purpose", "fields"]),
            (GOOD | {"extra": 1}, ["extra"]),
            (GOOD | {"4111111111111111": 1}, ["?"]),
            (GOOD | {"track 2": ";4111111111111111=3112"}, ["?"]),
            (GOOD | {"purpose": ""}, ["purpose"]),
            (GOOD | {"purpose": "a" * 65}, ["purpose"]),
            (GOOD | {"purpose": "settle\u0000"}, ["purpose"]),
            (GOOD | {"purpose": "settlement\n"}, ["purpose"]),
            (GOOD | {"purpose": 4111111111111111}, ["purpose"]),
            (GOOD | {"purpose": None}, ["purpose"]),
            (GOOD | {"purpose": ["settlement"]}, ["purpose"]),
            (GOOD | {"fields": []}, ["fields"]),
            (GOOD | {"fields": "pan"}, ["fields"]),
            (GOOD | {"fields": ["pan", "pan"]}, ["fields"]),
            (GOOD | {"fields": ["pan"] * 7}, ["fields"]),
            (GOOD | {"fields": ["4111111111111111"]}, ["fields.0"]),
            (GOOD | {"fields": ["pan", "cvv"]}, ["fields.1"]),
            (GOOD | {"fields": {"pan": True}}, ["fields"]),
            (GOOD | {"fields": [None]}, ["fields.0"]),
            (GOOD | {"fields": [9**30]}, ["fields.0"]),
        ],
        ids=range(24),
    )
    async def test_a_wrong_field_is_named_and_not_echoed(
        self, world: World, wire: Wire, body: Any, fields: list[str]
    ) -> None:
        reply = await post(wire, body)
        assert code(reply) == (422, "VALIDATION_ERROR")
        assert [error["field"] for error in reply.json["errors"]] == fields
        assert b"41111111" not in reply.body
        assert not world.detokenizer.looks

    async def test_a_thousand_wrong_fields_are_not_all_named(self, wire: Wire) -> None:
        reply = await post(wire, GOOD | {f"x{n}": n for n in range(1000)})
        assert code(reply) == (422, "VALIDATION_ERROR")
        assert len(reply.json["errors"]) == 20

    @pytest.mark.parametrize(
        "kind",
        [
            "",
            "text/plain",
            "application/x-www-form-urlencoded",
            "application/jsonp",
            "application/json; charset=latin-1",
            "application/json; charset=utf-16",
            ";;;",
        ],
    )
    async def test_another_media_type_is_refused(self, wire: Wire, kind: str) -> None:
        reply = await post(wire, GOOD, kind=kind)
        assert code(reply) == (415, "UNSUPPORTED_MEDIA_TYPE")

    async def test_a_compressed_body_is_refused(self, wire: Wire) -> None:
        reply = await post(wire, GOOD, "Content-Encoding: gzip")
        assert code(reply) == (415, "UNSUPPORTED_MEDIA_TYPE")

    async def test_the_largest_body_is_read_and_one_byte_more_is_not(self, wire: Wire) -> None:
        raw = json.dumps(GOOD).encode()
        assert (await post(wire, raw.ljust(262_144))).status == 200
        assert code(await post(wire, raw.ljust(262_145))) == (413, "BODY_TOO_LARGE")

    async def test_chunks_without_end_are_cut_off_at_the_limit(self, wire: Wire) -> None:
        await wire.send(
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        await wire.send(chunk * 5)
        assert code(await wire.reply()) == (413, "BODY_TOO_LARGE")
        assert await wire.closed()

    async def test_broken_chunks_are_a_bad_request(self, wire: Wire) -> None:
        await wire.send(
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n4\r\n".encode()
        )
        await wire.send(b'{"pu\r\nzzz\r\n')
        assert code(await wire.reply()) == (400, "BAD_REQUEST")
        assert await wire.closed()

    async def test_a_worker_that_goes_away_mid_body_is_nobodys_trouble(
        self, world: World, port: int, workers: Workers, wire: Wire
    ) -> None:
        with structlog.testing.capture_logs() as logs:
            async with as_worker(port, workers.trusting()) as leaving:
                await leaving.send(
                    f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\nhalf".encode()
                )
            async with asyncio.timeout(SHORT_S):
                while not any(entry.get("status") == 499 for entry in logs):
                    assert (await wire.ask("GET /healthz HTTP/1.1")).status == 200
        assert not [entry for entry in logs if entry["log_level"] == "error"]
        assert [said for _, said in world.detokenizer.refusals] == ["CLIENT_GONE"]


class TestSlowWorkers:
    """Deadlines through TLS."""

    @pytest.fixture(autouse=True)
    def _short(self, world: World) -> None:
        world.limits = replace(
            HttpLimits(), head_timeout_s=0.3, body_timeout_s=0.2, handshake_timeout_s=0.3
        )

    async def test_a_connection_without_a_handshake_is_closed(self, port: int) -> None:
        async with connected(port) as wire:
            assert await wire.closed()

    async def test_half_a_handshake_is_closed(self, port: int) -> None:
        async with connected(port) as wire:
            await wire.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
            assert await wire.closed()

    async def test_silence_after_the_handshake_is_closed(self, wire: Wire) -> None:
        assert await wire.closed()

    async def test_a_body_that_stops_is_cut_off(self, world: World, wire: Wire) -> None:
        await wire.send(
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            'Content-Length: 500\r\n\r\n{"purpose'.encode()
        )
        assert await wire.closed()
        assert not world.detokenizer.looks
        assert [said for _, said in world.detokenizer.refusals] == ["SLOW_BODY"]

    async def test_a_hundred_silent_ones_cost_a_worker_nothing(
        self, port: int, workers: Workers
    ) -> None:
        silent = await asyncio.gather(
            *(asyncio.open_connection("127.0.0.1", port) for _ in range(100))
        )
        async with as_worker(port, workers.trusting()) as wire:
            assert (await post(wire, GOOD)).status == 200
        for _, writer in silent:
            writer.transport.abort()


class TestNewCertificates:
    """A reload of the listener's certificate."""

    async def test_new_handshakes_see_the_new_certificate_and_old_connections_live_on(
        self, world: World, workers: Workers
    ) -> None:
        renewed = workers.authority.issue("renewed")
        server = world.worker_server()
        port = await server.start("127.0.0.1", 0, workers.context())
        try:
            async with as_worker(port, workers.trusting()) as before:
                assert (await post(before, GOOD)).status == 200
                await server.replace_tls(workers.context(renewed))
                assert (await post(before, GOOD)).status == 200
                async with as_worker(port, workers.trusting()) as after:
                    assert (await post(after, GOOD)).status == 200
                    assert served(after) != served(before)
                    assert served(after) == served_by(renewed)
        finally:
            await server.stop(1.0)

    async def test_a_context_without_client_certificates_is_not_taken(
        self, world: World, workers: Workers
    ) -> None:
        server = world.worker_server()
        port = await server.start("127.0.0.1", 0, workers.context())
        try:
            lax = api_tls(certificate=workers.server.certificate, key=workers.server.key)
            with pytest.raises(ConfigError, match="client certificates"):
                await server.replace_tls(replace(workers.context(), context=lax))
            async with as_worker(port, workers.trusting()) as wire:
                assert (await post(wire, GOOD)).status == 200
        finally:
            await server.stop(1.0)


def served(wire: Wire) -> bytes:
    """The certificate that the listener showed."""
    tls: ssl.SSLObject = wire.writer.get_extra_info("ssl_object")
    der = tls.getpeercert(binary_form=True)
    assert der
    return der


def served_by(files: Files) -> bytes:
    """The certificate in a file, as it would be shown."""
    return ssl.PEM_cert_to_DER_cert(files.certificate.read_text())


class TestPlainAsyncio:
    """The other tests run on uvloop, as the daemon does; asyncio's own loop keeps the rules too."""

    def test_identity_reload_deadlines_and_stop_hold_on_asyncios_own_loop(
        self, world: World, workers: Workers
    ) -> None:
        world.limits = replace(
            HttpLimits(), head_timeout_s=0.3, body_timeout_s=0.2, handshake_timeout_s=0.3
        )
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(self._scenario(world, workers))

    async def _scenario(self, world: World, workers: Workers) -> None:
        server = world.worker_server()
        port = await server.start("127.0.0.1", 0, workers.context())
        async with as_worker(port, workers.trusting()) as wire:
            assert (await post(wire, GOOD)).json["data"]["expiry"] == "3112"
            await server.replace_tls(workers.context(workers.authority.issue("renewed")))
            async with connected(port) as silent, as_worker(port, workers.trusting()) as slow:
                assert (await post(slow, GOOD)).status == 200
                await slow.send(f"POST {PATH} HTTP/1.1\r\nContent-Length: 9\r\n\r\n".encode())
                assert await slow.closed()
                assert await silent.closed()
            assert (await post(wire, GOOD)).status == 200
            await server.stop(1.0)
            assert await wire.closed()
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", port)
