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

# Partitions are made, rewritten and dropped through functions that run as the tables' owner, since
# the daemon's own login owns nothing. Each checks what it is given by itself, waits for a lock at
# most half a second, and takes no name from its caller's search path. One of them runs at a time.
_PARTITION_FUNCTIONS = """
CREATE FUNCTION cde.make_secrets_partition(day date) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    name text := 'token_secrets_' || to_char(day, 'YYYYMMDD');
    begins timestamptz := day;
    ends timestamptz := day + 1;
    moved bigint;
BEGIN
    IF day IS NULL OR NOT day BETWEEN now()::date - 1 AND now()::date + 400 THEN
        RAISE EXCEPTION 'no partition is made for this day' USING ERRCODE = '22023';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('cde.token_secrets'));
    IF to_regclass('cde.' || name) IS NOT NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE cde.%I (LIKE cde.token_secrets INCLUDING ALL)', name);
    EXECUTE format('ALTER TABLE cde.%I ALTER card_ciphertext SET STATISTICS 0,'
                   ' ALTER sensitive_ciphertext SET STATISTICS 0', name);
    -- The whole first: who has planned to look at the parts there were, and then waits for one of
    -- them, would find the rows that move in neither.
    LOCK TABLE ONLY cde.token_secrets IN ACCESS EXCLUSIVE MODE;
    LOCK TABLE cde.token_secrets_other IN ACCESS EXCLUSIVE MODE;
    EXECUTE format('WITH moved AS (DELETE FROM cde.token_secrets_other'
                   ' WHERE expires_at >= $1 AND expires_at < $2 RETURNING *)'
                   ' INSERT INTO cde.%I SELECT * FROM moved', name) USING begins, ends;
    GET DIAGNOSTICS moved = ROW_COUNT;
    IF moved > 0 THEN
        INSERT INTO cde.shred_queue VALUES ('token_secrets_other', clock_timestamp())
        ON CONFLICT DO NOTHING;
    END IF;
    EXECUTE format('ALTER TABLE cde.token_secrets ATTACH PARTITION cde.%I'
                   ' FOR VALUES FROM (%L) TO (%L)', name, begins, ends);
    RETURN true;
END
$$;
COMMENT ON FUNCTION cde.make_secrets_partition(date) IS
    'make the partition of a day (UTC), with the rows of that day that stand in no partition yet;'
    ' false: it is there';

CREATE FUNCTION cde.drop_secrets_partition(day date) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    name text := 'token_secrets_' || to_char(day, 'YYYYMMDD');
    has_rows boolean;
BEGIN
    -- to_char leaves "BC" out: a day of 2026 BC would have the name of one that is to come.
    IF day IS NULL OR day NOT BETWEEN '2000-01-01' AND now()::date - 1 THEN
        RETURN 'not-over';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('cde.token_secrets'));
    -- Looked at first without the lock for which everybody has to wait.
    FOR turn IN 1..2 LOOP
        IF to_regclass('cde.' || name) IS NULL THEN
            RETURN 'absent';
        END IF;
        EXECUTE format('SELECT EXISTS (SELECT FROM cde.%I)', name) INTO has_rows;
        IF has_rows THEN
            RETURN 'has-rows';
        END IF;
        IF turn = 1 THEN
            LOCK TABLE cde.token_secrets IN ACCESS EXCLUSIVE MODE;
        END IF;
    END LOOP;
    EXECUTE format('DROP TABLE cde.%I', name);
    DELETE FROM cde.shred_queue WHERE partition = name;
    RETURN 'dropped';
END
$$;
COMMENT ON FUNCTION cde.drop_secrets_partition(date) IS
    'drop the partition of a day (UTC) that is over and of which nothing lives: dropped, not-over,'
    ' has-rows or absent';

CREATE FUNCTION cde.rewrite_secrets_partition(name text) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    kept bigint;
BEGIN
    IF name IS NULL OR name !~ '^token_secrets_([0-9]{8}|other)$' THEN
        RAISE EXCEPTION 'no partition of secrets is called this' USING ERRCODE = '22023';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('cde.token_secrets'));
    IF to_regclass('cde.' || name) IS NULL THEN
        DELETE FROM cde.shred_queue WHERE partition = name;
        RETURN NULL;
    END IF;
    EXECUTE format('LOCK TABLE cde.%I IN ACCESS EXCLUSIVE MODE', name);
    DELETE FROM cde.shred_queue WHERE partition = name;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    -- Not CLUSTER, which takes along what an older snapshot may still want to see.
    EXECUTE format('CREATE TEMP TABLE secrets_kept ON COMMIT DROP AS SELECT * FROM cde.%I', name);
    EXECUTE format('TRUNCATE cde.%I', name);
    EXECUTE format('INSERT INTO cde.%I SELECT * FROM pg_temp.secrets_kept ORDER BY token', name);
    GET DIAGNOSTICS kept = ROW_COUNT;
    DROP TABLE pg_temp.secrets_kept;
    RETURN kept;
END
$$;
COMMENT ON FUNCTION cde.rewrite_secrets_partition(text) IS
    'write what lives of a partition into new files, so that nothing is left of what was shredded;'
    ' how many rows, null: nothing was shredded there';

ALTER FUNCTION cde.make_secrets_partition(date) SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '500ms' SET timezone = 'UTC';
ALTER FUNCTION cde.drop_secrets_partition(date) SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '500ms' SET timezone = 'UTC';
ALTER FUNCTION cde.rewrite_secrets_partition(text) SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '500ms' SET timezone = 'UTC';
REVOKE ALL ON FUNCTION cde.make_secrets_partition(date), cde.drop_secrets_partition(date),
    cde.rewrite_secrets_partition(text) FROM PUBLIC;
"""

