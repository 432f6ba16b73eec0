"""The first token: what tokenizing needs (`cde`), and who the merchants are (`glam`).

Sensitive authentication data, grants by role, the purge and the relay come with later revisions;
the columns here are those that something writes or reads today.

Revision ID: 0001
Revises:
"""

from migrations import support

revision = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None

UPGRADE_CDE = """
CREATE SCHEMA IF NOT EXISTS cde;

CREATE TABLE cde.merchants (
    merchant_id  uuid PRIMARY KEY,
    token_ttl_s  integer CHECK (token_ttl_s > 0),
    created_at   timestamptz NOT NULL DEFAULT now()
);
COMMENT ON COLUMN cde.merchants.token_ttl_s IS 'null: payments.default_token_ttl_h applies';

CREATE TABLE cde.encryption_keys (
    keyring       text NOT NULL,
    version       text NOT NULL,
    wrapped_key   bytea,
    provider      text NOT NULL,
    kcv           text NOT NULL,
    status        text NOT NULL
                  CHECK (status IN ('active', 'decrypt-only', 'retired', 'destroyed')),
    created_at    timestamptz NOT NULL DEFAULT now(),
    activated_at  timestamptz,
    retired_at    timestamptz,
    destroyed_at  timestamptz,
    PRIMARY KEY (keyring, version),
    CHECK ((status = 'destroyed') = (wrapped_key IS NULL))
);
CREATE UNIQUE INDEX encryption_keys_one_active ON cde.encryption_keys (keyring)
    WHERE status = 'active';

CREATE TABLE cde.key_sets (
    key_set         text PRIMARY KEY CHECK (key_set ~ '^[A-Za-z0-9_.-]{1,64}$'),
    scheme          text NOT NULL CHECK (scheme IN ('tdes-dukpt', 'aes-dukpt')),
    data_usage      text NOT NULL,
    key_type        text,
    padding         text NOT NULL CHECK (padding IN ('zero', 'pkcs7', 'none')),
    mac             text NOT NULL CHECK (mac IN ('optional', 'required')),
    counter_window  integer NOT NULL DEFAULT 1024
                    CHECK (counter_window BETWEEN 8 AND 65536 AND counter_window % 8 = 0),
    wrapped_bdk     bytea NOT NULL,
    provider        text NOT NULL,
    kcv             text NOT NULL,
    status          text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'retired')),
    created_at      timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE cde.device_counters (
    counter_id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    initial_key     bytea NOT NULL UNIQUE,
    merchant_id     uuid NOT NULL REFERENCES cde.merchants,
    highest         bigint NOT NULL DEFAULT 0 CHECK (highest >= 0),
    seen            bytea NOT NULL DEFAULT '',
    version         bigint NOT NULL DEFAULT 0,
    token_count     bigint NOT NULL DEFAULT 0 CHECK (token_count >= 0)
) WITH (fillfactor = 50);
COMMENT ON COLUMN cde.device_counters.initial_key IS
    'keyed hash of the initial key, so that one key has one row under whatever names it came in';
CREATE INDEX device_counters_merchant ON cde.device_counters (merchant_id);
COMMENT ON TABLE cde.device_counters IS
    'one row an initial key: which transaction counters it has spent. Every commit of a token '
    'raises version, which fences a second gateway; token_count is what lists give as their total';

CREATE TABLE cde.devices (
    device_id               text PRIMARY KEY CHECK (device_id ~ '^[A-Za-z0-9_-]{1,64}$'),
    merchant_id             uuid NOT NULL REFERENCES cde.merchants,
    serial                  text,
    model                   text,
    key_set                 text NOT NULL REFERENCES cde.key_sets,
    initial_ksn             bytea NOT NULL,
    counter_id              bigint NOT NULL REFERENCES cde.device_counters,
    certificate_sha256      text NOT NULL CHECK (certificate_sha256 ~ '^[0-9a-f]{64}$'),
    certificate_expires_at  timestamptz NOT NULL,
    status                  text NOT NULL DEFAULT 'active'
                            CHECK (status IN ('active', 'suspended', 'revoked')),
    firmware                text,
    online_node             text,
    last_seen_at            timestamptz,
    created_at              timestamptz NOT NULL DEFAULT now(),
    changed_at              timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 80);
CREATE UNIQUE INDEX devices_one_per_initial_key ON cde.devices (counter_id)
    WHERE status <> 'revoked';
CREATE INDEX devices_merchant ON cde.devices (merchant_id, device_id);
CREATE INDEX devices_changed ON cde.devices (changed_at);

CREATE TABLE cde.payment_tokens (
    token                 text PRIMARY KEY CHECK (token ~ '^ptk_[0-9A-HJKMNP-TV-Z]{26,}$'),
    merchant_id           uuid NOT NULL,
    device_id             text NOT NULL,
    brand                 text NOT NULL,
    bin                   text NOT NULL,
    last4                 text NOT NULL,
    exp_month             smallint CHECK (exp_month BETWEEN 1 AND 12),
    exp_year              smallint,
    fingerprint           bytea NOT NULL,
    entry_mode            text NOT NULL,
    card_ciphertext       bytea,
    sensitive_ciphertext  bytea,
    key_version           text NOT NULL,
    status                text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'revoked')),
    created_at            timestamptz NOT NULL,
    expires_at            timestamptz NOT NULL,
    revoked_at            timestamptz,
    CHECK (status = 'active' OR (card_ciphertext IS NULL AND sensitive_ciphertext IS NULL)),
    CHECK ((status = 'revoked') = (revoked_at IS NOT NULL))
);
CREATE INDEX payment_tokens_of_a_merchant
    ON cde.payment_tokens (merchant_id, created_at, token);

CREATE TABLE cde.token_idempotency_keys (
    scope         text NOT NULL,
    key           text NOT NULL,
    content_hash  bytea NOT NULL,
    answer        bytea NOT NULL,
    expires_at    timestamptz NOT NULL,
    PRIMARY KEY (scope, key)
);

CREATE TABLE cde.outbox (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    subject         text NOT NULL,
    merchant_id     uuid NOT NULL,
    correlation_id  text NOT NULL,
    data            jsonb NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE cde.decrypt_audit_log (
    month               date NOT NULL CHECK (extract(day FROM month) = 1),
    seq                 bigint NOT NULL CHECK (seq > 0),
    at                  timestamptz NOT NULL,
    action              text NOT NULL,
    actor               text NOT NULL,
    certificate_sha256  text NOT NULL,
    ip                  text NOT NULL,
    subject             text NOT NULL,
    fields              text[] NOT NULL,
    purpose             text NOT NULL,
    outcome             text NOT NULL,
    correlation_id      text NOT NULL,
    mac                 bytea NOT NULL,
    PRIMARY KEY (month, seq)
) PARTITION BY RANGE (month);
COMMENT ON COLUMN cde.decrypt_audit_log.subject IS 'the token, or the key that was touched';

CREATE TABLE cde.audit_heads (
    month       date PRIMARY KEY,
    seq         bigint NOT NULL,
    mac         bytea NOT NULL,
    updated_at  timestamptz NOT NULL
);
"""

DOWNGRADE_CDE = """
DROP SCHEMA cde CASCADE;
"""

UPGRADE_GLAM = """
CREATE SCHEMA IF NOT EXISTS glam;

CREATE TABLE glam.merchants (
    merchant_id  uuid PRIMARY KEY,
    platform     text NOT NULL,
    shop_id      text NOT NULL,
    domain       text NOT NULL UNIQUE CHECK (domain = lower(domain)),
    created_at   timestamptz NOT NULL DEFAULT now(),
    UNIQUE (platform, shop_id)
);
"""

DOWNGRADE_GLAM = """
DROP SCHEMA glam CASCADE;
"""


def upgrade() -> None:
    """Make the tables."""
    support.apply(cde=UPGRADE_CDE, glam=UPGRADE_GLAM)


def downgrade() -> None:
    """Drop the tables with all that is in them."""
    support.apply(cde=DOWNGRADE_CDE, glam=DOWNGRADE_GLAM)
