"""A daemon under siege: a good terminal that taps on meanwhile, and what must be as it was after.

A test says what the hostile crowd does; the siege says whether anybody else noticed.
"""

import asyncio
import gc
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from device_gateway.mqtt.codec import Version
from device_gateway.terminal import Answer, Terminal
from device_gateway.terminal_card import CardReader, clear_form
from device_gateway.terminal_device import Counters, Device
from glamd.embedded.settings import LOOPBACK
from tests.support.looks import CARD, look
from tests.support.mqtt_site import Client
from tests.support.postgres import eventually
from tests.support.site import ANSWER_TIMEOUT_S, VISA, Site, running_site

PACE_S: Final = 0.01
"""How long the good customer pauses between two taps; nothing is awaited by this."""

COUNTER_BLOCK: Final = 10_000
POOL_SIZE: Final = 8
"""Connections of the daemon's database pool: `database.pool_size`, which no test here changes."""
NO_TOKEN: Final = "ptk_" + "0" * 26

_WAITING: Final = """
SELECT count(*) FROM pg_stat_activity
 WHERE datname = current_database() AND wait_event_type = 'Lock'
"""

TELLTALES: Final = (
    *("Traceback", "never retrieved", "never awaited", "was destroyed but it is pending"),
    *("crashed", "task_ended", "unexpected", "http_handler_failed", "http_internal_error"),
    *("mqtt_admission_failed", "mqtt_gateway_failed", "mqtt_request_failed", "mqtt_will_failed"),
    *("[error", "[critical"),
)
"""What no hostile client may make the daemon write."""


class Steady:
    """One terminal on which one card after the other is tapped."""

    def __init__(self, terminal: Terminal, source: CardReader) -> None:
        self._terminal = terminal
        self._source = source
        self._stop = asyncio.Event()
        self.asked = 0
        self.answers: list[Answer] = []

    async def run(self) -> None:
        """Tap until `finish`."""
        clear = clear_form(CARD, "track2")
        while not self._stop.is_set():
            self.asked += 1
            request_id = f"steady-{self.asked}"
            payload = self._source.request(request_id, clear, "track2")
            self.answers.append(
                await self._terminal.ask(request_id, payload, timeout_s=ANSWER_TIMEOUT_S)
            )
            with suppress(TimeoutError):
                async with asyncio.timeout(PACE_S):
                    await self._stop.wait()

    def finish(self) -> None:
        """Let the tap under way be the last one."""
        self._stop.set()

    async def goes_on(self, taps: int = 5) -> None:
        """Return when so many more taps were answered; all that were asked are tokens."""
        wanted = len(self.answers) + taps

        async def served() -> bool:
            return len(self.answers) >= wanted

        await eventually(served, timeout_s=ANSWER_TIMEOUT_S)
        assert Counter(answer.code for answer in self.answers) == {"ok": len(self.answers)}


class Siege:
    """The daemon, its good terminal, and doors for those who are not."""

    def __init__(self, site: Site, good: Steady, device: Device) -> None:
        self.site = site
        self.good = good
        self.good_device = device
        self._writers: list[asyncio.StreamWriter] = []

    async def knock(
        self, port: int, first: bytes = b"", *, tls: ssl.SSLContext | None = None
    ) -> asyncio.StreamReader:
        """Connect and send `first`; the connection stays until the end, if the other side lets it.

        Whoever is refused in the handshake gets a reader that has ended.
        """
        try:
            reader, writer = await asyncio.open_connection(LOOPBACK, port, ssl=tls)
        except (ssl.SSLError, ConnectionError):
            ended = asyncio.StreamReader()
            ended.feed_eof()
            return ended
        self._writers.append(writer)
        writer.write(first)
        return reader

    async def crowd(
        self, port: int, size: int, first: bytes = b"", *, tls: ssl.SSLContext | None = None
    ) -> list[asyncio.StreamReader]:
        """So many who knock at once."""
        return list(await asyncio.gather(*(self.knock(port, first, tls=tls) for _ in range(size))))

    async def client(self, device: Device, version: Version = Version.V5) -> Client:
        """A device with a certificate of ours, connected, that will say whatever a test wants."""
        reader, writer = await asyncio.open_connection(
            LOOPBACK, self.site.daemon.mqtt_port, ssl=device.tls()
        )
        self._writers.append(writer)
        client = Client(device.device_id, reader, writer)
        assert (await client.connect(version)).reason_code == 0
        return client

    def leave(self) -> None:
        """End all that knocked and are still there."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


async def ended(readers: list[asyncio.StreamReader]) -> None:
    """Return when the other side has closed every one of them."""
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        for reader in readers:
            with suppress(ConnectionError, ssl.SSLError):
                while await reader.read(65_536):
                    pass


def held() -> tuple[int, int]:
    """How many descriptors are open and how many tasks there are."""
    return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())


@asynccontextmanager
async def besieged(
    state_dir: Path,
    database_url: str,
    *,
    changes: Mapping[str, Mapping[str, object]],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> AsyncIterator[Siege]:
    """A daemon with a good terminal tapping; at the end, that nothing is lost, left or told."""
    async with running_site(state_dir, database_url, changes=changes) as site:
        device = await site.enroll()
        terminal = await site.terminal(device)
        source = CardReader(device, Counters(device, block=COUNTER_BLOCK))
        good = Steady(terminal, source)
        siege = Siege(site, good, device)
        await _warm(site)
        running = asyncio.create_task(good.run(), name="steady")
        try:
            await good.goes_on()
            descriptors, tasks = held()
            yield siege
            siege.leave()
            await good.goes_on()

            async def all_back() -> bool:
                now = held()
                return now[0] <= descriptors and now[1] <= tasks

            await eventually(all_back)
        finally:
            siege.leave()
            good.finish()
            await running
        await _nothing_lost(site, good, device)
    gc.collect()  # or a future that nobody asked would complain only after we looked
    output = capfd.readouterr()
    assert "daemon_ready" in output.out  # it is the daemon's log that is looked at
    for told in (caplog.text, output.out, output.err):
        assert VISA not in told
        assert [each for each in TELLTALES if each in told] == []


async def _warm(site: Site) -> None:
    """Open what stays open: every connection that the daemon's pool may have, and one of ours."""
    async with site.database.transaction() as holder:
        await holder.execute("LOCK TABLE cde.payment_tokens IN ACCESS EXCLUSIVE MODE")
        asked = [asyncio.create_task(_listed(site)) for _ in range(POOL_SIZE)]

        async def all_wait() -> bool:
            return bool(await site.database.fetchval(_WAITING) == POOL_SIZE)

        await eventually(all_wait)
    await asyncio.gather(*asked)
    async with site.worker.get("/readyz") as ready:
        assert ready.status == 200
    assert (await look(site.worker, NO_TOKEN)).status == 404


async def _listed(site: Site) -> None:
    async with site.http.get("/api/v1/payment-tokens", headers=site.client()) as reply:
        assert reply.status == 200


async def _nothing_lost(site: Site, good: Steady, device: Device) -> None:
    """Every tap has its answer, and every answer its own token in the database."""
    assert len(good.answers) == good.asked
    told = {answer.text("token") for answer in good.answers}
    assert len(told) == good.asked
    rows = await site.database.fetch(
        "SELECT token FROM cde.payment_tokens WHERE device_id = $1", device.device_id
    )
    assert {row["token"] for row in rows} == told
