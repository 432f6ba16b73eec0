"""Migrations over rows that an earlier release left: nothing is lost going up, nor coming down."""

from glamd.admin import migrate
from glamd.db import Database

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
        '42424242', '4242', 12, 2049, '\\x02', 'chip', '\\x03', 'v1', now(), now());
INSERT INTO cde.outbox (subject, merchant_id, correlation_id, data)
VALUES ('evt.payment.token.created.v1', '0192f0c0-0000-7000-8000-000000000001', 'c', '{}');
"""

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


async def test_the_rows_of_the_first_release_stand_after_going_up_and_coming_down(
    empty_database_url: str,
) -> None:
    await migrate.upgrade(empty_database_url, revision="0001")
    database = await Database.connect(empty_database_url, pool_size=1)
    try:
        async with database.transaction() as connection:
            for statement in FIRST_RELEASE.split(";\n"):
                if statement.strip():
                    await connection.execute(statement)
    finally:
        await database.close()
    before = await rows(empty_database_url)
    assert all(before.values())

    await migrate.upgrade(empty_database_url)
    for name, row in (await rows(empty_database_url)).items():
        assert before[name].items() <= row.items(), "columns may come, what was there stays"
    database = await Database.connect(empty_database_url, pool_size=1)
    try:
        opened = await database.fetchrow(OPENED)
    finally:
        await database.close()
    assert tuple(opened or ()) == (0, "shop.example", 0), "and can be billed from now on"

    await migrate.downgrade(empty_database_url, revision="0001")
    assert await rows(empty_database_url) == before
