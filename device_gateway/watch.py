"""The watch: what any node did to a device takes effect here within seconds.

It asks the database at a steady beat which devices' status was set since the last look, drops what
their sessions remember, and cuts off those that were revoked. The beat looks a little further back
than the last one, since a change is stamped before it commits.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final

import structlog

from device_gateway import store
from device_gateway.model import DeviceStatus
from glamd.db import Connection, Database
from glamd.errors import TransientError

OVERLAP: Final = timedelta(seconds=30)
"""How long after its stamp a change may still commit and be seen."""

LOOK_TIMEOUT_S: Final = 1.0

Changed = Callable[[str, DeviceStatus], Awaitable[None]]

log = structlog.get_logger()


class StatusWatch:
    """Follows the devices' status column and reports each change once."""

    def __init__(self, database: Database, *, interval_s: float, changed: Changed) -> None:
        self._database = database
        self._interval_s = interval_s
        self._changed = changed
        self._reported: dict[str, datetime] = {}
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
        for device_id, status, at in changes:
            if self._reported.get(device_id) != at:
                self._reported[device_id] = at
                await self._changed(device_id, status)
            self._since = max(self._since, at)
        horizon = self._since - OVERLAP
        self._reported = {key: at for key, at in self._reported.items() if at > horizon}
