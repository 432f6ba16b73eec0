"""What Alembic runs for each of its commands: one connection, one transaction, one lock.

Called from code (`glamd.admin.migrate`) it is given a connection. Called by plain `alembic` in a
checkout it makes one from `GLAMD_DATABASE__OWNER_URL`, `GLAMD_DATABASE__URL` or `DATABASE_URL`, the
first that is set, and takes the halves to run from `-x schemas=cde|glam|both`. No SQL of a schema
stands here; that is in `versions/`.
"""

import asyncio
import os

from alembic import context
from alembic.util import CommandError
from sqlalchemy.engine import Connection

from glamd.admin import migrate
from glamd.db import VERSION_TABLE
from migrations.support import DEFAULT_SCHEMAS, Schemas, parse_schemas


def chosen_schemas() -> Schemas:
    """The halves to run: what the code says, else what `-x schemas=` says."""
    given = context.config.attributes.get("schemas")
    if given is None:
        given = context.get_x_argument(as_dictionary=True).get("schemas", DEFAULT_SCHEMAS)
    return parse_schemas(str(given))


def run(connection: Connection) -> None:
    """Run what Alembic was asked for; everything or nothing of it stays."""
    context.configure(
        connection=connection,
        version_table=VERSION_TABLE,
        version_table_schema="public",
        schemas=chosen_schemas(),
    )
    with context.begin_transaction():
        timeout_ms = round(migrate.LOCK_TIMEOUT_S * 1000)
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {timeout_ms}")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({migrate.LOCK_KEY})")
        context.run_migrations()


def main() -> None:
    """Use the connection that was given, or make one from the environment."""
    if context.is_offline_mode():
        raise CommandError("--sql is not supported: the SQL stands in migrations/versions.")
    given = context.config.attributes.get("connection")
    if isinstance(given, Connection):
        run(given)
        return
    names = ("GLAMD_DATABASE__OWNER_URL", "GLAMD_DATABASE__URL", "DATABASE_URL")
    url = next((found for name in names if (found := os.environ.get(name))), None)
    if not url:
        raise CommandError("DATABASE_URL is not set.")
    asyncio.run(migrate.on_connection(url, run))


main()
