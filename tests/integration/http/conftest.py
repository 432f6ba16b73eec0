"""Fixtures of the HTTP tests: a world, a running api listener, an authority for certificates."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.http_certificates import Authority
from tests.support.http_fakes import Wire, connected
from tests.support.http_world import World


@pytest.fixture
def world() -> World:
    """A fresh world."""
    return World()


@pytest.fixture
async def api(world: World) -> AsyncIterator[int]:
    """The port of an api listener in that world; change the world's limits before using it."""
    async with world.api() as port:
        yield port


@pytest.fixture
async def wire(api: int) -> AsyncIterator[Wire]:
    """A connection to the api listener."""
    async with connected(api) as wire:
        yield wire


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """A CA of the test's own."""
    return Authority(tmp_path, "ca")
