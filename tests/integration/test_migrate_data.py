"""Migrations over rows that an earlier release left: nothing is lost going up, nor coming down."""

import pytest

from glamd.admin import migrate
from glamd.db import Database
from tests.support.postgres import execute

FIRST_RELEASE = """
INSERT INTO glam.merchants (merchant_id, platform, shop_id, domain)
VALUES ('0192f0c0-0000-7000-8000-000000000001', 'shopify', '77', 'shop.example');
INSERT INTO cde.merchants (merchant_id, token_ttl_s)
VALUES ('0192f0c0-0000-7000-8000-000000000001', 3600);
INSERT INTO cde.encryption_keys (keyring, version, wrapped_key, provider, kcv, status)
VALUES ('payment-tokens', 'v1', '\\x01', 'local', 'A1B2C3', 'active');
INSERT INTO cde.payment_tokens
    (token, merchant_id, device_id, brand, bin, last4, exp_month, exp_year, fingerprint,
     entry_mode, card_ciphertext, key_version, created_at, expires_at)
VALUES ('ptk_00000000000000000000000000', '0192f0c0-0000-7000-8000-000000000001', 'dev_1', 'visa',
        '42424242', '4242', 12, 2049, '\\x02', 'chip', '\\x03', 'v1', now(), now() + '1 day');
INSERT INTO cde.outbox (subject, merchant_id, correlation_id, data)
VALUES ('evt.payment.token.created.v1', '0192f0c0-0000-7000-8000-000000000001', 'c', '{}');
"""

SECRET = """
SELECT to_jsonb(s) FROM cde.token_secrets s
WHERE tableoid::regclass::text LIKE 'cde.token\\_secrets\\_20%'
"""
MOVED = ("card_ciphertext", "sensitive_ciphertext", "key_version")
"""Columns of a token that have a table of their own since the vault's release."""

ROWS = """
SELECT (SELECT to_jsonb(m) FROM glam.merchants m) AS merchant,
       (SELECT to_jsonb(m) FROM cde.merchants m) AS card_merchant,
       (SELECT to_jsonb(k) FROM cde.encryption_keys k) AS key,
       (SELECT to_jsonb(t) FROM cde.payment_tokens t) AS token,
       (SELECT to_jsonb(o) FROM cde.outbox o) AS event
"""

OPENED = """
SELECT balance, platform_domain, purchase_count
FROM glam.credit_accounts JOIN glam.billing_records USING (merchant_id)
"""


async def rows(url: str) -> dict[str, dict[str, object]]:
    database = await Database.connect(url, pool_size=1)
    try:
        row = await database.fetchrow(ROWS)
    finally:
        await database.close()
    assert row is not None
    return dict(row)


async def fetchrow(url: str, sql: str) -> tuple[object, ...]:
    database = await Database.connect(url, pool_size=1)
    try:
        row = await database.fetchrow(sql)
    finally:
        await database.close()
    return tuple(row or ())


@pytest.mark.parametrize("release", ["0001", "0002", "0003"])
async def test_the_rows_of_each_release_stand_after_going_up_and_coming_down(
    empty_database_url: str, release: str
) -> None:
    url = empty_database_url
    await migrate.upgrade(url, revision=release)
    await execute(url, FIRST_RELEASE)
    before = await rows(url)
    assert all(before.values())

    await migrate.upgrade(url)
    after = await rows(url)
    [secret] = await fetchrow(url, SECRET)
    assert isinstance(secret, dict)
    after["token"] |= secret
    for name, row in after.items():
        assert before[name].items() <= row.items(), "columns may come, what was there stays"
    if release < "0003":
        opened = await fetchrow(url, OPENED)
        assert opened == (0, "shop.example", 0), "and can be billed from now on"

    await migrate.downgrade(url, revision=release)
    assert await rows(url) == before


async def test_what_is_sealed_of_tokens_that_have_ended_does_not_come_along(
    empty_database_url: str,
) -> None:
    url = empty_database_url
    await migrate.upgrade(url, revision="0003")
    await execute(url, FIRST_RELEASE + "UPDATE cde.payment_tokens SET expires_at = now()")
    before = (await rows(url))["token"]
    await migrate.upgrade(url)
    assert await fetchrow(url, SECRET) == ()
    after = (await rows(url))["token"]
    assert {name: value for name, value in before.items() if name not in MOVED}.items() <= (
        after.items()
    )
    await migrate.downgrade(url, revision="0003")
    assert (await rows(url))["token"] == before | {"card_ciphertext": None, "key_version": ""}


async def test_a_token_that_lives_longer_than_days_are_made_for_keeps_what_is_sealed(
    empty_database_url: str,
) -> None:
    url = empty_database_url
    await migrate.upgrade(url, revision="0003")
    later = "UPDATE cde.payment_tokens SET expires_at = now() + interval '300 days'"
    await execute(url, FIRST_RELEASE + later)
    before = await rows(url)
    await migrate.upgrade(url)
    found = await fetchrow(url, "SELECT card_ciphertext, key_version FROM cde.token_secrets_other")
    assert found == (b"\x03", "v1")
    await migrate.downgrade(url, revision="0003")
    assert await rows(url) == before
