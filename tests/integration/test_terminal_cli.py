"""`glam-terminal` as its users meet it: a process with arguments, output and an exit status."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from device_gateway import terminal_cli
from device_gateway.mqtt import codec
from device_gateway.mqtt.codec import ReasonCode, Version
from tests.support.mqtt_tls import Authority
from tests.support.scripted_mqtt import ScriptedServer, ok, refusal
from tests.support.terminal_devices import enrolled

PAN = "4242424242424242"
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Result:
    """What a run of the command left behind."""

    status: int
    out: str
    err: str

    @property
    def everything(self) -> str:
        """All that anybody could read."""
        return self.out + self.err


async def started(*arguments: str | Path) -> asyncio.subprocess.Process:
    environment = {**os.environ, "COLUMNS": "120"}
    environment.pop("GLAMD_STATE_DIR", None)
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "device_gateway.terminal_cli",
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )


async def finished(process: asyncio.subprocess.Process) -> Result:
    async with asyncio.timeout(TIMEOUT_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Result(process.returncode, out.decode(), err.decode())


Run = Callable[..., Awaitable[Result]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in a thread: it starts at once, and the server goes on serving beside it."""
    monkeypatch.delenv("GLAMD_STATE_DIR", raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    async def run_in_thread(*arguments: str | Path) -> Result:
        def command() -> int | str | None:
            with pytest.raises(SystemExit) as caught:
                terminal_cli.main([str(argument) for argument in arguments])
            return caught.value.code

        async with asyncio.timeout(TIMEOUT_S):
            status = await asyncio.to_thread(command)
        shown = capsys.readouterr()
        assert isinstance(status, int)
        return Result(status, shown.out, shown.err)

    return run_in_thread


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
def home(authority: Authority, server: ScriptedServer, tmp_path: Path) -> Path:
    return enrolled(authority, tmp_path, server.port)


@pytest.fixture
def state_dir(authority: Authority, server: ScriptedServer, home: Path, tmp_path: Path) -> Path:
    """As `glamd dev` leaves it, with two terminals for a load and two for swipes from earlier."""
    directory = tmp_path / "state"
    listed = orjson.loads((home / "device.json").read_bytes())
    for name in ("cert", "key", "ca"):
        listed[name] = str(home / listed[name])
    for number in range(2):
        made = enrolled(authority, tmp_path / "made", server.port, number=10 + number)
        (directory / "load").mkdir(parents=True, exist_ok=True)
        made.rename(directory / "load" / f"{number:05d}")
        made = enrolled(authority, tmp_path / "made", server.port, number=20 + number)
        (directory / "swipe").mkdir(parents=True, exist_ok=True)
        made.rename(directory / "swipe" / f"{number:02d}")
    document = {
        "admin": {"socket": str(directory / "admin.sock")},
        "merchant_id": listed["merchant_id"],
        "mqtt": {"host": "127.0.0.1", "port": server.port, "ca": str(authority.ca_file)},
        "devices": [listed],
    }
    (directory / "dev.json").write_bytes(orjson.dumps(document))
    return directory


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [PAN],
        ["swipe"],
        ["swipe", PAN, "--exp", "1/30"],
        ["swipe", PAN + "x"],
        ["swipe", PAN * 3],
        ["swipe", f"--{PAN}"],
        ["swipe", PAN, "--format", "track3"],
        ["swipe", PAN, "--timeout", "0"],
        ["swipe", PAN, "--mqtt", "4"],
        ["load", "--terminals", "0"],
        ["load", "--rate", "-1"],
        ["load", "--seconds", "soon"],
        ["load", PAN],
    ],
)
def test_wrong_usage_is_status_2_and_shows_no_card_number(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        terminal_cli.main(arguments)
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.out == ""
    assert shown.err
    assert PAN not in shown.err
    assert len(shown.err.splitlines()) == 1 or not arguments


def test_no_daemon_is_one_clear_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["swipe", PAN], ["load"]):
        with pytest.raises(SystemExit) as caught:
            terminal_cli.main([*command, "--state-dir", str(tmp_path)])
        assert caught.value.code == 1
        [line] = capsys.readouterr().err.splitlines()
        assert "is `glamd dev` running" in line


def test_the_state_directory_may_come_from_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLAMD_STATE_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(SystemExit):
        terminal_cli.main(["swipe", PAN])
    assert "elsewhere" in capsys.readouterr().err


async def test_a_refused_card_is_status_1_and_its_number_is_nowhere(
    run: Run, server: ScriptedServer, home: Path
) -> None:
    server.respond = lambda request: refusal(request, "DECRYPT_FAILED", retryable=False)
    result = await run("swipe", "4242424242424241", "--device", home)
    assert (result.status, result.out) == (1, "")
    assert result.err == "glam-terminal: DECRYPT_FAILED: no\n"


async def test_a_refused_connection_ends_at_once(
    run: Run, server: ScriptedServer, home: Path
) -> None:
    server.connack = codec.Connack(reason_code=ReasonCode.NOT_AUTHORIZED)
    result = await run("swipe", PAN, "--device", home)
    assert result.status == 1
    assert result.err == "glam-terminal: the server refused the connection: not authorized\n"


