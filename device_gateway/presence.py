"""Presence: which devices are connected to this node, told to the database within a second.

The endpoint says who came and who went; a writer notes it in batches, so that a thousand terminals
that come back at once cost a few statements. What could not be written is written later: the newest
word about a device wins. Broker mode's heartbeats will feed the same file.

The events `evt.device.online.v1` and `.offline.v1` are written by the statement that changes the
row, and only where it changes: so a device's events alternate, whatever died in between. Whoever
was gone for less than a batch, or has moved to another node, was not away. After a crash of the
daemon all that it had are told as offline at its next start, and as online when they are back.
"""

import asyncio
from typing import Final

import structlog
from prometheus_client import Gauge

from device_gateway import store
from glamd.clock import Clock
from glamd.db import Database
from glamd.errors import TransientError

WRITE_INTERVAL_S: Final = 0.2
RETRY_INTERVAL_S: Final = 0.5
BATCH_LIMIT: Final = 1000

log = structlog.get_logger()
_ONLINE = Gauge("glamd_gateway_online_devices", "Devices connected to this node.")


class Presence:
    """Who is online here."""

    def __init__(self, database: Database, *, node_id: str, clock: Clock) -> None:
        self._database = database
        self._node_id = node_id
        self._clock = clock
        self._online: set[str] = set()
        self._unwritten: dict[str, bool] = {}
        self._dirty = asyncio.Event()
        _ONLINE.set_function(lambda: len(self._online))

    def arrived(self, device_id: str) -> None:
        """The device is connected."""
        self._online.add(device_id)
        self._note(device_id, True)

    def left(self, device_id: str) -> None:
        """The device's connection has ended, whatever the reason."""
        self._online.discard(device_id)
        self._note(device_id, False)

    async def run(self) -> None:
        """Write changes until cancelled; forgets first what an earlier life of this node had."""
        forgotten = False
        while True:
            try:
                if not forgotten:
                    await store.forget_node(self._database, self._node_id, self._clock.now())
                    forgotten = True
                    self._unwritten |= dict.fromkeys(self._online, True)
                await self._dirty.wait()
                await self.flush()
                await asyncio.sleep(WRITE_INTERVAL_S)
            except TransientError as error:
                log.warning("presence_unwritten", code=error.code, devices=len(self._unwritten))
                await asyncio.sleep(RETRY_INTERVAL_S)

    async def flush(self) -> None:
        """Write what is not written yet; what fails stays for the next time."""
        self._dirty.clear()
        while self._unwritten:
            batch = dict(list(self._unwritten.items())[:BATCH_LIMIT])
            try:
                await store.write_presence(
                    self._database, batch, node_id=self._node_id, at=self._clock.now()
                )
            except TransientError:
                self._dirty.set()
                raise
            for device_id, online in batch.items():
                if self._unwritten.get(device_id) is online:
                    del self._unwritten[device_id]

    def _note(self, device_id: str, online: bool) -> None:
        self._unwritten[device_id] = online
        self._dirty.set()
