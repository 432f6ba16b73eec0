"""Two authorities behind one listener: a device is never a worker, nor a worker a device."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from glamd.errors import ConfigError
from glamd.http.tls import WorkerTls, worker_tls
from tests.support.http_certificates import Authority, Files
from tests.support.http_fakes import TOKEN, Wire, connected, counted
from tests.support.http_world import WORKER_URI, World

DECRYPT = f"/internal/v1/payment-tokens/{TOKEN}/decrypt"
AUTHORIZED = f"/internal/v1/payment-tokens/{TOKEN}/authorized"
SUBMIT = "/api/v1/payment-tokens"
PATIENCE_S = 10.0
GOOD = {
    DECRYPT: b'{"purpose": "settlement", "fields": ["expiry"]}',
    AUTHORIZED: b"",
    SUBMIT: b'{"v": 1}',
}
AS_WORKER = {DECRYPT: 200, AUTHORIZED: 200, SUBMIT: 403}
AS_DEVICE = {DECRYPT: 403, AUTHORIZED: 403, SUBMIT: 201}
AS_NOBODY = dict.fromkeys(GOOD, 401)


class Listening:
    """A workers' listener with the authorities that the test chose."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        self.home = Authority(directory, "home-ca")
        self.server = self.home.issue("server")

    def tls(self, workers: Path, devices: Path) -> WorkerTls:
        """What it speaks TLS with."""
        return worker_tls(
            certificate=self.server.certificate,
            key=self.server.key,
            worker_ca=workers,
            device_ca=devices,
        )

    @asynccontextmanager
    async def port(self, workers: Path, devices: Path) -> AsyncIterator[int]:
        """A running one's."""
        async with self.world.worker(self.tls(workers, devices)) as port:
            yield port

    async def statuses(self, port: int, files: Files) -> dict[str, int]:
        """What each route answers whoever shows this certificate."""
        async with connected(port, ssl=self.home.trusting(files)) as wire:
            return {path: await asked(wire, path) for path in GOOD}

    async def not_let_in(self, port: int, files: Files) -> bool:
        """Whether TLS refuses it; with 1.3 that may come with the first read."""
        try:
            await self.statuses(port, files)
        except (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError):
            return True
        return False


async def asked(wire: Wire, path: str) -> int:
    """The status of a good request of this path."""
    raw = GOOD[path]
    head = (
        f"POST {path} HTTP/1.1",
        "Content-Type: application/json",
        f"Content-Length: {len(raw)}",
    )
    return (await wire.ask("\n".join(head), raw)).status


@pytest.fixture
def listening(world: World, tmp_path: Path) -> Listening:
    """Nothing yet."""
    return Listening(world, tmp_path)


@pytest.fixture
def workers(tmp_path: Path) -> Authority:
    """The workers' authority."""
    return Authority(tmp_path, "workers-ca")


@pytest.fixture
def devices(tmp_path: Path) -> Authority:
    """The devices' authority."""
    return Authority(tmp_path, "devices-ca")


async def test_a_device_with_a_workers_name_in_its_certificate_is_a_device(
    listening: Listening, workers: Authority, devices: Authority
) -> None:
    dressed_up = devices.issue("dev_1", WORKER_URI)
    async with listening.port(workers.path, devices.path) as port:
        assert await listening.statuses(port, dressed_up) == AS_DEVICE
    world = listening.world
    assert [look.worker for look, _ in world.detokenizer.refusals] == ["device:dev_1"] * 2
    assert world.detokenizer.actions == ["decrypt", "authorized"]
    assert {said for _, said in world.detokenizer.refusals} == {"FORBIDDEN"}
    assert not world.detokenizer.looks
    assert not world.detokenizer.reports
    assert [who for who, _ in world.submissions.admitted] == ["dev_1"]


async def test_a_worker_with_a_devices_name_in_its_certificate_is_a_worker(
    listening: Listening, workers: Authority, devices: Authority
) -> None:
    dressed_up = workers.issue("dev_1", WORKER_URI)
    async with listening.port(workers.path, devices.path) as port:
        assert await listening.statuses(port, dressed_up) == AS_WORKER
    assert not listening.world.submissions.admitted
    assert not listening.world.submissions.submitted


