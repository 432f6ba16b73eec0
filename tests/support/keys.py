"""Keyrings for tests that need a data key and are about something else; an audit of keys."""

from pathlib import Path

from glamd.clock import Clock
from glamd.db import Database
from glamd.keys.keyrings import Keyrings
from glamd.keys.providers.interface import Providers
from glamd.keys.providers.local import LocalProvider, create_kek_file


def local_provider(directory: Path) -> Providers:
    """The provider of a KEK file in this directory, made when it is not there."""
    path = directory / "kek"
    create_kek_file(path)
    return Providers(LocalProvider(path))


async def load_keyrings(database: Database, directory: Path, clock: Clock) -> Keyrings:
    """All keyrings, made at the first call on this database."""
    return await Keyrings.load(database, local_provider(directory), clock, "v1")


class Recorded:
    """Stands in for the audit: keeps what was recorded, or fails as it was told to."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []
        self.error: Exception | None = None

    async def __call__(self, *, action: str, subject: str, actor: str, outcome: str) -> None:
        """Keep it, unless `error` is set."""
        if self.error is not None:
            raise self.error
        self.rows.append((action, subject, actor, outcome))

    def rewraps(self) -> list[tuple[str, str]]:
        """What came of each key that was rewrapped."""
        return [(subject, out) for action, subject, _, out in self.rows if action == "keys.rewrap"]
