"""The watch: what any node did to a device takes effect here within seconds.

It asks the database at a steady beat which devices were changed and which key sets were retired
since the last look, and tells of each device once: what its session remembers is dropped, and a
connection that it may not have any more is cut. The beat looks a little further back than the last
one, since a change is stamped before it commits.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final

import structlog

from device_gateway import store
from device_gateway.model import DeviceChange
from glamd.db import Connection, Database
from glamd.errors import TransientError

OVERLAP: Final = timedelta(seconds=30)
"""How long after its stamp a change may still commit and be seen."""

LOOK_TIMEOUT_S: Final = 1.0
PAGE: Final = 1000
"""Devices of a retired key set that are read at once."""

Changed = Callable[[DeviceChange], Awaitable[None]]

log = structlog.get_logger()


class StatusWatch:
    """Follows the devices' rows and their key sets', and reports each change once."""

    def __init__(self, database: Database, *, interval_s: float, changed: Changed) -> None:
        self._database = database
        self._interval_s = interval_s
        self._changed = changed
        self._reported: dict[str, datetime] = {}
        self._retired: set[str] = set()
        self._since: datetime | None = None

    async def run(self) -> None:
        """Look at every beat until cancelled."""
        # A connection of its own, given up quickly: what is wrong with the pool or with one server
        # process must not keep a revoked terminal connected.
        async with self._database.dedicated() as connection:
            while True:
                try:
                    await self._look(connection)
                except TransientError as error:
                    log.warning("device_watch_blind", code=error.code)
                await asyncio.sleep(self._interval_s)

    async def _look(self, connection: Connection) -> None:
        if self._since is None:
            self._since = await store.database_now(connection, timeout_s=LOOK_TIMEOUT_S)
        changes = await store.changed_since(
            connection, self._since - OVERLAP, timeout_s=LOOK_TIMEOUT_S
        )
        for change, at in changes:
            if self._reported.get(change.device_id) != at:
                self._reported[change.device_id] = at
                await self._changed(change)
            self._since = max(self._since, at)
        for key_set in await store.retired_since(
            connection, self._since - OVERLAP, timeout_s=LOOK_TIMEOUT_S
        ):
            if key_set not in self._retired:
                await self._report_devices_of(connection, key_set)
                self._retired.add(key_set)
        horizon = self._since - OVERLAP
        self._reported = {key: at for key, at in self._reported.items() if at > horizon}

    async def _report_devices_of(self, connection: Connection, key_set: str) -> None:
        after = ""
        while found := await store.devices_of(
            connection, key_set, after=after, limit=PAGE, timeout_s=LOOK_TIMEOUT_S
        ):
            for change in found:
                await self._changed(change)
            after = found[-1].device_id
        log.info("key_set_retired", key_set=key_set)