async def test_a_workers_certificate_without_a_workers_name_is_nobodys_also_where_devices_go(
    listening: Listening, workers: Authority, devices: Authority
) -> None:
    async with listening.port(workers.path, devices.path) as port:
        assert await listening.statuses(port, workers.issue("dev_1")) == AS_NOBODY
    assert [look.worker for look, _ in listening.world.detokenizer.refusals] == ["-", "-"]


@pytest.mark.parametrize("names", [["dev 1"], ["dev_1", "dev_2"], ["d\u00e9v"], ["dev_1\n"]])
async def test_a_devices_certificate_that_names_no_device_is_nobodys(
    listening: Listening, workers: Authority, devices: Authority, names: list[str]
) -> None:
    files = devices.issue("odd", WORKER_URI, common_names=names)
    before = counted("unknown", "certificate_name")
    async with listening.port(workers.path, devices.path) as port:
        assert await listening.statuses(port, files) == AS_NOBODY
    assert counted("unknown", "certificate_name") == before + 3


async def test_two_authorities_of_one_name_are_told_apart_by_their_signatures(
    listening: Listening, tmp_path: Path
) -> None:
    workers = Authority(tmp_path, "workers", subject="The CA")
    devices = Authority(tmp_path, "devices", subject="The CA")
    worker, device = workers.issue("settler", WORKER_URI), devices.issue("dev_1", WORKER_URI)
    async with listening.port(workers.path, devices.path) as port:
        # OpenSSL looks an issuer up by its name and takes the first, so one of them may not get in
        # at all; what must not happen is that it comes in as the other.
        for files, whole in ((worker, AS_WORKER), (device, AS_DEVICE)):
            if not await listening.not_let_in(port, files):
                assert await listening.statuses(port, files) == whole
    assert {look.worker for look in listening.world.detokenizer.looks} <= {"settler"}
    assert {who for who, _ in listening.world.submissions.admitted} <= {"dev_1"}


async def test_a_certificate_of_neither_authority_and_an_expired_one_do_not_get_in(
    listening: Listening, workers: Authority, devices: Authority
) -> None:
    async with listening.port(workers.path, devices.path) as port:
        for files in (
            listening.home.issue("dev_3", WORKER_URI),
            devices.issue("dev_2", expired=True),
            workers.issue("late", WORKER_URI, expired=True),
        ):
            assert await listening.not_let_in(port, files)
    assert not listening.world.submissions.admitted


async def test_whoever_a_root_certifies_beside_the_devices_authority_does_not_get_in(
    listening: Listening, workers: Authority, devices: Authority, tmp_path: Path
) -> None:
    # The devices' authority has itself been certified by the house, whose root is not ours to name.
    certified = listening.home.certify(devices, "certified-devices-ca")
    async with listening.port(workers.path, certified) as port:
        assert await listening.statuses(port, devices.issue("dev_1")) == AS_DEVICE
        assert await listening.not_let_in(port, listening.home.issue("dev_2"))


async def test_an_authority_that_is_named_for_both_is_refused_at_the_start_and_at_a_reload(
    listening: Listening, workers: Authority, devices: Authority, tmp_path: Path
) -> None:
    for one, other in (
        (workers.path, workers.path),
        (workers.path, workers.renewed().path),
        (workers.path, bundle(tmp_path, devices.path, workers.path)),
    ):
        with pytest.raises(ConfigError, match="in common") as caught:
            listening.tls(one, other)
        assert [each.field for each in caught.value.fields] == ["worker.client_ca"]
    listening.tls(workers.path, devices.path)


async def test_a_devices_authority_that_changes_is_known_beside_the_one_before(
    listening: Listening, workers: Authority, devices: Authority, tmp_path: Path
) -> None:
    newer = Authority(tmp_path, "newer-devices-ca")
    both = bundle(tmp_path, devices.path, newer.path)
    async with listening.port(workers.path, both) as port:
        for files in (devices.issue("dev_1"), newer.issue("dev_2")):
            assert await listening.statuses(port, files) == AS_DEVICE


