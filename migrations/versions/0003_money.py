"""Merchants' money: credit accounts, billing, and the events in and out of both schemas.

Room is left for holds, reversals and credits that expire: each is a further operation and further
columns, none a change of what stands here.

Revision ID: 0003
Revises: 0002
"""

from migrations import support

revision = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None

_OUTBOX = """
ALTER TABLE {schema}.outbox ADD COLUMN event_id uuid NOT NULL DEFAULT gen_random_uuid();
ALTER TABLE {schema}.outbox ADD COLUMN published_at timestamptz;
CREATE INDEX outbox_unpublished ON {schema}.outbox (id) WHERE published_at IS NULL;
CREATE INDEX outbox_published ON {schema}.outbox (published_at) WHERE published_at IS NOT NULL;
COMMENT ON COLUMN {schema}.outbox.published_at IS
    'null: still to be sent. No position is kept, so a row that commits late is not passed over';
ALTER TABLE {schema}.outbox SET (autovacuum_vacuum_scale_factor = 0.01);
"""

_NO_OUTBOX = """
ALTER TABLE {schema}.outbox RESET (autovacuum_vacuum_scale_factor);
DROP INDEX {schema}.outbox_published;
DROP INDEX {schema}.outbox_unpublished;
ALTER TABLE {schema}.outbox DROP COLUMN published_at;
ALTER TABLE {schema}.outbox DROP COLUMN event_id;
"""

# All rows that are there get the default without being written; then it is taken back from those
# that live, so that the tokens of years are not announced one by one.
UPGRADE_CDE = (
    _OUTBOX.format(schema="cde")
    + """
ALTER TABLE cde.payment_tokens ADD COLUMN expired_at timestamptz DEFAULT now();
ALTER TABLE cde.payment_tokens ALTER COLUMN expired_at DROP DEFAULT;
UPDATE cde.payment_tokens SET expired_at = NULL WHERE expires_at > now();
COMMENT ON COLUMN cde.payment_tokens.expired_at IS
    'when its end was announced; that it has ended is for expires_at to say';
CREATE INDEX payment_tokens_to_expire ON cde.payment_tokens (expires_at)
    WHERE status = 'active' AND expired_at IS NULL;
"""
)
DOWNGRADE_CDE = """
DROP INDEX cde.payment_tokens_to_expire;
ALTER TABLE cde.payment_tokens DROP COLUMN expired_at;
""" + _NO_OUTBOX.format(schema="cde")

_FOR_MERCHANTS = """
INSERT INTO glam.billing_records (merchant_id, created_at) SELECT merchant_id, now()
FROM glam.merchants;
INSERT INTO glam.credit_accounts (
    merchant_id, platform_name, platform_id, platform_domain, created_at, updated_at)
SELECT merchant_id, platform, shop_id, domain, now(), now() FROM glam.merchants;
"""

