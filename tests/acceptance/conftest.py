"""A running daemon for each acceptance test, on a database of its own."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from glamd.clock import SystemClock
from glamd.embedded.certificates import DevelopmentCertificates
from tests.support.site import Site, running_site


@pytest.fixture(scope="session")
def certificates_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with authorities and a server certificate, to copy from."""
    state_dir = tmp_path_factory.mktemp("certificates")
    DevelopmentCertificates(state_dir, SystemClock()).server()
    return state_dir


@pytest.fixture
def state_dir(certificates_dir: Path, tmp_path: Path) -> Path:
    """A fresh state directory that has its certificates already."""
    made = tmp_path / "state"
    shutil.copytree(certificates_dir, made)
    return made


@pytest.fixture
async def site(state_dir: Path, database_url: str) -> AsyncIterator[Site]:
    """A daemon that runs, with a merchant and a TDES and an AES key set."""
    async with running_site(state_dir, database_url) as running:
        yield running
