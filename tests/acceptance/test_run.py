"""`glamd run` as systemd meets it: a configuration file, the notify socket, signals, statuses."""

import asyncio
import http.client
import json
import shutil
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest
from click.testing import CliRunner, Result

import glamd.__main__ as glamd
from device_gateway.terminal import Answer
from device_gateway.terminal_device import Device, load_device
from glamd.admin import migrate
from glamd.clock import SystemClock
from glamd.crypto import x509
from glamd.db import VERSION_TABLE, Database
from glamd.embedded.certificates import HOSTS, LEAF_VALIDITY
from glamd.embedded.settings import WORKER_URI
from tests.support.dev_client import ask, connected, tap
from tests.support.postgres import eventually, execute
from tests.support.processes import until
from tests.support.proxy import proxied
from tests.support.run_daemon import LOOPBACK, RunDaemon, Supervisor, supervised

FAILED, CONFIG = 1, 78
TIMEOUT_S = 15.0
WATCHDOG_S = 0.2
BDK = "0123456789ABCDEFFEDCBA9876543210"
DOMAIN = "shop.example"


@pytest.fixture(scope="module")
def daemon(
    certificates_dir: Path, module_database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> RunDaemon:
    """An installation that the tests of this module share."""
    directory = tmp_path_factory.mktemp("run") / "state"
    shutil.copytree(certificates_dir, directory)
    return RunDaemon(directory, module_database_url)


@pytest.fixture(scope="module")
def systemd(daemon: RunDaemon) -> Iterator[Supervisor]:
    """It runs, supervised."""
    with supervised(daemon, watchdog_s=WATCHDOG_S) as supervisor:
        yield supervisor


def refused(*words: str | Path) -> Result:
    """A command that ends with EX_CONFIG; in this process, which is the quicker way."""
    result = CliRunner().invoke(glamd.main.commands[str(words[0])], [str(w) for w in words[1:]])
    assert result.exit_code == CONFIG
    return result


def enrolled(daemon: RunDaemon) -> Device:
    """A new terminal of a new merchant, made as an operator makes them."""
    merchant, key_set = str(uuid4()), f"ks-{uuid4().hex[:8]}"
    daemon.glamctl(
        *("merchant", "create", "--platform", "custom", "--shop-id", merchant),
        *("--domain", f"{merchant}.example", "--id", merchant),
    )
    daemon.glamctl("keys", "import-bdk", key_set, "--scheme", "aes-dukpt", "--clear", BDK)
    out = daemon.directory / key_set
    daemon.glamctl(
        *("device", "enroll", "--merchant", merchant, "--key-set", key_set),
        *("--ksn", f"{uuid4().hex[:16]}00000000", "--export-initial-key", "--out", str(out)),
    )
    return load_device(out)


def client_tls(daemon: RunDaemon, listener: str) -> ssl.SSLContext:
    """What a worker or a terminal brings along."""
    authorities = daemon.certificates
    pair = authorities.worker(WORKER_URI) if listener == "worker" else authorities.device("dev-0")
    context = ssl.create_default_context(cafile=str(authorities.server_ca.certificate_file))
    context.load_cert_chain(pair.certificate_file, pair.key_file)
    return context


def dialled(daemon: RunDaemon, listener: str) -> ssl.SSLSocket:
    """A TLS connection to a listener."""
    raw = socket.create_connection((LOOPBACK, daemon.listeners()[listener]), timeout=TIMEOUT_S)
    return client_tls(daemon, listener).wrap_socket(raw, server_hostname=LOOPBACK)


def certificate(daemon: RunDaemon, listener: str) -> bytes | None:
    """The certificate that a new connection is shown."""
    with dialled(daemon, listener) as connection:
        return connection.getpeercert(binary_form=True)


def status(connection: http.client.HTTPConnection, path: str) -> int:
    """The status of one request on a connection that stays."""
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    return response.status


def renew(daemon: RunDaemon) -> None:
    """Put a new server certificate of the same authority where the old one is."""
    old, authority = daemon.certificates.server(), daemon.certificates.server_ca
    key, public_key = x509.generate_key()
    made = x509.issue_server(
        HOSTS,
        public_key=public_key,
        ca_certificate=authority.certificate,
        ca_key=authority.key,
        now=SystemClock().now(),
        validity=LEAF_VALIDITY,
    )
    old.certificate_file.write_text(x509.certificate_pem(made))
    old.key_file.write_bytes(x509.private_key_pem(key).encode())


# ---- what does not start


def test_every_wrong_setting_is_told_at_once_in_one_line(state_dir: Path) -> None:
    wrong = RunDaemon(
        state_dir,
        "mysql://user:hunter2@db/glamd",
        changes={"http": {"port": 70000}, "mqtt": {"tls_crt": "x"}, "auth": {"jwks": []}},
    )
    result = refused("run", "--config", wrong.config)
    [line] = result.stderr.splitlines()
    for key in ("database.url", "http.port", "mqtt.tls_crt", "did you mean tls_cert", "auth.jwks"):
        assert key in line
    assert "hunter2" not in line


def test_check_config_lists_every_mistake_by_its_key(state_dir: Path) -> None:
    wrong = RunDaemon(
        state_dir, "postgresql://db/glamd", changes={"http": {"port": -1}, "keys": {"kek": "x"}}
    )
    listed = refused("check-config", "--config", wrong.config).stderr.splitlines()
    assert [line.split(": ")[1] for line in listed] == ["http.port", "keys.kek"]


def test_check_config_looks_for_the_files_too(state_dir: Path) -> None:
    wrong = RunDaemon(
        state_dir,
        "postgresql://db/glamd",
        changes={"keys": {"kek_file": "/nowhere/kek"}, "devices": {"ca_key": "/nowhere/ca.key"}},
    )
    listed = refused("check-config", "--config", wrong.config).stderr.splitlines()
    assert [line.split(": ")[1] for line in listed] == ["devices.ca_key", "keys.kek_file"]


def test_check_config_looks_into_what_a_start_would_read(state_dir: Path, tmp_path: Path) -> None:
    jwks, secret = tmp_path / "client.jwks", tmp_path / "secret"
    jwks.write_text("{}")
    secret.write_text("hunter2")
    platform = {"platform": "custom", "client_id": "c", "client_secret_file": str(secret)}
    platform["token_url"] = "http://shop.example/token"
    for changes, told in (
        ({"auth": {"client_jwks_file": str(jwks)}}, "auth.client_jwks_file"),
        ({"credentials": {"oauth": json.dumps([platform])}}, "token_url"),
    ):
        wrong = RunDaemon(state_dir, "postgresql://db/glamd", changes=changes)
        [line] = refused("check-config", "--config", wrong.config).stderr.splitlines()
        assert line.startswith(f"glamd: {told}: ")
        assert "hunter2" not in line


def test_check_config_shows_what_holds_and_no_secret(state_dir: Path) -> None:
    good = RunDaemon(state_dir, "postgresql://user:hunter2@db.example/glamd")
    result = CliRunner().invoke(glamd.check_config, ["--config", str(good.config)])
    assert result.exit_code == 0
    assert "@db.example/glamd" in result.stdout
    assert 'environment = "development"' in result.stdout
    for secret in ("hunter2", "c" * 32, "i" * 32):
        assert secret not in result.output


async def test_a_database_that_is_away_or_of_another_age_is_one_line_with_what_mends_it(
    state_dir: Path, database_url: str, empty_database_url: str, tmp_path: Path
) -> None:
    await execute(database_url, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    away = "postgresql://glamd:hunter2@127.0.0.1:1/glamd"
    expected = {
        empty_database_url: (CONFIG, "glamctl db upgrade"),
        database_url: (CONFIG, f"glamctl db downgrade {migrate.expected_revision()}"),
        away: (FAILED, "The database is not available."),
    }
    daemons = {}
    for number, url in enumerate(expected):
        home = tmp_path / str(number)
        shutil.copytree(state_dir, home)
        daemons[url] = RunDaemon(home, url)
    try:
        # At the same time, since none of them is in another's way.
        for daemon in daemons.values():
            daemon.launch()
        for url, daemon in daemons.items():
            code, said = daemon.ended()
            [line] = said.splitlines()
            assert code == expected[url][0]
            assert expected[url][1] in line
            assert "hunter2" not in line
    finally:
        for daemon in daemons.values():
            daemon.close()


# ---- what systemd is told


async def test_it_is_ready_only_when_every_listener_answers(
    state_dir: Path, database_url: str
) -> None:
    async with proxied(database_url) as (proxy, url):
        proxy.hold()
        daemon = RunDaemon(state_dir, url)
        with supervised(daemon, watchdog_s=WATCHDOG_S, ready=False) as systemd:
            # The database hangs: the daemon lives, says so, and must not be ready.
            await asyncio.to_thread(systemd.until, "WATCHDOG=1", times=3)
            assert "READY=1" not in systemd.said
            assert not (state_dir / "admin.sock").exists()
            proxy.mend()
            await asyncio.to_thread(systemd.until, "READY=1")
            ports = await asyncio.to_thread(daemon.listeners)
            assert set(ports) == {"http", "mqtt", "worker"}
            async with aiohttp.ClientSession() as session:
                ready = await session.get(f"http://{LOOPBACK}:{ports['http']}/readyz")
                assert ready.status == 200
            for listener in ("mqtt", "worker"):
                assert await asyncio.to_thread(certificate, daemon, listener)


def test_the_watchdog_is_fed_again_and_again(systemd: Supervisor) -> None:
    systemd.forget()
    systemd.until("WATCHDOG=1", times=3)


def test_it_never_dumps_core_whatever_it_was_allowed(
    daemon: RunDaemon, systemd: Supervisor
) -> None:
    assert systemd.path.exists()
    limits = Path(f"/proc/{daemon.process.pid}/limits").read_text().splitlines()
    [core] = [line.split() for line in limits if line.startswith("Max core file size")]
    assert core[4:6] == ["0", "0"]


async def test_a_sigterm_lets_what_is_under_way_be_answered_and_ends_with_status_0(
    state_dir: Path, database_url: str, database: Database
) -> None:
    daemon = RunDaemon(state_dir, database_url)
    with supervised(daemon) as systemd:
        device = await asyncio.to_thread(enrolled, daemon)
        port = (await asyncio.to_thread(daemon.listeners))["http"]
        bearer = daemon.mint.client(
            merchant_id=device.merchant_id, shop=DOMAIN, scope="payment:read"
        )
        async with (
            aiohttp.ClientSession(f"http://{LOOPBACK}:{port}") as session,
            connected(device) as terminal,
        ):
            async with database.transaction() as holder:
                await holder.execute("LOCK TABLE cde.payment_tokens IN ACCESS EXCLUSIVE MODE")
                tapped = asyncio.create_task(
                    terminal.ask("held", tap(device, "held"), timeout_s=TIMEOUT_S)
                )
                looked = asyncio.create_task(
                    session.get(
                        "/api/v1/payment-tokens", headers={"Authorization": f"Bearer {bearer}"}
                    ).__aenter__()
                )

                async def both_wait() -> bool:
                    waiting = await database.fetchval(
                        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                        " AND datname = current_database()"
                    )
                    return bool(waiting == 2)

                await eventually(both_wait)
                daemon.signal(signal.SIGTERM)
                await asyncio.to_thread(systemd.until, "STOPPING=1")
                # A second one must not cut the drain short.
                daemon.signal(signal.SIGTERM)
                assert not tapped.done()
                assert not looked.done()
                assert daemon.process.poll() is None
            answer = await tapped
            assert answer.ok, answer
            assert (await looked).status == 200
        assert await asyncio.to_thread(daemon.ended) == (0, "")
    assert not (state_dir / "admin.sock").exists()
    assert await database.fetchval("SELECT token FROM cde.payment_tokens") == answer.text("token")


# ---- SIGHUP


def hang_up(daemon: RunDaemon, systemd: Supervisor) -> None:
    """Have it read anew, and wait until it has."""
    systemd.forget()
    daemon.signal(signal.SIGHUP)
    systemd.until("READY=1")
    told = [line for line in systemd.said if line.startswith(("RELOADING", "READY", "MONOTONIC"))]
    assert [line.partition("=")[0] for line in told] == ["RELOADING", "MONOTONIC_USEC", "READY"]


async def test_a_sighup_brings_new_certificates_and_leaves_connections_alone(
    daemon: RunDaemon, systemd: Supervisor
) -> None:
    device = await asyncio.to_thread(enrolled, daemon)
    worker = http.client.HTTPConnection(LOOPBACK)
    worker.sock = await asyncio.to_thread(dialled, daemon, "worker")
    before = [certificate(daemon, listener) for listener in ("mqtt", "worker")]
    assert before[0] == before[1]
    async with connected(device) as terminal:
        assert status(worker, "/healthz") == 200
        renew(daemon)
        daemon.settings["logging"]["level"] = "warning"
        daemon.write()
        await asyncio.to_thread(hang_up, daemon, systemd)
        after = [certificate(daemon, listener) for listener in ("mqtt", "worker")]
        assert after[0] == after[1] != before[0]
        assert status(worker, "/healthz") == 200
        answer: Answer = await terminal.ask("same", tap(device, "same"), timeout_s=TIMEOUT_S)
        assert answer.ok
        assert terminal.connected.is_set()
    worker.close()
    assert daemon.glamctl("log-level") == {"level": "warning"}
    # A connection that is made anew is served as well.
    assert [each.ok for each in await ask(device, tap(device, "anew"))] == [True]


@pytest.mark.parametrize("broken", ["certificate", "settings"])
def test_a_sighup_with_a_broken_file_changes_nothing_and_logs_one_line(
    daemon: RunDaemon, systemd: Supervisor, broken: str
) -> None:
    file = (
        daemon.certificates.server().certificate_file if broken == "certificate" else daemon.config
    )
    whole = file.read_bytes()
    before = [certificate(daemon, listener) for listener in ("mqtt", "worker")]
    level, logged = daemon.glamctl("log-level"), len(daemon.events("reload_refused"))
    try:
        file.write_bytes(whole[: len(whole) // 2])
        hang_up(daemon, systemd)
    finally:
        file.write_bytes(whole)
    until(lambda: len(daemon.events("reload_refused")) > logged)
    [line] = daemon.events("reload_refused")[logged:]
    assert file.name in line["reason"]
    assert [certificate(daemon, listener) for listener in ("mqtt", "worker")] == before
    assert daemon.glamctl("log-level") == level
    assert line["level"] == "error"