async def test_after_a_reload_the_authority_that_went_certifies_nobody(
    listening: Listening, workers: Authority, devices: Authority, tmp_path: Path
) -> None:
    newer = Authority(tmp_path, "newer-devices-ca")
    server = listening.world.worker_server()
    port = await server.start("127.0.0.1", 0, listening.tls(workers.path, devices.path))
    old, new = devices.issue("dev_1"), newer.issue("dev_2")
    try:
        assert await listening.not_let_in(port, new)
        async with connected(port, ssl=listening.home.trusting(old)) as idle:
            await server.replace_tls(listening.tls(workers.path, newer.path))
            # It came in while it could, and is asked only now who it is.
            assert await asked(idle, SUBMIT) == 401
        assert await listening.not_let_in(port, old)
        assert await listening.statuses(port, new) == AS_DEVICE
    finally:
        await server.stop(1.0)


async def test_a_reports_body_is_none_or_an_empty_object_and_what_is_wrong_is_a_row(
    listening: Listening, workers: Authority, devices: Authority
) -> None:
    files = workers.issue("settler", WORKER_URI)
    detokenizer = listening.world.detokenizer
    head = f"POST {AUTHORIZED} HTTP/1.1\nContent-Type: application/json\nContent-Length: "
    async with (
        listening.port(workers.path, devices.path) as port,
        connected(port, ssl=listening.home.trusting(files)) as wire,
    ):
        for raw, expected in (
            (b"{", "MALFORMED_JSON"),
            (b"[]", "VALIDATION_ERROR"),
            (b'{"fields": ["pan"]}', "VALIDATION_ERROR"),
        ):
            reply = await wire.ask(f"{head}{len(raw)}", raw)
            assert reply.json["code"] == expected
        assert [said for _, said in detokenizer.refusals] == [
            *("MALFORMED_JSON", "VALIDATION_ERROR", "VALIDATION_ERROR")
        ]
        assert set(detokenizer.actions) == {"authorized"}
        assert not detokenizer.reports
        for raw in (b"", b"{}"):
            reply = await wire.ask(f"{head}{len(raw)}", raw)
            assert (reply.status, reply.json["data"]) == (
                200,
                {"token": TOKEN, "status": "active", "has_sensitive_data": False},
            )
    assert [(look.token, look.fields) for look in detokenizer.reports] == [(TOKEN, ())] * 2


def bundle(directory: Path, *files: Path) -> Path:
    """One file of several certificates."""
    found = directory / "bundle.pem"
    found.write_bytes(b"".join(file.read_bytes() for file in files))
    assert len(x509.load_pem_x509_certificates(found.read_bytes())) == len(files)
    return found


@pytest.mark.parametrize("later", [timedelta(), timedelta(days=2)])
async def test_a_session_of_tls_1_2_that_is_resumed_is_good_for_as_long_as_its_certificate(
    listening: Listening, workers: Authority, devices: Authority, later: timedelta
) -> None:
    context = listening.home.trusting(workers.issue("w", WORKER_URI))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    clock = listening.world.clock

    def ask(tls: ssl.SSLSocket) -> bytes:
        head = f"POST {AUTHORIZED} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        tls.sendall(head.encode())
        return tls.recv(4096)[9:12]

    def connect(port: int, session: ssl.SSLSession | None) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        return context.wrap_socket(plain, server_hostname="127.0.0.1", session=session)

    def twice(port: int) -> tuple[bytes, bytes]:
        # The first stays open: a session ends with a connection that is not closed as TLS wants it.
        with connect(port, None) as first:
            before = ask(first)
            clock.advance(later.total_seconds())
            with connect(port, first.session) as second:
                assert second.session_reused
                return before, ask(second)

    async with listening.port(workers.path, devices.path) as port:
        clock.advance((datetime.now(UTC) - clock.now()).total_seconds())
        answers = await asyncio.to_thread(twice, port)
    assert answers == (b"200", b"401" if later else b"200")
