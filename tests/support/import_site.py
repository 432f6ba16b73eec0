"""A daemon that takes an import, an older table to import from, and glamctl between the two."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
from click.testing import Result

from glamd.credentials.importing.service import Importer, OlderBatch, Progress
from glamd.credentials.model import Accessor
from glamd.credentials.service import PlatformTokens
from glamd.db import Database
from glamd.errors import UnavailableError
from tests.support.admin_world import AdminWorld

GLAMCTL = Path(sys.executable).with_name("glamctl")
LONG_S = 30.0
COLUMNS = {
    "access_count": "integer",
    "expires_at": "timestamptz",
    "last_accessed_at": "timestamp",
    "created_at": "timestamptz",
    "updated_at": "timestamp",
}


class Gate:
    """An importer before which batches can be held up, or broken off after they were taken."""

    def __init__(self, importer: Importer) -> None:
        self._importer = importer
        self.sizes: list[int] = []
        self.hold_at: int | None = None
        self.held = asyncio.Event()
        self.go_on = asyncio.Event()
        self.lose_answer_at: int | None = None

    async def progress(self) -> Progress:
        """The importer's."""
        return await self._importer.progress()

    async def take(self, batch: OlderBatch, *, accessor: Accessor) -> Progress:
        """The importer's, and what a test wants to go wrong."""
        self.sizes.append(len(batch.rows))
        if len(self.sizes) == self.hold_at:
            self.held.set()
            await self.go_on.wait()
        taken = await self._importer.take(batch, accessor=accessor)
        if len(self.sizes) == self.lose_answer_at:
            raise UnavailableError("The answer is lost.")
        return taken


@dataclass(slots=True)
class Site:
    """A daemon's admin socket, its database, and the older service's one."""

    admin: AdminWorld
    database: Database
    older_url: str
    gate: Gate
    vault: PlatformTokens

    async def run(self, *args: str | Path) -> Result:
        """`glamctl credentials import …` to its end, in this process for speed."""
        words = [str(arg) for arg in args]
        if not any(word.startswith("--from") for word in words):
            words += ["--from-url", self.older_url]
        async with asyncio.timeout(LONG_S):
            return await self.admin.glamctl("credentials", "import", *words)

    async def start(self, *args: str | Path) -> asyncio.subprocess.Process:
        """The same as a process without a terminal, with the URL in its environment."""
        return await asyncio.create_subprocess_exec(
            *self.command(*args),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "GLAMD_IMPORT_URL": self.older_url},
        )

    def command(self, *args: str | Path) -> Sequence[str]:
        """The words of the command."""
        words = (GLAMCTL, "--socket", self.admin.path, "credentials", "import", *args)
        return [str(word) for word in words]

    async def taken(self) -> set[object]:
        """The ids of all tokens here."""
        rows = await self.database.fetch("SELECT token_id FROM glam.platform_tokens")
        return {row["token_id"] for row in rows}


async def fill(site: Site, *rows: dict[str, Any], table: str = "platform_tokens") -> None:
    """Put rows into the older table, by its own columns."""
    names = tuple(rows[0])
    values = ", ".join(
        f"${place}::text::{COLUMNS.get(name, 'text')}" for place, name in enumerate(names, 1)
    )
    connection = await asyncpg.connect(site.older_url, timeout=LONG_S)
    try:
        await connection.executemany(
            f"INSERT INTO {table} ({', '.join(names)}) VALUES ({values})",
            [tuple(one[name] for name in names) for one in rows],
        )
    finally:
        await connection.close(timeout=LONG_S)
