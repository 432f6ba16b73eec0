"""A connection with a shop, as the database would give it."""

from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID

import pytest

from glamd.credentials.model import ShopConnection

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


@pytest.fixture
def connection() -> Callable[[str, str], ShopConnection]:
    """Make a connection with this domain and shop id."""

    def make(domain: str, shop_id: str) -> ShopConnection:
        return ShopConnection(
            token_id=UUID(int=1),
            merchant_id=UUID(int=2),
            platform="shopify",
            platform_shop_id=shop_id,
            domain=domain,
            token_type="oauth",
            scopes=(),
            key_version="v1",
            expires_at=NOW,
            refreshable=True,
            generation=1,
            refresh_failures=0,
            refresh_error=None,
            refresh_not_before=None,
            refreshed_at=None,
            created_at=NOW,
            updated_at=NOW,
            last_accessed_by=None,
            last_accessed_at=None,
            access_count=0,
        )

    return make
