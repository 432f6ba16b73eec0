"""One certificate authority for all tests of the endpoint; sites are made by each test."""

import pytest

from tests.support.mqtt_tls import Authority


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA of the devices and of the endpoint."""
    return Authority(tmp_path_factory.mktemp("mqtt-ca"))
