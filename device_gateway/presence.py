"""Presence: which devices are connected to this node, told to the database within a second.

The endpoint says who came and who went; a writer notes it in batches, so that a thousand terminals
that come back at once cost a few statements. What could not be written is written later: the newest
word about a device wins. Broker mode's heartbeats will feed the same file.
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
                    await store.forget_node(self._database, self._node_id)
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
                async with self._database.transaction() as connection:
                    await store.write_presence(
                        connection,
                        node_id=self._node_id,
                        at=self._clock.now(),
                        arrived=[device for device, online in batch.items() if online],
                        left=[device for device, online in batch.items() if not online],
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
