"""Keyrings for tests that need a data key and are about something else."""

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
