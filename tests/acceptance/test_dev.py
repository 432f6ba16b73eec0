"""`glamd dev` as its users meet it: a process with a state directory, a `dev.json` and signals."""

import asyncio
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import aiohttp
import asyncpg
import nats.errors
import orjson
import pytest
from click.testing import CliRunner

from bench.harness import PROGRAMS, DevDaemon
from device_gateway.terminal import Answer
from device_gateway.terminal_card import TEST_CARDS
from glamd.__main__ import dev as glamd_dev
from glamd.embedded import children, dev
from glamd.embedded.screen import Screen
from glamd.errors import UnavailableError
from tests.faults.kill_daemon import KillReport, kill_under_load
from tests.faults.replay import replay
from tests.support.at_terminal import at_terminal
from tests.support.dev_client import (
    TIMEOUT,
    Caller,
    ask,
    call,
    decrypted,
    own_device,
    rest,
    tap,
    watched,
)
from tests.support.nats import nats_client, stored
from tests.support.postgres import PostgresServer
from tests.support.processes import Process, at_work_in, descendants, until

CONFIG = 78
LONG_S = 30.0
ANY_PORTS = ("--http-port", "0", "--worker-port", "0", "--mqtt-port", "0")
DEVICE_KEYS = ["device_id", "merchant_id", "scheme", "key_set", "ksn", "cert", "key", "ca", "mqtt"]
TOKENS = "/api/v1/payment-tokens"
FaultRuns: TypeAlias = tuple[Future[KillReport], Future[tuple[Counter[str], Counter[str]]]]
TAP = re.compile(
    r"^\d\d:\d\d:\d\d (tdes|aes)-dukpt +dev_\w+  (\w+) +•••• (\d{4})  (ptk_\w{26})  [\d.]+ ms$",
    re.MULTILINE,
)
MONEY = re.compile(
    r"^\d\d:\d\d:\d\d (credits|billing|demo) +([\w.]+)(?: x(\d+))? +(.*)$", re.MULTILINE
)


@dataclass(frozen=True)
class Past:
    """A `glamd dev` that ran once and was stopped: its directory, and what happened in it."""

    state_dir: Path
    description: dict[str, object]
    payload: bytes
    answer: Answer

    @property
    def token(self) -> str:
        """The token that was made."""
        return self.answer.text("token")


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Past]:
    """A state directory to copy from."""
    daemon = DevDaemon(tmp_path_factory.mktemp("dev") / "state")

    async def tapped() -> tuple[bytes, Answer]:
        device = await own_device(daemon)
        payload = tap(device, "long-ago")
        [answer] = await ask(device, payload)
        return payload, answer

    try:
        daemon.start()
        payload, answer = asyncio.run(tapped())
        assert answer.ok
        description = daemon.description
        assert daemon.stop() == 0
        yield Past(daemon.state_dir, description, payload, answer)
    finally:
        daemon.stop()
        shutil.rmtree(daemon.state_dir)


def copied(past: Past, target: Path) -> Path:
    """A copy with owners, since PostgreSQL's files may be another user's."""
    subprocess.run(["cp", "--archive", past.state_dir, target], check=True, timeout=LONG_S)
    return target


@pytest.fixture
def state_dir(past: Past, tmp_path: Path) -> Iterator[Path]:
    """A state directory that was used before."""
    yield copied(past, tmp_path / "state")
    shutil.rmtree(tmp_path / "state")


@contextmanager
def together(*daemons: DevDaemon) -> Iterator[None]:
    """Start them at the same time, and let none outlive the context, nor its files."""
    try:
        for daemon in daemons:
            daemon.launch()
        for daemon in daemons:
            daemon.wait_until_ready()
        yield
    finally:
        for daemon in daemons:
            daemon.stop()
            shutil.rmtree(daemon.state_dir)


@pytest.fixture(scope="module")
def pair(
    past: Past, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DevDaemon, DevDaemon]]:
    """One with its demo and one without, started again at the same time."""
    homes = [tmp_path_factory.mktemp(name) / "state" for name in ("tapping", "quiet")]
    daemons = (DevDaemon(copied(past, homes[0]), demo=True), DevDaemon(copied(past, homes[1])))
    with together(*daemons):
        yield daemons


