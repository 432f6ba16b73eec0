"""A token of SoftHSM2, and a KMS (moto) over real HTTP, for the tests of key providers."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aioboto3
import pytest

from glamd.keys.providers.pkcs11 import Pkcs11Provider
from tests.support.kms import MotoKms, dummy_credentials
from tests.support.softhsm import MODULE, PACKAGE, SoftHsm


@pytest.fixture(scope="session")
def softhsm(
    debian_program: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> SoftHsm:
    """The session's token."""
    debian_program(str(MODULE), PACKAGE)
    return SoftHsm(tmp_path_factory.mktemp("softhsm"))


@pytest.fixture
async def hsm_provider(softhsm: SoftHsm) -> AsyncIterator[Pkcs11Provider]:
    """A provider on that token, with a KEK."""
    provider = Pkcs11Provider(softhsm.address, kek_label="glamd-kek")
    await provider.create_kek()
    yield provider
    await provider.close()


@pytest.fixture(scope="session")
def moto_kms() -> Iterator[MotoKms]:
    """The session's KMS."""
    server = MotoKms()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def aws_session() -> aioboto3.Session:
    """One session of the SDK, since each reads some megabytes of AWS's descriptions anew."""
    return aioboto3.Session()


@pytest.fixture
def aws_environment(monkeypatch: pytest.MonkeyPatch, aws_session: aioboto3.Session) -> None:
    """Credentials that are none, and nothing of this machine's own AWS settings."""
    dummy_credentials(monkeypatch)
    monkeypatch.setattr(aioboto3, "Session", lambda: aws_session)