async def test_no_server_ends_after_the_time_that_was_given(
    run: Run, server: ScriptedServer, home: Path
) -> None:
    await server.stop()
    result = await run("swipe", PAN, "--device", home, "--timeout", "0.5")
    assert result.status == 1
    [line] = result.err.splitlines()
    assert "no connection within 0.5 s" in line
    assert "refused" in line


async def test_no_answer_ends_after_the_time_that_was_given(
    run: Run, server: ScriptedServer, home: Path
) -> None:
    server.respond = lambda _request: None
    result = await run("swipe", PAN, "--device", home, "--timeout", "0.6")
    assert result.status == 1
    assert "no answer within" in result.err


async def test_a_swipe_shows_the_token_and_never_the_card_number(
    run: Run, server: ScriptedServer, home: Path
) -> None:
    result = await run("swipe", *(PAN[n : n + 4] for n in range(0, 16, 4)), "--device", home)
    assert (result.status, result.err) == (0, "")
    token = f"ptk_{server.requests[0]['id']}"
    for word in ("visa", "4242", "12/2049", token, "ms"):
        assert word in result.out
    assert PAN not in result.out


async def test_a_swipe_for_programs_is_one_line_of_json_from_a_real_process(
    server: ScriptedServer, state_dir: Path
) -> None:
    process = await started(
        *("swipe", PAN, "--exp", "3101", "--format", "emv-tlv", "--mac", "--json"),
        *("--mqtt", "3.1.1", "--state-dir", state_dir),
    )
    result = await finished(process)
    [line] = result.out.splitlines()
    told = json.loads(line)
    assert (result.status, told["status"], told["device_id"]) == (0, "ok", "dev-20")
    assert told["ms"] > 0
    [request] = server.requests
    assert (request["format"], request["entry_mode"]) == ("emv-tlv", "chip")
    assert isinstance(request["mac"], str)
    assert server.connects[0].version is Version.V311
    assert PAN not in result.everything


async def test_swipes_at_the_same_time_tap_with_a_device_each_and_never_with_the_demos(
    server: ScriptedServer, state_dir: Path
) -> None:
    server.respond = lambda _request: None
    first = await started("swipe", PAN, "--state-dir", state_dir)
    try:
        await server.until(lambda: len(server.requests) == 1)
        server.respond = ok
        second = await finished(await started("swipe", PAN, "--state-dir", state_dir))
        assert (second.status, second.err) == (0, "")
    finally:
        first.kill()
        await first.communicate()
    third = await finished(await started("swipe", PAN, "--state-dir", state_dir))
    assert third.status == 0
    assert [connect.client_id for connect in server.connects] == ["dev-20", "dev-21", "dev-20"]


async def test_two_swipes_use_two_counters(run: Run, server: ScriptedServer, home: Path) -> None:
    await asyncio.gather(*(run("swipe", PAN, "--device", home) for _ in range(2)))
    assert len({request["ksn"] for request in server.requests}) == 2


async def test_a_load_reports_for_programs_and_keeps_its_record(
    run: Run, server: ScriptedServer, state_dir: Path, tmp_path: Path
) -> None:
    record = tmp_path / "record.jsonl"
    result = await run(
        *("load", "--rate", "100", "--terminals", "2", "--seconds", "0.5", "--seed", "3"),
        *("--record", record, "--state-dir", state_dir, "--json"),
    )
    told = json.loads(result.out)
    assert (result.status, result.err) == (0, "")
    assert (told["sent"], told["ok"], told["unanswered"]) == (50, 50, 0)
    latency = told["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    kept = [json.loads(line) for line in record.read_text().splitlines()]
    assert sum(line["what"] == "answer" and line["code"] == "ok" for line in kept) == 50


async def test_a_load_shows_people_a_histogram(
    run: Run, server: ScriptedServer, state_dir: Path
) -> None:
    result = await run(
        *("load", "--rate", "50", "--terminals", "1", "--seconds", "0.2"),
        *("--state-dir", state_dir),
    )
    assert result.status == 0
    for word in ("terminals", "answered", "sent", "█", "p50", "p90", "p99", "max"):
        assert word in result.out


async def test_an_interrupted_load_ends_with_one_line(
    server: ScriptedServer, state_dir: Path
) -> None:
    process = await started(
        "load", *("--rate", "50", "--seconds", "60", "--terminals", "2"), "--state-dir", state_dir
    )
    try:
        await server.until(lambda: len(server.requests) > 5)
        process.send_signal(signal.SIGINT)
        result = await finished(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert (result.status, result.err.strip()) == (1, "glam-terminal: interrupted")


async def test_a_record_that_cannot_be_written_is_said_before_anything_is_sent(
    run: Run, server: ScriptedServer, state_dir: Path, tmp_path: Path
) -> None:
    result = await run(
        *("load", "--terminals", "1", "--state-dir", state_dir),
        *("--record", tmp_path / "none" / "record.jsonl"),
    )
    assert result.status == 1
    assert "cannot append to" in result.err
    assert server.requests == []
