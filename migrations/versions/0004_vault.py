"""The vault: ciphertexts apart from metadata, keys that rotate, tokens that end, readers' profiles.

Ciphertexts move to `cde.token_secrets`, partitioned by the day on which their token ends: a day
that is over is dropped whole, so that what was shredded leaves the disk with it, and re-encryption
reads what lives and not the history.

Revision ID: 0004
Revises: 0003
"""

from migrations import support

revision = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None

_REENCRYPTIONS = """
CREATE TABLE {schema}.reencryptions (
    keyring      text PRIMARY KEY,
    target       text NOT NULL,
    position     text NOT NULL DEFAULT '',
    pass         integer NOT NULL DEFAULT 0 CHECK (pass >= 0),
    remaining    bigint CHECK (remaining >= 0),
    done         bigint NOT NULL DEFAULT 0 CHECK (done >= 0),
    damaged      bigint NOT NULL DEFAULT 0 CHECK (damaged >= 0),
    busy_s       double precision NOT NULL DEFAULT 0,
    started_at   timestamptz NOT NULL,
    updated_at   timestamptz NOT NULL,
    finished_at  timestamptz,
    owner        text,
    owner_until  timestamptz,
    CHECK ((owner IS NULL) = (owner_until IS NULL))
);
COMMENT ON TABLE {schema}.reencryptions IS
    'how far the rows of a keyring have come on their way to its newest version';
COMMENT ON COLUMN {schema}.reencryptions.remaining IS 'null: not counted yet';
COMMENT ON COLUMN {schema}.reencryptions.owner IS 'the node that works on it, until owner_until';
"""

UPGRADE_CDE = (
    _REENCRYPTIONS.format(schema="cde")
    + """
ALTER TABLE cde.merchants
    ADD COLUMN sensitive_data text NOT NULL DEFAULT 'drop'
        CHECK (sensitive_data IN ('drop', 'until-authorized')),
    ADD COLUMN purged_token_count bigint NOT NULL DEFAULT 0 CHECK (purged_token_count >= 0),
    ADD COLUMN erase_requested_at timestamptz,
    ADD COLUMN erased_at timestamptz,
    ADD CHECK (erased_at IS NULL OR erase_requested_at IS NOT NULL);
COMMENT ON COLUMN cde.merchants.purged_token_count IS
    'tokens whose metadata is gone; what devices were given, less this, is what lists give';

ALTER TABLE cde.key_sets
    ALTER COLUMN wrapped_bdk DROP NOT NULL,
    ADD COLUMN hsm_label text,
    ADD COLUMN reader text NOT NULL DEFAULT 'generic',
    ADD COLUMN retired_at timestamptz,
    ADD CHECK ((wrapped_bdk IS NULL) <> (hsm_label IS NULL));
COMMENT ON COLUMN cde.key_sets.reader IS 'what its readers put around the ciphertext';
CREATE INDEX devices_key_set ON cde.devices (key_set);

CREATE TABLE cde.token_secrets (
    token                 text NOT NULL,
    expires_at            timestamptz NOT NULL,
    card_ciphertext       bytea NOT NULL,
    sensitive_ciphertext  bytea,
    key_version           text NOT NULL,
    PRIMARY KEY (token, expires_at)
) PARTITION BY RANGE (expires_at);
COMMENT ON TABLE cde.token_secrets IS
    'what is sealed of tokens that live; a row goes when its token expires or is revoked';
CREATE TABLE cde.token_secrets_other PARTITION OF cde.token_secrets DEFAULT;

ALTER TABLE cde.payment_tokens
    ADD COLUMN has_sensitive_data boolean NOT NULL DEFAULT false,
    ADD COLUMN authorized_at timestamptz;
INSERT INTO cde.token_secrets (
    token, expires_at, card_ciphertext, sensitive_ciphertext, key_version)
SELECT token, expires_at, card_ciphertext, sensitive_ciphertext, key_version
FROM cde.payment_tokens
WHERE card_ciphertext IS NOT NULL AND expires_at > now();
ALTER TABLE cde.payment_tokens
    DROP COLUMN card_ciphertext, DROP COLUMN sensitive_ciphertext, DROP COLUMN key_version;

CREATE INDEX token_idempotency_keys_expired ON cde.token_idempotency_keys (expires_at);
"""
)

DOWNGRADE_CDE = """
DROP INDEX cde.token_idempotency_keys_expired;

ALTER TABLE cde.payment_tokens
    ADD COLUMN card_ciphertext bytea,
    ADD COLUMN sensitive_ciphertext bytea,
    ADD COLUMN key_version text NOT NULL DEFAULT '';
UPDATE cde.payment_tokens t
SET card_ciphertext = s.card_ciphertext, sensitive_ciphertext = s.sensitive_ciphertext,
    key_version = s.key_version
FROM cde.token_secrets s WHERE s.token = t.token;
ALTER TABLE cde.payment_tokens
    ALTER COLUMN key_version DROP DEFAULT,
    DROP COLUMN has_sensitive_data,
    DROP COLUMN authorized_at,
    ADD CHECK (status = 'active' OR (card_ciphertext IS NULL AND sensitive_ciphertext IS NULL));
DROP TABLE cde.token_secrets;

DROP INDEX cde.devices_key_set;
-- A key set whose BDK is in an HSM means nothing to the release before.
DELETE FROM cde.key_sets k
WHERE wrapped_bdk IS NULL AND NOT EXISTS (SELECT FROM cde.devices d WHERE d.key_set = k.key_set);
ALTER TABLE cde.key_sets
    DROP COLUMN hsm_label,
    DROP COLUMN reader,
    DROP COLUMN retired_at,
    ALTER COLUMN wrapped_bdk SET NOT NULL;

ALTER TABLE cde.merchants
    DROP COLUMN sensitive_data,
    DROP COLUMN purged_token_count,
    DROP COLUMN erase_requested_at,
    DROP COLUMN erased_at;
DROP TABLE cde.reencryptions;
"""

UPGRADE_GLAM = (
    _REENCRYPTIONS.format(schema="glam")
    + """
CREATE FUNCTION glam.refuse_unusable_key() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM glam.encryption_keys
    WHERE keyring = 'platform-tokens' AND version = NEW.key_version
      AND status IN ('active', 'decrypt-only')
    FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the key version is not usable any more' USING ERRCODE = 'GL001';
    END IF;
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION glam.refuse_unusable_key() IS
    'fences a node that does not know yet that its key version was retired';
CREATE TRIGGER platform_tokens_key BEFORE INSERT OR UPDATE OF key_version
    ON glam.platform_tokens FOR EACH ROW EXECUTE FUNCTION glam.refuse_unusable_key();
"""
)

DOWNGRADE_GLAM = """
DROP TRIGGER platform_tokens_key ON glam.platform_tokens;
DROP FUNCTION glam.refuse_unusable_key();
DROP TABLE glam.reencryptions;
"""


def upgrade() -> None:
    """Make the tables, and move the ciphertexts of tokens that live."""
    support.apply(cde=UPGRADE_CDE, glam=UPGRADE_GLAM)


def downgrade() -> None:
    """Move the ciphertexts back, and drop the tables."""
    support.apply(cde=DOWNGRADE_CDE, glam=DOWNGRADE_GLAM)
