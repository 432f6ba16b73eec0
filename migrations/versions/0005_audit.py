"""The audit's months, the versions of its key, and what the daemon's database role may do.

Whoever runs this owns the tables; the daemon is to be a member of `glamd_daemon` and no more. It
adds to the audit log and reads it. Months are made and dropped by two functions that run with the
owner's rights and keep the rules themselves.

Revision ID: 0005
Revises: 0004
"""

from alembic import op
from alembic.util import CommandError

from migrations import support

revision = "0005"
down_revision: str | None = "0004"
branch_labels: str | None = None
depends_on: str | None = None

_ROLE_IS_THERE = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = 'glamd_daemon')"
_MAY_MAKE_ROLES = "SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user"
_MAKE_ROLE = """
DO $$
BEGIN
    CREATE ROLE glamd_daemon NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL; -- another database of this server is migrated at the same moment
END
$$;
"""

_GRANTS = """
GRANT USAGE ON SCHEMA {schema} TO glamd_daemon;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO glamd_daemon;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO glamd_daemon;
GRANT SELECT ON public.glamd_schema_version TO glamd_daemon;
ALTER DEFAULT PRIVILEGES IN SCHEMA {schema}
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO glamd_daemon;
ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT USAGE ON SEQUENCES TO glamd_daemon;
DO $$
DECLARE
    one record;
BEGIN
    FOR one IN SELECT oid::regprocedure AS name, prosecdef FROM pg_proc
               WHERE pronamespace = '{schema}'::regnamespace LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', one.name);
        IF one.prosecdef THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO glamd_daemon', one.name);
        END IF;
    END LOOP;
END
$$;
"""

_NO_GRANTS = """
DO $$
DECLARE
    one record;
BEGIN
    FOR one IN SELECT oid::regprocedure AS name FROM pg_proc
               WHERE pronamespace = '{schema}'::regnamespace LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM glamd_daemon', one.name);
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC', one.name);
    END LOOP;
END
$$;
ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} REVOKE ALL ON SEQUENCES FROM glamd_daemon;
ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} REVOKE ALL ON TABLES FROM glamd_daemon;
REVOKE ALL ON public.glamd_schema_version FROM glamd_daemon;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA {schema} FROM glamd_daemon;
REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM glamd_daemon;
REVOKE ALL ON SCHEMA {schema} FROM glamd_daemon;
"""

_COLUMNS = """
DO $$
DECLARE
    -- A default that is a constant costs nothing, however many rows there are.
    used text := coalesce((SELECT version FROM cde.encryption_keys
                           WHERE keyring = 'audit' AND status = 'active'), 'v1');
BEGIN
    EXECUTE format('ALTER TABLE cde.decrypt_audit_log
                        ADD COLUMN key_version text NOT NULL DEFAULT %L', used);
    EXECUTE format('ALTER TABLE cde.audit_heads
                        ADD COLUMN key_version text NOT NULL DEFAULT %L', used);
END
$$;
ALTER TABLE cde.decrypt_audit_log ALTER COLUMN key_version DROP DEFAULT;
ALTER TABLE cde.audit_heads
    ALTER COLUMN key_version DROP DEFAULT,
    ADD COLUMN last_mac bytea,
    ADD COLUMN dropped_at timestamptz,
    ADD CHECK ((last_mac IS NULL) = (dropped_at IS NULL)),
    -- Nobody may end the chain where no month can be made, or name a date that nobody can read.
    ADD CONSTRAINT audit_heads_month_check CHECK (
        extract(day FROM month) = 1 AND month BETWEEN '2000-01-01' AND '9999-01-01');
COMMENT ON COLUMN cde.decrypt_audit_log.key_version IS 'of the keyring audit, which made the mac';
COMMENT ON COLUMN cde.audit_heads.last_mac IS
    'that of the last row of a month that was dropped: what the month after it follows';
"""

_MAKE_PARTITION = """
CREATE FUNCTION cde.make_audit_partition(wanted date) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '3s' AS $$
DECLARE
    name text := 'decrypt_audit_log_' || to_char(wanted, 'YYYY_MM');
BEGIN
    -- to_char leaves "BC" out: a month of 2026 BC would have the name of one that is still young.
    IF wanted IS NULL OR extract(day FROM wanted) <> 1
       OR wanted NOT BETWEEN '0001-01-01' AND '9999-12-31' THEN
        RAISE EXCEPTION 'a month is named by its first day' USING ERRCODE = '22023';
    END IF;
    -- Not by to_regclass, which may remember from before the lock that there was none.
    IF EXISTS (SELECT FROM pg_class WHERE relname = name
               AND relnamespace = 'cde'::regnamespace) THEN
        RETURN false;
    END IF;
    PERFORM pg_advisory_xact_lock(7262617564697401);
    IF EXISTS (SELECT FROM pg_class WHERE relname = name
               AND relnamespace = 'cde'::regnamespace) THEN
        RETURN false;
    END IF;
    -- Made apart and attached: as a part from the start it would wait for whoever reads the log,
    -- such as a dump, and everybody who writes would wait behind it.
    EXECUTE format('CREATE TABLE cde.%I (LIKE cde.decrypt_audit_log INCLUDING ALL)', name);
    -- What later tables are granted, a part of the log is not: it could be changed by its own name.
    EXECUTE format('REVOKE ALL ON cde.%I FROM glamd_daemon, PUBLIC', name);
    EXECUTE format('ALTER TABLE cde.decrypt_audit_log ATTACH PARTITION cde.%I
                        FOR VALUES FROM (%L) TO (%L)',
                   name, wanted, (wanted + interval '1 month')::date);
    RETURN true;
END
$$;
COMMENT ON FUNCTION cde.make_audit_partition(date) IS
    'makes the month of the audit log where it is missing, for append by way of the log only';
"""