_TABLES = """
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
-- What ANALYZE samples it keeps, in pg_statistic, where nothing would shred it.
ALTER TABLE cde.token_secrets
    ALTER card_ciphertext SET STATISTICS 0, ALTER sensitive_ciphertext SET STATISTICS 0;

CREATE TABLE cde.shred_queue (
    partition  text PRIMARY KEY,
    since      timestamptz NOT NULL
);
COMMENT ON TABLE cde.shred_queue IS
    'partitions of token_secrets that hold bytes of rows which are gone, and since when';
"""

_MOVE = """
ALTER TABLE cde.payment_tokens
    ADD COLUMN has_sensitive_data boolean NOT NULL DEFAULT false,
    ADD COLUMN authorized_at timestamptz;
SELECT cde.make_secrets_partition(day) FROM (
    SELECT DISTINCT (expires_at AT TIME ZONE 'UTC')::date AS day FROM cde.payment_tokens
    WHERE card_ciphertext IS NOT NULL AND expires_at > now() AND expires_at < now() + '40 days'
) days;
INSERT INTO cde.token_secrets (
    token, expires_at, card_ciphertext, sensitive_ciphertext, key_version)
SELECT token, expires_at, card_ciphertext, sensitive_ciphertext, key_version
FROM cde.payment_tokens
WHERE card_ciphertext IS NOT NULL AND expires_at > now();
-- A dropped column's bytes stay in their rows; an expression makes PostgreSQL write them anew.
ALTER TABLE cde.payment_tokens
    DROP COLUMN card_ciphertext, DROP COLUMN sensitive_ciphertext, DROP COLUMN key_version,
    ALTER COLUMN bin TYPE text USING bin || '';
CREATE INDEX payment_tokens_ended ON cde.payment_tokens (coalesce(revoked_at, expires_at))
    WHERE status = 'revoked' OR expired_at IS NOT NULL;
CREATE INDEX merchants_to_erase ON cde.merchants (erase_requested_at)
    WHERE erase_requested_at IS NOT NULL AND erased_at IS NULL;

CREATE INDEX token_idempotency_keys_expired ON cde.token_idempotency_keys (expires_at);
"""

UPGRADE_CDE = _REENCRYPTIONS.format(schema="cde") + _TABLES + _PARTITION_FUNCTIONS + _MOVE

DOWNGRADE_CDE = """
DROP INDEX cde.token_idempotency_keys_expired;
DROP INDEX cde.payment_tokens_ended;
DROP FUNCTION cde.make_secrets_partition(date), cde.drop_secrets_partition(date),
    cde.rewrite_secrets_partition(text);
DROP TABLE cde.shred_queue;

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