@pytest.fixture
def tapping(pair: tuple[DevDaemon, DevDaemon]) -> DevDaemon:
    """One with its demo, shared by tests that leave it as it was."""
    return pair[0]


@pytest.fixture
def quiet(pair: tuple[DevDaemon, DevDaemon]) -> DevDaemon:
    """One without taps, shared by tests that leave it running."""
    return pair[1]


def refused_at_once(*arguments: str | Path) -> str:
    """What is said by a start that touches nothing; in this process, which is the quicker way."""
    result = CliRunner().invoke(glamd_dev, [str(each) for each in arguments])
    assert result.exit_code == CONFIG
    assert result.stdout == ""
    return one_line(result.stderr)


def killed(folder: Path) -> KillReport:
    """Twice killed, soon after it was ready."""
    return kill_under_load(
        folder, rounds=2, seed=1, rate_per_s=200, terminals=6, round_s=1.5, life_limit_s=0.4
    )


@pytest.fixture(scope="module", autouse=True)
def fault_runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FaultRuns | None]:
    """The fault runs, begun before all tests and beside them, since they wait more than they work.

    Where no test that looks at them was chosen, nothing is begun.
    """
    if not any("reports" in getattr(each, "fixturenames", ()) for each in request.session.items):
        yield None
        return
    homes = [tmp_path_factory.mktemp(name) for name in ("kill", "replay")]
    with ThreadPoolExecutor() as threads:
        yield threads.submit(killed, homes[0]), threads.submit(replay, homes[1], taps=60)
    for home in homes:
        shutil.rmtree(home / "state")


@pytest.fixture
def reports(fault_runs: FaultRuns | None) -> FaultRuns:
    """What the fault runs will have found."""
    assert fault_runs is not None
    return fault_runs


def one_line(text: str) -> str:
    """The one line that a start which failed has to leave."""
    [line] = text.splitlines()
    assert line.startswith("glamd: ")
    return line


def tokens_printed(daemon: DevDaemon) -> list[str]:
    """The tokens of the tap lines so far."""
    return [found[4] for found in TAP.finditer(daemon.output())]


def holds_nothing(state_dir: Path) -> bool:
    """Whether nothing of a daemon is left but its files."""
    left = {"dev.json", "admin.sock"} & {entry.name for entry in state_dir.iterdir()}
    return not left and not at_work_in(state_dir)


def child_of(daemon: DevDaemon, command: str) -> Process:
    """The server of this name that the daemon itself has started, and not one of its children."""
    below = descendants(daemon.pid)
    own = below - {each for child in below for each in descendants(child.pid)}
    [found] = [child for child in own if child.command == command]
    return found


def complaints(state_dir: Path) -> list[str]:
    """The lines of its log that tell of an error."""
    lines = (state_dir / "glamd.log").read_text().splitlines()
    return [line for line in lines if json.loads(line)["level"] in ("error", "critical")]


# ---- what refuses to start, with one line, at once, and leaving nothing


def test_every_port_that_is_taken_is_named_before_anything_is_started(tmp_path: Path) -> None:
    names = ("--http-port", "--worker-port", "--mqtt-port")
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in names]
        ports = [str(each.getsockname()[1]) for each in taken]
        asked = [word for pair in zip(names, ports, strict=True) for word in pair]
        line = refused_at_once("--state-dir", tmp_path / "state", *asked)
        for name, port in zip(names, ports, strict=True):
            assert f"{name} {port}: address already in use" in line
        only = refused_at_once("--state-dir", tmp_path / "state", names[2], ports[2])
        assert names[2] in only
        assert names[0] not in only
    assert not (tmp_path / "state").exists()


def test_a_start_that_fails_at_its_very_end_takes_everything_down_again(state_dir: Path) -> None:
    (state_dir / "admin.sock").mkdir()
    result = subprocess.run(
        [PROGRAMS / "glamd", "dev", "--state-dir", state_dir, *ANY_PORTS],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=LONG_S,
    )
    assert result.returncode == CONFIG
    assert "admin.sock exists and is no socket" in one_line(result.stderr)
    (state_dir / "admin.sock").rmdir()
    assert holds_nothing(state_dir)


