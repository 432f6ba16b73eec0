"""Many terminals at once: enrolment, the record, the counts, and what happens when glamd dies."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from device_gateway import terminal as terminal_module
from device_gateway import terminal_load, terminal_site
from device_gateway.terminal_device import Device, load_device
from device_gateway.terminal_load import Load, LoadPlan
from device_gateway.terminal_record import Record
from device_gateway.terminal_site import load_devices, read_site
from glamd.clock import SystemClock
from glamd.errors import ConfigError, ConflictError, UnavailableError
from tests.support.mqtt_tls import Authority
from tests.support.scripted_mqtt import Fields, ScriptedServer, ok, refusal
from tests.support.terminal_devices import INITIAL_KEY, enrolled


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
async def server(authority: Authority) -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer(authority.server_context())
    await scripted.start()
    yield scripted
    await scripted.stop()


@pytest.fixture
def devices(authority: Authority, server: ScriptedServer, tmp_path: Path) -> list[Device]:
    return [
        load_device(enrolled(authority, tmp_path, server.port, number=number))
        for number in range(1, 4)
    ]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same waits, short enough for a test; nothing prepared that a short test does not send."""
    monkeypatch.setattr(terminal_module, "RESEND_FIRST_S", 0.1)
    monkeypatch.setattr(terminal_module, "RETRY_FIRST_S", 0.05)
    monkeypatch.setattr(terminal_module, "RECONNECT_FIRST_S", 0.05)
    monkeypatch.setattr(terminal_load, "SATURATED_GUESS_PER_S", 30)


def lines(path: Path) -> list[Fields]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def load(devices: list[Device], plan: LoadPlan, record: Record | None = None) -> Load:
    return Load(plan, devices, clock=SystemClock(), record=record)


async def test_a_terminal_that_cannot_connect_ends_the_load_with_the_reason(
    server: ScriptedServer, devices: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal_load, "CONNECT_ALL_TIMEOUT_S", 0.3)
    await server.stop()
    with pytest.raises(ExceptionGroup) as caught:
        await load(devices, LoadPlan(rate_per_s=0, seconds=0.1)).run()
    assert caught.group_contains(
        UnavailableError, match="only 0 of 3 terminals could connect: conn"
    )


async def test_after_kill_and_restart_every_request_is_answered_under_its_first_content(
    server: ScriptedServer, devices: list[Device], tmp_path: Path
) -> None:
    answered: dict[object, Fields] = {}
    port = server.port

    def respond(request: Fields) -> Fields | None:
        # Like glamd: committed, then perhaps killed before the answer is out.
        again = answered.get(request["id"])
        if again is not None:
            assert again == request
            return ok(request, replayed=True)
        answered[request["id"]] = request
        return None if len(answered) % 10 == 0 else ok(request)

    def reached(goal: int) -> bool:
        return len(answered) >= goal

    server.respond = respond
    path = tmp_path / "record.jsonl"
    with Record(path, SystemClock()) as record:
        running = asyncio.ensure_future(
            load(devices, LoadPlan(rate_per_s=0, seconds=1.5), record).run()
        )
        for goal in (25, 50):
            await server.until(partial(reached, goal))
            await server.stop()
            await server.start(port)
        report = await running
    told = lines(path)
    sent = [line["id"] for line in told if line["what"] == "sent"]
    acknowledged = {line["id"] for line in told if line["what"] == "answer"}
    assert len(sent) == len(set(sent)) == report.sent
    assert acknowledged == set(sent) == set(answered)
    assert report.unanswered == 0
    assert report.ok == report.sent
    assert report.resent == sum(line["what"] == "resent" for line in told) > 0
    assert report.replayed > 0
    assert report.partings >= 6
    tokens: dict[object, set[object]] = {}
    for line in told:
        if line["what"] == "answer":
            tokens.setdefault(line["id"], set()).add(line["token"])
    assert all(len(each) == 1 for each in tokens.values())


async def test_what_stays_unanswered_is_counted_and_not_waited_for_for_ever(
    server: ScriptedServer, devices: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal_load, "DRAIN_TIMEOUT_S", 0.2)
    server.respond = lambda _request: None
    report = await load(devices, LoadPlan(rate_per_s=0, seconds=0.1)).run()
    assert (report.sent, report.ok, report.unanswered) == (3, 0, 3)


