"""Fixtures of the admin tests: a running admin server on a unix socket of the test's own."""

import tempfile
from collections.abc import AsyncIterator, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.support.admin_world import AdminWorld


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """What is logged; also, glamctl's output must not have the server's log in it."""
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
def admin() -> Iterator[AdminWorld]:
    """A world whose socket is not there yet.

    Its directory is a short one, for a socket's path may have at most 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="glamd-") as directory:
        yield AdminWorld(Path(directory) / "admin.sock")


@pytest.fixture
async def running(admin: AdminWorld) -> AsyncIterator[AdminWorld]:
    """The same, running."""
    async with admin.running():
        yield admin