UPGRADE_GLAM = (
    """
CREATE TABLE glam.outbox (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    subject         text NOT NULL,
    merchant_id     uuid NOT NULL,
    correlation_id  text NOT NULL,
    data            jsonb NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now()
);
"""
    + _OUTBOX.format(schema="glam")
    + """
CREATE TABLE glam.dead_letters (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    subject       text NOT NULL,
    event_id      text,
    payload       bytea NOT NULL,
    headers       jsonb NOT NULL,
    reason        text NOT NULL,
    attempts      integer NOT NULL CHECK (attempts > 0),
    received_at   timestamptz NOT NULL,
    replayed_at   timestamptz,
    resolved_at   timestamptz
);
CREATE INDEX dead_letters_open ON glam.dead_letters (id) WHERE resolved_at IS NULL;
CREATE INDEX dead_letters_resolved ON glam.dead_letters (resolved_at)
    WHERE resolved_at IS NOT NULL;

CREATE TABLE glam.credit_accounts (
    merchant_id        uuid PRIMARY KEY,
    platform_name      text NOT NULL,
    platform_id        text NOT NULL,
    platform_domain    text NOT NULL,
    balance            bigint NOT NULL DEFAULT 0 CHECK (balance >= 0),
    total_granted      bigint NOT NULL DEFAULT 0 CHECK (total_granted >= 0),
    total_consumed     bigint NOT NULL DEFAULT 0 CHECK (total_consumed >= 0),
    transaction_count  bigint NOT NULL DEFAULT 0 CHECK (transaction_count >= 0),
    version            bigint NOT NULL DEFAULT 0 CHECK (version >= 0),
    created_at         timestamptz NOT NULL,
    updated_at         timestamptz NOT NULL,
    CHECK (balance = total_granted - total_consumed)
) WITH (fillfactor = 50);
COMMENT ON COLUMN glam.credit_accounts.version IS
    'raised by every write: whoever decided on an older one has to decide again';
CREATE INDEX credit_accounts_domain ON glam.credit_accounts (platform_domain);

CREATE TABLE glam.credit_transactions (
    id              uuid NOT NULL PRIMARY KEY,
    merchant_id     uuid NOT NULL,
    seq             bigint NOT NULL CHECK (seq > 0),
    amount          bigint NOT NULL CHECK (amount > 0),
    operation       text NOT NULL CHECK (operation IN ('credit', 'debit')),
    balance_before  bigint NOT NULL CHECK (balance_before >= 0),
    balance_after   bigint NOT NULL CHECK (balance_after >= 0),
    reference_type  text NOT NULL,
    reference_id    text NOT NULL,
    description     text,
    metadata        jsonb,
    created_at      timestamptz NOT NULL,
    UNIQUE (merchant_id, reference_type, reference_id),
    UNIQUE (merchant_id, seq),
    CHECK (balance_after =
           balance_before + CASE operation WHEN 'credit' THEN amount ELSE -amount END)
);
COMMENT ON COLUMN glam.credit_transactions.seq IS
    'the merchant''s first transaction is 1, and there is no gap';
COMMENT ON COLUMN glam.credit_transactions.merchant_id IS
    'an account''s; not held by a foreign key, which cost each debit 5 us. The statement that'
    ' writes it has locked the account; `glamctl ledger verify` looks for orphans';

CREATE TABLE glam.billing_records (
    merchant_id        uuid PRIMARY KEY,
    trial_started_at   timestamptz,
    trial_ends_at      timestamptz,
    trial_expired_at   timestamptz,
    credits_purchased  bigint NOT NULL DEFAULT 0 CHECK (credits_purchased >= 0),
    purchase_count     bigint NOT NULL DEFAULT 0 CHECK (purchase_count >= 0),
    last_purchase_at   timestamptz,
    created_at         timestamptz NOT NULL,
    CHECK ((trial_started_at IS NULL) = (trial_ends_at IS NULL)),
    CHECK (trial_expired_at IS NULL OR trial_ends_at IS NOT NULL)
);
CREATE INDEX billing_records_trial_end ON glam.billing_records (trial_ends_at)
    WHERE trial_ends_at IS NOT NULL AND trial_expired_at IS NULL;

CREATE TABLE glam.credit_purchases (
    purchase_id         uuid PRIMARY KEY,
    merchant_id         uuid NOT NULL,
    pack                text NOT NULL,
    credits             bigint NOT NULL CHECK (credits > 0),
    amount_minor        bigint NOT NULL CHECK (amount_minor >= 0),
    currency            text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    status              text NOT NULL
                        CHECK (status IN ('pending', 'completed', 'failed', 'expired')),
    platform            text NOT NULL,
    platform_charge_id  text,
    checkout_url        text,
    return_url          text NOT NULL,
    test                boolean NOT NULL DEFAULT false,
    failure             text,
    reconcile_at        timestamptz,
    created_at          timestamptz NOT NULL,
    completed_at        timestamptz,
    expires_at          timestamptz NOT NULL,
    UNIQUE (platform, platform_charge_id),
    CHECK ((status = 'completed') = (completed_at IS NOT NULL))
);
CREATE INDEX credit_purchases_merchant
    ON glam.credit_purchases (merchant_id, created_at, purchase_id);
CREATE INDEX credit_purchases_pending ON glam.credit_purchases (expires_at)
    WHERE status = 'pending';
CREATE INDEX credit_purchases_to_reconcile ON glam.credit_purchases (reconcile_at)
    WHERE reconcile_at IS NOT NULL;

CREATE TABLE glam.webhooks (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    platform      text NOT NULL,
    delivery_id   text NOT NULL,
    topic         text NOT NULL,
    shop_domain   text NOT NULL,
    body          bytea NOT NULL,
    received_at   timestamptz NOT NULL,
    attempts      integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    try_at        timestamptz,
    outcome       text,
    applied_at    timestamptz,
    UNIQUE (platform, delivery_id),
    CHECK ((try_at IS NULL) = (outcome IS NOT NULL))
);
COMMENT ON COLUMN glam.webhooks.try_at IS 'null: done with, the outcome says how';
CREATE INDEX webhooks_waiting ON glam.webhooks (try_at) WHERE try_at IS NOT NULL;
"""
    + _FOR_MERCHANTS
)

DOWNGRADE_GLAM = """
DROP TABLE glam.webhooks;
DROP TABLE glam.credit_purchases;
DROP TABLE glam.billing_records;
DROP TABLE glam.credit_transactions;
DROP TABLE glam.credit_accounts;
DROP TABLE glam.dead_letters;
DROP TABLE glam.outbox;
"""


def upgrade() -> None:
    """Make the tables."""
    support.apply(cde=UPGRADE_CDE, glam=UPGRADE_GLAM)


def downgrade() -> None:
    """Drop the tables with all that is in them."""
    support.apply(cde=DOWNGRADE_CDE, glam=DOWNGRADE_GLAM)
