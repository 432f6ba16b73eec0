"""Platform tokens, what every route needs of the database, and imports of older services' rows.

The outbox of `glam` comes with the events that go into it.

Revision ID: 0002
Revises: 0001
"""

from migrations import support

revision = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None

UPGRADE_GLAM = """
CREATE TABLE glam.encryption_keys (
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
CREATE UNIQUE INDEX encryption_keys_one_active ON glam.encryption_keys (keyring)
    WHERE status = 'active';

CREATE TABLE glam.platform_tokens (
    token_id             uuid PRIMARY KEY,
    merchant_id          uuid NOT NULL,
    platform             text NOT NULL CHECK (platform IN
                         ('shopify', 'woocommerce', 'bigcommerce', 'magento', 'squarespace',
                          'custom')),
    platform_shop_id     text NOT NULL,
    domain               text NOT NULL,
    token_type           text NOT NULL CHECK (token_type IN
                         ('oauth', 'api_key', 'basic_auth', 'bearer')),
    scopes               text[] NOT NULL,
    ciphertext           bytea NOT NULL,
    key_version          text NOT NULL,
    expires_at           timestamptz,
    refreshable          boolean NOT NULL,
    generation           bigint NOT NULL DEFAULT 1 CHECK (generation > 0),
    refresh_claim        uuid,
    refresh_claim_until  timestamptz,
    refresh_failures     integer NOT NULL DEFAULT 0 CHECK (refresh_failures >= 0),
    refresh_error        text,
    refresh_not_before   timestamptz,
    refreshed_at         timestamptz,
    created_at           timestamptz NOT NULL,
    updated_at           timestamptz NOT NULL,
    last_accessed_by     text,
    last_accessed_at     timestamptz,
    access_count         bigint NOT NULL DEFAULT 0 CHECK (access_count >= 0),
    older_updated_at     timestamptz,
    UNIQUE (merchant_id, platform),
    CHECK ((refresh_claim IS NULL) = (refresh_claim_until IS NULL)),
    CHECK ((refresh_failures = 0) = (refresh_error IS NULL))
) WITH (fillfactor = 80);
COMMENT ON COLUMN glam.platform_tokens.generation IS
    'raised whenever the secret changes: an answer to a refresh of an older one is thrown away';
COMMENT ON COLUMN glam.platform_tokens.older_updated_at IS
    'when the older service wrote the secret that an import brought; null: it is another one now';
COMMENT ON COLUMN glam.platform_tokens.refreshable IS 'a refresh token is sealed with it';
CREATE INDEX platform_tokens_to_refresh
    ON glam.platform_tokens (refresh_not_before, expires_at) WHERE refreshable;

CREATE TABLE glam.token_access_log (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at              timestamptz NOT NULL,
    merchant_id     uuid NOT NULL,
    platform        text,
    token_id        uuid,
    action          text NOT NULL CHECK (action IN
                    ('store', 'read', 'delete', 'refresh', 'import')),
    actor_kind      text NOT NULL,
    actor           text NOT NULL,
    success         boolean NOT NULL,
    error           text,
    request_id      text NOT NULL,
    correlation_id  text NOT NULL,
    ip              text NOT NULL,
    CHECK (success = (error IS NULL))
);
COMMENT ON COLUMN glam.token_access_log.platform IS 'null: every platform of the merchant';
CREATE INDEX token_access_log_merchant ON glam.token_access_log (merchant_id, id);
CREATE INDEX token_access_log_at ON glam.token_access_log (at);

CREATE TABLE glam.idempotency_keys (
    scope         text NOT NULL,
    key_sha256    bytea NOT NULL CHECK (length(key_sha256) = 32),
    content_mac   bytea NOT NULL CHECK (length(content_mac) = 32),
    claim         uuid NOT NULL,
    claim_until   timestamptz NOT NULL,
    status        smallint,
    answer        jsonb,
    expires_at    timestamptz NOT NULL,
    PRIMARY KEY (scope, key_sha256),
    CHECK ((status IS NULL) = (answer IS NULL))
);
COMMENT ON COLUMN glam.idempotency_keys.content_mac IS
    'HMAC of the body under the caller''s key, which is not kept: a body cannot be guessed by it';
CREATE INDEX idempotency_keys_expired ON glam.idempotency_keys (expires_at);

CREATE TABLE glam.jwt_revocations (
    kind        text NOT NULL CHECK (kind IN ('jti', 'kid')),
    value       text NOT NULL,
    revoked_at  timestamptz NOT NULL,
    revoked_by  text NOT NULL,
    expires_at  timestamptz,
    PRIMARY KEY (kind, value)
);
COMMENT ON COLUMN glam.jwt_revocations.expires_at IS
    'when no token that it is about can be valid any more; null: never';

CREATE TABLE glam.imports (
    name        text PRIMARY KEY,
    source      text NOT NULL,
    position    text NOT NULL,
    counts      jsonb NOT NULL,
    started_at  timestamptz NOT NULL,
    updated_at  timestamptz NOT NULL
);
COMMENT ON COLUMN glam.imports.source IS
    'fingerprint of what the rows come from: the position is one in there, and in nothing else';
COMMENT ON TABLE glam.imports IS
    'how far an import has come, written in the transaction of the rows that it brought';
"""

DOWNGRADE_GLAM = """
DROP TABLE glam.imports;
DROP TABLE glam.jwt_revocations;
DROP TABLE glam.idempotency_keys;
DROP TABLE glam.token_access_log;
DROP TABLE glam.platform_tokens;
DROP TABLE glam.encryption_keys;
"""


def upgrade() -> None:
    """Make the tables."""
    support.apply(cde="", glam=UPGRADE_GLAM)


def downgrade() -> None:
    """Drop the tables with all that is in them."""
    support.apply(cde="", glam=DOWNGRADE_GLAM)
