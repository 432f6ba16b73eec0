"""A `glamd run` on a PostgreSQL and a NATS that are the harness's own, to break one by one.

What `glamd dev` starts as its children dies and comes back with it; here each of the three has a
life of its own, on a port that stays. `dev.json` is written beside, as far as `glam-terminal load`
reads it. Nothing is broken and nothing is judged here.
"""

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import aiohttp
import orjson

from bench.harness import PROGRAMS
from glamd.admin import migrate
from glamd.embedded.bus import EmbeddedBus
from glamd.embedded.files import write_private
from glamd.embedded.postgres import EmbeddedPostgres, free_port
from glamd.embedded.settings import WORKER
from tests.support.run_daemon import LOOPBACK, RunDaemon, Supervisor

TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 40.0
READY_POLL_S: Final = 0.005
RATE: Final = 100_000
SCOPE: Final = "credits:write credits:read"
BDK: Final = "0123456789ABCDEFFEDCBA9876543210"
KEY_SET: Final = "fault-aes"
_GRANT: Final = {
    "name": WORKER,
    "purposes": ["settlement"],
    "fields": ["pan", "expiry"],
    "merchants": "*",
    "rate_per_s": RATE,
}


@dataclass(slots=True, kw_only=True)
class FaultSite:
    """The three of them, running; `postgres` is None where the database is somebody else's."""

    folder: Path
    daemon: RunDaemon
    bus: EmbeddedBus
    database_url: str
    nats_url: str
    http_url: str
    mqtt_port: int
    worker_port: int
    postgres: EmbeddedPostgres | None = None
    merchants: tuple[str, ...] = ()
    _supervisor: Supervisor | None = field(default=None, repr=False)

    async def start(self) -> float:
        """Start the daemon and return the seconds until it was ready."""
        return await asyncio.to_thread(self._start)

    def _start(self) -> float:
        assert self._supervisor is not None
        self._supervisor.forget()
        began_s = time.monotonic()
        self.daemon.launch(self._supervisor)
        while "READY=1" not in self._supervisor.said:
            if self.daemon.process.poll() is not None:
                status, said = self.daemon.ended()
                last = (self.daemon.directory / "out").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"glamd run ended with {status}: {said}{last}")
            if time.monotonic() - began_s > TIMEOUT_S:
                raise TimeoutError("glamd run does not get ready")
            time.sleep(READY_POLL_S)
        return time.monotonic() - began_s

    async def kill9(self) -> None:
        """Kill the daemon as nothing can prepare for."""
        await asyncio.to_thread(self.daemon.close)

    async def stop(self) -> None:
        """End the daemon as systemd does, or, where it does not end so, as the harness can."""
        process = getattr(self.daemon, "process", None)
        if process is not None:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(process.communicate, timeout=STOP_TIMEOUT_S)
            await asyncio.to_thread(self.daemon.close)

    async def glamctl(self, *words: str) -> Any:
        """The answer of a command, which is done."""
        return orjson.loads(await self.command(*words))

    async def command(self, *words: str) -> str:
        """What a command prints, whatever its status."""
        done = await asyncio.to_thread(self._run, words)
        if not done.stdout:
            raise RuntimeError(f"glamctl {' '.join(words)}: {done.stderr}")
        return done.stdout

    def _run(self, words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        socket = str(self.daemon.directory / "admin.sock")
        command = [str(PROGRAMS / "glamctl"), "--socket", socket, "--json", *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

    async def admin(self, path: str, body: Mapping[str, object] | None = None) -> Any:
        """The admin socket's own answer, without a process for each question."""
        connector = aiohttp.UnixConnector(str(self.daemon.directory / "admin.sock"))
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with (
            aiohttp.ClientSession("http://glamd", connector=connector, timeout=timeout) as session,
            session.request("GET" if body is None else "POST", path, json=body) as answer,
        ):
            content = orjson.loads(await answer.read())
            if answer.status >= 400:
                raise RuntimeError(f"{path}: {answer.status} {content}")
            return content

    async def lag(self) -> tuple[int, int]:
        """Rows that wait in the outboxes; events that wait, or are unfinished, at the consumers.

        RuntimeError while that is not known, since NATS is away or the database.
        """
        found = await self.admin("/v1/events/lag")
        if found["trouble"] is not None:
            raise RuntimeError(found["trouble"])
        return (
            sum(each["rows"] for each in found["outboxes"]),
            sum(each["waiting"] + each["unfinished"] for each in found["consumers"]),
        )

    @property
    def jwt(self) -> str:
        """An internal service's."""
        return self.daemon.mint.internal(service="fault-load", scope=SCOPE)

    def crashes(self) -> tuple[str, ...]:
        """Log lines of what must not happen, whatever else does: something of ours broke."""
        found = []
        for line in (self.daemon.directory / "out").read_bytes().splitlines():
            # A kill may cut a line short, and the next life writes on behind it.
            with suppress(orjson.JSONDecodeError):
                told = orjson.loads(line)
                if "exception" in told or str(told["event"]).endswith("_crashed"):
                    found.append(f"{told['event']}: {str(told.get('exception', ''))[-200:]}")
        return tuple(found)

    async def make_merchants(self, count: int) -> None:
        """Merchants with their accounts, by the same route that `glamctl merchant create` takes."""
        made = []
        for number in range(count):
            merchant = str(uuid4())
            body = {
                "platform": "custom",
                "shop_id": merchant,
                "domain": f"shop-{number}.example",
                "merchant_id": merchant,
            }
            await self.admin("/v1/merchants", body)
            made.append(merchant)
        self.merchants = tuple(made)

    async def make_terminals_possible(self) -> None:
        """A key set, a device of it, and the `dev.json` by which a load enrols its terminals."""
        out = self.folder / "pattern"
        await self.command("keys", "import-bdk", KEY_SET, "--scheme", "aes-dukpt", "--clear", BDK)
        await self.command(
            *("device", "enroll", "--merchant", self.merchants[0], "--key-set", KEY_SET),
            *("--ksn", f"{uuid4().hex[:16]}00000000", "--export-initial-key", "--out", str(out)),
        )
        device = orjson.loads((out / "device.json").read_bytes())
        for name in ("cert", "key", "ca"):
            device[name] = str(out / device[name])
        server_ca = self.daemon.certificates.server_ca.certificate_file
        document = {
            "admin": {"socket": str(self.daemon.directory / "admin.sock")},
            "mqtt": {"host": LOOPBACK, "port": self.mqtt_port, "ca": str(server_ca)},
            "merchant_id": self.merchants[0],
            "devices": [device],
        }
        write_private(self.daemon.directory / "dev.json", orjson.dumps(document))


@asynccontextmanager
async def fault_site(
    folder: Path,
    *,
    merchants: int,
    database_url: str | None = None,
    terminals: bool = False,
    seen_by_daemon: str | None = None,
) -> AsyncIterator[FaultSite]:
    """Start all three in `folder`, whose `state` may have its certificates already.

    With `database_url`, of a migrated database, no PostgreSQL is started. `seen_by_daemon` is the
    database's URL for the daemon, where something stands between the two.
    """
    async with AsyncExitStack() as stack:
        postgres: EmbeddedPostgres | None = None
        if database_url is None:
            postgres = EmbeddedPostgres(folder / "database")
            stack.push_async_callback(postgres.stop)
            database_url = (await postgres.start()).app
            await migrate.upgrade(database_url)
        bus = EmbeddedBus(folder / "bus")
        stack.push_async_callback(bus.stop)
        nats_url = (await bus.start()).url
        state = folder / "state"
        state.mkdir(exist_ok=True)
        http_port, mqtt_port, worker_port = free_port(), free_port(), free_port()
        rates = {"rate_limit_per_s": RATE, "rate_burst": RATE}
        daemon = RunDaemon(
            state,
            seen_by_daemon or database_url,
            changes={
                "http": {"port": http_port, **rates},
                "mqtt": {"port": mqtt_port, **rates},
                "worker": {"port": worker_port, "grants": orjson.dumps([_GRANT]).decode()},
                "events": {"servers": [nats_url]},
            },
        )
        site = FaultSite(
            folder=folder,
            daemon=daemon,
            bus=bus,
            postgres=postgres,
            database_url=database_url,
            nats_url=nats_url,
            http_url=f"http://{LOOPBACK}:{http_port}",
            mqtt_port=mqtt_port,
            worker_port=worker_port,
            _supervisor=stack.enter_context(closing(Supervisor(state))),
        )
        stack.push_async_callback(site.stop)
        await site.start()
        await site.make_merchants(merchants)
        if terminals:
            await site.make_terminals_possible()
        yield site