async def test_a_slow_server_gets_its_rate_and_what_finds_no_room_is_counted(
    server: ScriptedServer, devices: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal_load, "DRAIN_TIMEOUT_S", 0.1)
    monkeypatch.setattr(terminal_load, "TERMINAL_QUEUE_LIMIT", 2)
    server.respond = lambda _request: None
    report = await load(devices, LoadPlan(rate_per_s=200, seconds=0.2)).run()
    assert (report.sent, report.shed, report.unanswered) == (6, 34, 6)


@pytest.mark.parametrize("rate", [0, 100])
async def test_a_terminal_that_runs_out_of_counters_ends_the_load_in_order(
    server: ScriptedServer, devices: list[Device], rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is prepared, so that the counters end in the middle.
    monkeypatch.setattr(terminal_load, "PREPARED_LIMIT", 0)
    last = 0b111111111100000000000
    for device in devices:
        used = {"key_id": device.key_id.hex(), "reserved": last - 20}
        device.counter_path.write_bytes(orjson.dumps(used))
    running = load(devices, LoadPlan(rate_per_s=rate, seconds=60))
    with pytest.raises(ExceptionGroup) as caught:
        await running.run()
    assert caught.group_contains(ConflictError, match="used up")
    assert running.report.ok == running.report.sent == len(server.requests) > 0


async def test_refusals_are_told_apart_by_code_and_finality(
    server: ScriptedServer, devices: list[Device]
) -> None:
    tries: Counter[object] = Counter()

    def respond(request: Fields) -> Fields:
        tries[request["id"]] += 1
        number = int(str(request["id"]).rpartition("-")[2])
        if number % 3 == 0:
            return refusal(request, "DECRYPT_FAILED", retryable=False)
        if number % 3 == 1 and tries[request["id"]] == 1:
            return refusal(request, "RATE_LIMITED", retryable=True)
        return ok(request)

    server.respond = respond
    report = await load(devices, LoadPlan(rate_per_s=90, seconds=0.3)).run()
    assert (report.sent, report.ok) == (27, 18)
    assert report.refused == {"DECRYPT_FAILED": 9}
    assert report.retryable == {"RATE_LIMITED": 9}
    assert report.latency.count == 27


async def test_one_seed_taps_the_same_again_under_new_ids_and_counters(
    server: ScriptedServer, devices: list[Device]
) -> None:
    plan = LoadPlan(rate_per_s=60, seconds=0.2, seed=7)
    await load(devices, plan).run()
    first, server.requests = server.requests, []
    await load(devices, plan).run()
    second = server.requests
    assert len(first) == len(second) == 12
    assert not {each["id"] for each in first} & {each["id"] for each in second}
    assert len({each["ksn"] for each in first + second}) == 24


async def test_a_record_that_was_started_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    for number in range(2):
        with Record(path, SystemClock()) as record:
            record.sent("dev-1", f"r{number}")
    assert [line["id"] for line in lines(path)] == ["r0", "r1"]


async def test_what_was_recorded_is_in_the_file_after_one_turn_of_the_loop(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    with Record(path, SystemClock()) as record:
        record.sent("dev-1", "r1")
        record.sent("dev-1", "r1", again=True)
        await asyncio.sleep(0)
        assert [line["what"] for line in lines(path)] == ["sent", "resent"]


class Admin:
    """glamd's admin socket as far as enrolment goes; `answers` come before it is good."""

    def __init__(self, authority: Authority, socket: Path) -> None:
        self.socket = socket
        self.bodies: list[dict[str, object]] = []
        self.answers: list[web.Response] = []
        self.most_at_once = 0
        self._at_once = 0
        self._authority = authority

    async def enroll(self, request: web.Request) -> web.Response:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        body = await request.json()
        self._at_once -= 1
        self.bodies.append(body)
        if self.answers:
            return self.answers.pop()
        device_id = f"dev_{len(self.bodies)}"
        cert, key = self._authority.issue(device_id)
        return web.json_response(
            {
                "device": {"device_id": device_id, "ksn": body["ksn"]},
                "certificate_pem": cert.read_text(),
                "private_key_pem": key.read_text(),
                "ca_pem": "the devices' authority, not the server's",
                "initial_key": INITIAL_KEY,
            },
            status=201,
        )


@pytest.fixture
async def admin(authority: Authority, tmp_path: Path) -> AsyncIterator[Admin]:
    admin = Admin(authority, tmp_path / "admin.sock")
    app = web.Application()
    app.router.add_post("/v1/devices", admin.enroll)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(admin.socket)).start()
    yield admin
    await runner.cleanup()


@pytest.fixture
def state_dir(authority: Authority, server: ScriptedServer, admin: Admin, tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    home = enrolled(authority, directory / "devices", server.port)
    listed = orjson.loads((home / "device.json").read_bytes())
    for name in ("cert", "key", "ca"):
        listed[name] = str(home / listed[name])
    document = {
        "admin": {"socket": str(admin.socket)},
        "merchant_id": listed["merchant_id"],
        "mqtt": {"host": "127.0.0.1", "port": server.port, "ca": str(authority.ca_file)},
        "devices": [listed],
    }
    (directory / "dev.json").write_bytes(orjson.dumps(document))
    return directory


def edited(state_dir: Path, **changes: object) -> None:
    file = state_dir / "dev.json"
    file.write_bytes(orjson.dumps({**orjson.loads(file.read_bytes()), **changes}))


@pytest.mark.parametrize("field", ["admin", "mqtt", "merchant_id"])
def test_a_site_that_lacks_something_is_refused(state_dir: Path, field: str) -> None:
    edited(state_dir, **{field: None})
    with pytest.raises(ConfigError):
        read_site(state_dir)


def test_no_site_at_all_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is `glamd dev` running"):
        read_site(tmp_path)


async def test_a_site_without_devices_cannot_enrol_others(state_dir: Path) -> None:
    edited(state_dir, devices=[])
    with pytest.raises(ConfigError, match="lists no device"):
        await load_devices(read_site(state_dir), 1)


async def test_an_admin_socket_that_is_not_there_is_a_clear_error(state_dir: Path) -> None:
    edited(state_dir, admin={"socket": str(state_dir / "none.sock")})
    with pytest.raises(UnavailableError, match="is glamd running"):
        await load_devices(read_site(state_dir), 2)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (web.json_response({"detail": "no such key set"}, status=404), "no such key set"),
        (web.Response(text="<html>", status=500), "does not answer"),
        (web.json_response([], status=201), "says not why"),
        (web.json_response({"device": {}}, status=201), "no certificate"),
    ],
)
async def test_a_refused_enrolment_says_why(
    state_dir: Path, admin: Admin, answer: web.Response, words: str
) -> None:
    admin.answers = [answer]
    with pytest.raises(UnavailableError, match=words):
        await load_devices(read_site(state_dir), 1)