def test_a_second_one_in_the_same_directory_is_refused_and_does_the_first_no_harm(
    tapping: DevDaemon,
) -> None:
    described = (tapping.state_dir / "dev.json").read_bytes()
    for more in ((), ("--fresh",)):
        line = refused_at_once("--state-dir", tapping.state_dir, *more)
        assert "Another glamd dev runs in" in line
    assert (tapping.state_dir / "dev.json").read_bytes() == described
    assert tapping.run("glamctl", "health").returncode == 0


@pytest.mark.parametrize("more", [(), ("--fresh",)])
def test_a_directory_that_is_somebody_elses_is_left_as_it_is(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    (tmp_path / "postgres").mkdir()
    assert "is not empty" in refused_at_once("--state-dir", tmp_path, *more)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["postgres", "thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refused_at_once("--state-dir", tmp_path / "file" / "state")
    assert "cannot be used: Not a directory" in line


def test_wrong_usage_is_status_2_and_makes_nothing(tmp_path: Path) -> None:
    arguments = ["--state-dir", str(tmp_path / "state"), "--http-port", "65536"]
    assert CliRunner().invoke(glamd_dev, arguments).exit_code == 2
    assert not (tmp_path / "state").exists()


# ---- dev.json


def test_dev_json_is_as_the_contract_says(tapping: DevDaemon) -> None:
    found = tapping.description
    assert {name: set(value) for name, value in found.items() if isinstance(value, dict)} == {
        "http": {"url"},
        "worker": {"url", "ca", "cert", "key"},
        "mqtt": {"host", "port", "ca"},
        "admin": {"socket"},
        "database": {"url", "admin_url"},
        "nats": {"url"},
        "jwt": {"client", "internal"},
        "credits_demo": {"merchant_id", "domain", "jwt", "shopify"},
    }
    plain = {name for name, value in found.items() if not isinstance(value, dict)}
    assert plain == {"pid", "merchant_id", "domain", "devices"}
    assert found["pid"] == tapping.pid
    path = tapping.state_dir / "dev.json"
    assert path.stat().st_mode & 0o777 == 0o600
    named = [("worker", "ca"), ("worker", "cert"), ("worker", "key"), ("mqtt", "ca")]
    for keys in named:
        file = Path(tapping.text(*keys))
        assert file.is_absolute()
        assert file.read_text().startswith("-----BEGIN ")
    assert Path(tapping.text("admin", "socket")).is_absolute()
    assert Path(tapping.text("admin", "socket")).is_socket()


def test_its_devices_are_their_device_json_with_paths_made_absolute(tapping: DevDaemon) -> None:
    listed = tapping.description["devices"]
    assert isinstance(listed, list)
    assert [each["scheme"] for each in listed] == ["tdes-dukpt", "aes-dukpt"]
    for each in listed:
        assert list(each) == [*DEVICE_KEYS, "initial_key"]
        home = Path(each["cert"]).parent
        beside = json.loads((home / "device.json").read_bytes())
        assert each == beside | {name: str(home / beside[name]) for name in ("cert", "key", "ca")}
        assert home.is_absolute()
        for name in ("cert", "key", "ca"):
            assert (home / beside[name]).read_text().startswith("-----BEGIN ")
        ca = {"ca": tapping.text("mqtt", "ca")}
        assert each["mqtt"] | ca == tapping.description["mqtt"]
        assert each["merchant_id"] == tapping.description["merchant_id"]


async def test_its_database_urls_are_the_daemons_login_and_the_superuser(
    tapping: DevDaemon,
) -> None:
    for name, is_superuser in (("url", False), ("admin_url", True)):
        connection = await asyncpg.connect(tapping.text("database", name), timeout=LONG_S)
        try:
            assert await connection.fetchval("SELECT count(*) >= 0 FROM cde.payment_tokens")
            found = await connection.fetchval(
                "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"
            )
        finally:
            await connection.close(timeout=LONG_S)
        assert found is is_superuser


@pytest.mark.parametrize("caller", ["client", "internal"])
async def test_its_jwts_are_good_for_every_route_of_payment_tokens(
    quiet: DevDaemon, caller: Caller
) -> None:
    device = await own_device(quiet)
    [answer] = await ask(device, tap(device, secrets.token_hex(8)))
    token = answer.text("token")
    merchant = "" if caller == "client" else f"&merchant_id={quiet.text('merchant_id')}"
    listed = await rest(quiet, f"{TOKENS}?limit=200{merchant}", caller=caller)
    assert token in {each["token"] for each in listed.data}
    shown = await rest(quiet, f"{TOKENS}/{token}", caller=caller)
    assert (shown.status, shown.data["last4"]) == (200, TEST_CARDS[0].pan[-4:])
    revoked = await rest(quiet, f"{TOKENS}/{token}", method="DELETE", caller=caller)
    assert (revoked.status, revoked.data["status"]) == (200, "revoked")
    assert (await decrypted(quiet, token)).status == 410


# ---- what it shows


async def test_taps_are_printed_as_they_come_with_tokens_that_are_there(tapping: DevDaemon) -> None:
    def both_kinds() -> bool:
        return {found[1] for found in TAP.finditer(tapping.output())} == {"tdes", "aes"}

    until(both_kinds)
    printed = tapping.output()
    found = TAP.search(printed)
    assert found is not None
    shown = (await rest(tapping, f"{TOKENS}/{found[4]}")).data
    assert (shown["brand"], shown["last4"]) == (found[2], found[3])


def test_into_a_file_it_prints_plainly_what_runs_where_and_what_to_try(tapping: DevDaemon) -> None:
    printed = tapping.output()
    assert printed.isprintable() or "\x1b" not in printed
    for place in (tapping.text("http", "url"), tapping.text("worker", "url")):
        assert place in printed
    password = tapping.text("database", "url").split(":")[2].partition("@")[0]
    assert password not in printed
    [listing] = [line.strip() for line in printed.splitlines() if f"{TOKENS} -H" in line]
    [assignment] = [line.strip() for line in printed.splitlines() if "TOKEN=$(" in line]
    shown = subprocess.run(
        ["bash", "-c", f"{assignment}\n{listing}"],
        capture_output=True,
        check=True,
        timeout=LONG_S,
    )
    assert "data" in json.loads(shown.stdout)


def test_the_buyers_money_is_printed_as_it_comes(tapping: DevDaemon) -> None:
    def named(room: str, name: str) -> list[str]:
        return [
            " ".join(found[4].split())
            for found in MONEY.finditer(tapping.output())
            if (found[1], found[2]) == (room, name)
        ]

    until(lambda: named("credits", "consumed"))
    assert named("billing", "trial.started")[0].startswith("500 until ")
    assert named("credits", "granted")[:2] == [
        "+500 balance 500 (trial)",
        "+100 balance 600 (purchase)",
    ]
    [checkout] = named("billing", "checkout")
    assert checkout.startswith(
        f"small approves at {tapping.text('credits_demo', 'shopify', 'url')}/"
    )
    assert named("billing", "credits.purchased") == ["100 for 9.99 at shopify"]
    assert named("credits", "consumed")[0] == "-50 balance 550"
    assert named("demo", "waits") == []


async def test_a_purchase_begun_by_hand_is_paid_on_the_page_that_it_names(
    quiet: DevDaemon,
) -> None:
    headers = {"Authorization": f"Bearer {quiet.text('credits_demo', 'jwt')}"}
    purchases = f"{quiet.text('http', 'url')}/api/billing/purchases"
    wanted = {"platform": "shopify", "return_url": "https://demo-credits.example/"}
    begun = await call("POST", purchases, json={"pack": "large", **wanted}, headers=headers)
    async with aiohttp.ClientSession(timeout=TIMEOUT) as browser:
        page = begun.data["checkout_url"]
        assert "1000 credits" in await (await browser.get(page)).text()
        approved = await browser.post(page, data={"act": "approve"}, allow_redirects=False)
    assert approved.headers["Location"].startswith(wanted["return_url"])

    async def balance() -> int:
        credits_url = f"{quiet.text('http', 'url')}/api/credits"
        return int((await call("GET", credits_url, headers=headers)).data["balance"])

    async def becomes(wanted: int) -> None:
        while await balance() != wanted:
            pass

    async with asyncio.timeout(LONG_S):
        await becomes(1000)


def test_no_card_number_is_in_what_it_prints_and_logs(tapping: DevDaemon) -> None:
    until(lambda: tokens_printed(tapping))
    # The first one is in the command that is shown to be tried.
    numbers = [card.pan for card in TEST_CARDS[1:]]
    for text in (tapping.output(), (tapping.state_dir / "glamd.log").read_text()):
        assert not [number for number in numbers if number in text]


def test_a_swipe_beside_it_leaves_its_terminals_connected(tapping: DevDaemon) -> None:
    swiped = [
        json.loads(
            tapping.run(
                *("glam-terminal", "swipe", TEST_CARDS[1].pan, "--json"),
                *("--state-dir", str(tapping.state_dir)),
            ).stdout
        )
        for _ in range(2)
    ]
    assert [each["status"] for each in swiped] == ["ok", "ok"]
    [used] = {each["device_id"] for each in swiped}
    listed = json.loads((tapping.state_dir / "dev.json").read_text())["devices"]
    assert used not in [each["device_id"] for each in listed]


def test_ctrl_c_at_a_terminal_ends_it_in_order_and_shows_colour(state_dir: Path) -> None:
    command = [str(PROGRAMS / "glamd"), "dev", "--state-dir", str(state_dir), *ANY_PORTS]
    code, shown = at_terminal(command, [("ptk_", "\x03")])
    assert code == 0
    assert "\x1b[" in shown
    assert shown.rstrip("\x1b[0m\r\n").endswith("Stopped.")
    assert "Traceback" not in shown
    assert holds_nothing(state_dir)
    assert complaints(state_dir) == []


def test_a_sigterm_ends_it_in_order_also_where_nobody_reads_what_it_prints(
    state_dir: Path,
) -> None:
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write, b"." * 4096)
    os.set_blocking(write, True)
    with subprocess.Popen(
        [PROGRAMS / "glamd", "dev", "--state-dir", state_dir, *ANY_PORTS],
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(write)
        try:
            # A pipe that is full must not hold it up, nor one without a reader end it.
            until((state_dir / "dev.json").exists, timeout_s=LONG_S)
            os.close(read)
            children = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            _, complaint = process.communicate(timeout=LONG_S)
        finally:
            process.kill()
    assert (process.returncode, complaint) == (0, b"")
    assert {"postgres", "nats-server"} <= {child.command for child in children}
    assert not [child for child in children if child.alive]
    assert holds_nothing(state_dir)
    assert complaints(state_dir) == []


# ---- lives


async def test_a_second_start_finds_everything_of_the_first(past: Past, quiet: DevDaemon) -> None:
    assert quiet.description["merchant_id"] == past.description["merchant_id"]
    kept = ("device_id", "ksn", "initial_key", "scheme", "key_set")
    now, then = (
        [[each[name] for name in kept] for each in listed(description)]
        for description in (quiet.description, past.description)
    )
    assert now == then
    assert (await rest(quiet, f"{TOKENS}/{past.token}")).data["status"] == "active"
    assert (await decrypted(quiet, past.token)).data["pan"] == TEST_CARDS[0].pan
    device = await own_device(quiet)
    [again] = await ask(device, past.payload)
    assert again.fields == past.answer.fields | {"replayed": True}
    other = orjson.dumps(orjson.loads(past.payload) | {"id": "other"})
    assert [each.code for each in await ask(device, other)] == ["KSN_REPLAYED"]


def test_without_the_demo_all_is_there_and_nothing_taps(quiet: DevDaemon) -> None:
    home = [each["device_id"] for each in listed(quiet.description)]
    assert len(home) == 2
    for device_id in home:
        shown = json.loads(quiet.run("glamctl", "--json", "device", "show", str(device_id)).stdout)
        assert (shown["presence"], shown["last_seen_at"]) == ("offline", None)
    assert tokens_printed(quiet) == []
    assert MONEY.findall(quiet.output()) == []


def test_after_kill_9_no_child_keeps_the_next_start_waiting(quiet: DevDaemon) -> None:
    children = descendants(quiet.pid)
    assert {"postgres", "nats-server"} <= {child.command for child in children}
    quiet.kill9()
    quiet.start()
    until(lambda: not [child for child in children if child.alive])
    assert quiet.run("glamctl", "health").returncode == 0


async def test_a_postgresql_that_is_killed_comes_back_and_tapping_goes_on(
    quiet: DevDaemon,
) -> None:
    device = await own_device(quiet)
    before = tap(device, "before")
    [first] = await ask(device, before)
    killed = child_of(quiet, "postgres")
    os.kill(killed.pid, signal.SIGKILL)
    answers, meanwhile = await watched(device, tap(device, "after"), before)
    assert [answer.code for answer in answers] == ["ok", "ok"]
    assert answers[1].fields == first.fields | {"replayed": True}
    assert {answer.code for answer in meanwhile} <= {"UNAVAILABLE"}
    assert child_of(quiet, "postgres") != killed
    assert quiet.run("glamctl", "health").returncode == 0


async def test_a_nats_server_that_is_killed_comes_back_and_events_flow(quiet: DevDaemon) -> None:
    killed = child_of(quiet, "nats-server")
    os.kill(killed.pid, signal.SIGKILL)
    device = await own_device(quiet)
    [answer] = await ask(device, tap(device, secrets.token_hex(8)))
    until(lambda: "nats-server" in {each.command for each in descendants(quiet.pid) - {killed}})

    async def published() -> set[str]:
        """The tokens that the stream tells of; none as long as nobody listens."""
        try:
            async with nats_client(quiet.text("nats", "url")) as client:
                found = await stored(client)
        except (OSError, nats.errors.Error):
            return set()
        return {each.content["data"].get("token", "") for each in found}

    async with asyncio.timeout(LONG_S):
        while answer.text("token") not in await published():
            pass
    assert child_of(quiet, "nats-server") != killed


async def test_a_postgresql_that_cannot_come_back_ends_it_all_with_its_last_words(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process: with all of its attempts the supervision takes ten seconds to give up.
    monkeypatch.setattr(children, "RESTART_LIMIT", 1)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    stop_requested = asyncio.Event()

    async def until_told_to_stop() -> None:
        async with dev.database(state_dir, Screen(), stop_requested):
            data = state_dir / "postgres" / "data"
            (data / "PG_VERSION").unlink()
            os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
            async with asyncio.timeout(LONG_S):
                await stop_requested.wait()

    with pytest.raises(UnavailableError, match=r"postgres does not start: .*not a valid data"):
        await until_told_to_stop()
    until(lambda: not at_work_in(state_dir))


@pytest.fixture(scope="module")
def module_empty_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database with nothing in it on a server that is not the daemon's."""
    url = postgres_server.create_database(migrated=False)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="module")
def beginners(
    past: Past, module_empty_database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DevDaemon, DevDaemon]]:
    """One that was told to forget its past, and one with a server of the user's own."""
    homes = [tmp_path_factory.mktemp(name) / "state" for name in ("fresh", "own")]
    copied(past, homes[0])
    own = {"DATABASE_URL": module_empty_database_url}
    daemons = (DevDaemon(homes[0], "--fresh"), DevDaemon(homes[1], environment=own))
    with together(*daemons):
        yield daemons


async def test_fresh_forgets_what_there_was(
    past: Past, beginners: tuple[DevDaemon, DevDaemon]
) -> None:
    fresh = beginners[0]
    assert fresh.description["merchant_id"] != past.description["merchant_id"]
    now, then = (
        {each["device_id"] for each in listed(description)}
        for description in (fresh.description, past.description)
    )
    assert not now & then
    assert (await rest(fresh, f"{TOKENS}/{past.token}")).status == 404
    assert not (fresh.state_dir / "load").exists()


async def test_a_server_of_ones_own_is_used_instead_of_a_child(
    module_empty_database_url: str, beginners: tuple[DevDaemon, DevDaemon]
) -> None:
    url, own = module_empty_database_url, beginners[1]
    assert own.description["database"] == {"url": url, "admin_url": url}
    assert not (own.state_dir / "postgres").exists()
    assert {child.command for child in descendants(own.pid)} == {"nats-server"}
    device = await own_device(own)
    [answer] = await ask(device, tap(device, "own-server"))
    assert (await decrypted(own, answer.text("token"))).data["expiry"] == "4912"


# ---- the fault runs, in short


def test_killed_under_load_it_loses_and_doubles_nothing(reports: FaultRuns) -> None:
    report = reports[0].result(LONG_S)
    assert report.verdict.holds, report.verdict
    assert report.tokens > 0


def test_counters_that_made_tokens_are_refused_after_a_restart_too(reports: FaultRuns) -> None:
    first, again = reports[1].result(LONG_S)
    assert first == {"ok": 60}
    assert again == {"KSN_REPLAYED": 60}


def listed(description: dict[str, object]) -> list[dict[str, object]]:
    """The devices in a `dev.json`."""
    found = description["devices"]
    assert isinstance(found, list)
    return found
