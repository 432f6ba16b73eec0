"""Fixtures of data keys: a database without any, a provider, and a node that has them."""

from pathlib import Path

import pytest

from glamd.db import Database
from glamd.keys.providers.interface import Providers
from tests.support.keys import local_provider
from tests.support.postgres import execute
from tests.support.sealed_rows import Node, start_node


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests of a module, without keys and tokens: cheaper than one each."""
    await execute(
        module_database_url,
        "DELETE FROM cde.encryption_keys; DELETE FROM cde.reencryptions; DELETE FROM cde.key_sets;"
        " DELETE FROM cde.payment_tokens; TRUNCATE cde.token_secrets",
    )
    return module_database_url


@pytest.fixture
def providers(tmp_path: Path) -> Providers:
    """The key provider of this test's database."""
    return local_provider(tmp_path)


@pytest.fixture
async def node(database: Database, providers: Providers) -> Node:
    """A node that is not started to work by itself."""
    return await start_node(database, providers)