async def test_a_ksn_that_is_taken_is_replaced_by_another(state_dir: Path, admin: Admin) -> None:
    admin.answers = [web.json_response({"detail": "in use"}, status=409)]
    await load_devices(read_site(state_dir), 1)
    assert admin.bodies[0]["ksn"] != admin.bodies[1]["ksn"]


async def test_terminals_are_enrolled_once_a_few_at_a_time_and_then_kept(
    state_dir: Path, admin: Admin, server: ScriptedServer
) -> None:
    count = 2 * terminal_site.ENROL_PARALLEL
    first = await load_devices(read_site(state_dir), count)
    assert len({device.device_id for device in first}) == len(admin.bodies) == count
    assert admin.most_at_once <= terminal_site.ENROL_PARALLEL
    assert all(body["export_initial_key"] is True for body in admin.bodies)
    assert len({body["ksn"] for body in admin.bodies}) == count
    assert await load_devices(read_site(state_dir), count) == first
    assert len(admin.bodies) == count
    report = await load(first[:3], LoadPlan(rate_per_s=50, seconds=0.1)).run()
    assert report.ok == 5


async def test_devices_of_a_site_that_is_no_more_are_not_used(
    state_dir: Path, admin: Admin
) -> None:
    await load_devices(read_site(state_dir), 1)
    edited(state_dir, merchant_id="another")
    await load_devices(read_site(state_dir), 1)
    assert len(admin.bodies) == 2


async def test_half_an_enrolment_is_none(state_dir: Path, admin: Admin) -> None:
    await load_devices(read_site(state_dir), 1)
    (state_dir / "load" / "00000" / "device.json").unlink()
    await load_devices(read_site(state_dir), 1)
    assert len(admin.bodies) == 2


async def test_a_server_that_moved_is_found_at_its_new_place(state_dir: Path, admin: Admin) -> None:
    [before] = await load_devices(read_site(state_dir), 1)
    ca = str(read_site(state_dir).ca)
    edited(state_dir, mqtt={"host": "localhost", "port": 1, "ca": ca})
    [after] = await load_devices(read_site(state_dir), 1)
    assert (after.host, after.port) == ("localhost", 1)
    assert after.device_id == before.device_id