_DROP_PARTITION = """
CREATE FUNCTION cde.drop_audit_partition(wanted date) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '3s' AS $$
DECLARE
    name text := 'decrypt_audit_log_' || to_char(wanted, 'YYYY_MM');
    last record;
BEGIN
    -- to_char leaves "BC" out: a month of 2026 BC would have the name of one that is still young.
    IF wanted IS NULL OR extract(day FROM wanted) <> 1
       OR wanted NOT BETWEEN '0001-01-01' AND '9999-12-31' THEN
        RAISE EXCEPTION 'a month is named by its first day' USING ERRCODE = '22023';
    END IF;
    IF wanted + interval '1 month' + interval '7 years' > now() AT TIME ZONE 'UTC' THEN
        RETURN 'too-young';
    END IF;
    PERFORM pg_advisory_xact_lock(7262617564697401);
    IF NOT EXISTS (SELECT FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
                   WHERE i.inhparent = 'cde.decrypt_audit_log'::regclass
                     AND c.relname = name AND c.relnamespace = 'cde'::regnamespace) THEN
        RETURN 'not-there';
    END IF;
    IF EXISTS (SELECT FROM cde.decrypt_audit_log WHERE month < wanted) THEN
        RETURN 'not-the-oldest';
    END IF;
    SELECT seq, mac INTO last FROM cde.decrypt_audit_log
    WHERE month = wanted ORDER BY seq DESC LIMIT 1;
    IF FOUND THEN
        IF NOT EXISTS (SELECT FROM cde.audit_heads WHERE month > wanted) THEN
            RETURN 'the-newest';
        END IF;
        UPDATE cde.audit_heads SET last_mac = last.mac, dropped_at = now() WHERE month = wanted;
        DELETE FROM cde.audit_heads WHERE month < wanted;
    END IF;
    EXECUTE format('DROP TABLE cde.%I', name);
    RETURN 'dropped';
END
$$;
COMMENT ON FUNCTION cde.drop_audit_partition(date) IS
    'drops the oldest month once it is older than seven years, or says why not; its head stays, '
    'since the month after it follows its last row';
"""

_LOG_IS_APPENDED_TO = """
REVOKE ALL ON cde.decrypt_audit_log, cde.audit_heads FROM glamd_daemon, PUBLIC;
GRANT SELECT, INSERT ON cde.decrypt_audit_log TO glamd_daemon;
GRANT SELECT, INSERT, UPDATE ON cde.audit_heads TO glamd_daemon;
DO $$
DECLARE
    part regclass;
BEGIN
    FOR part IN SELECT inhrelid::regclass FROM pg_inherits
                WHERE inhparent = 'cde.decrypt_audit_log'::regclass LOOP
        EXECUTE format('REVOKE ALL ON %s FROM glamd_daemon, PUBLIC', part);
    END LOOP;
END
$$;
"""

UPGRADE_CDE = (
    _COLUMNS
    + _MAKE_PARTITION
    + _DROP_PARTITION
    + _GRANTS.format(schema="cde")
    + _LOG_IS_APPENDED_TO
)

DOWNGRADE_CDE = (
    _NO_GRANTS.format(schema="cde")
    + """
DROP FUNCTION cde.drop_audit_partition(date);
DROP FUNCTION cde.make_audit_partition(date);
ALTER TABLE cde.audit_heads DROP COLUMN key_version, DROP COLUMN last_mac, DROP COLUMN dropped_at,
    DROP CONSTRAINT audit_heads_month_check;
ALTER TABLE cde.decrypt_audit_log DROP COLUMN key_version;
"""
)

UPGRADE_GLAM = _GRANTS.format(schema="glam")

DOWNGRADE_GLAM = _NO_GRANTS.format(schema="glam")


def upgrade() -> None:
    """Make the role if need be, the columns and functions, and grant."""
    _ensure_role()
    support.apply(cde=UPGRADE_CDE, glam=UPGRADE_GLAM)


def downgrade() -> None:
    """Take back what was granted; the role stays, since other databases may use it."""
    support.apply(cde=DOWNGRADE_CDE, glam=DOWNGRADE_GLAM)


def _ensure_role() -> None:
    """Make the role where it is missing; CommandError says what has to be done first."""
    connection = op.get_bind()
    if connection.exec_driver_sql(_ROLE_IS_THERE).scalar():
        return
    if not connection.exec_driver_sql(_MAY_MAKE_ROLES).scalar():
        raise CommandError(
            "the role glamd_daemon is missing and this login may not make it; an administrator "
            "has to run this first: CREATE ROLE glamd_daemon NOLOGIN"
        )
    support.run_sql(_MAKE_ROLE)
