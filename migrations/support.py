"""How a migration runs its SQL: `apply` for the two schemas, `run_sql` for one text.

A file in `versions/` reads like this, and has nothing else in it:

    from migrations.support import apply

    revision = "0002"
    down_revision = "0001"
    branch_labels = None
    depends_on = None

    UPGRADE_CDE = "ALTER TABLE cde.devices ADD COLUMN …; CREATE INDEX …;"
    DOWNGRADE_CDE = "ALTER TABLE cde.devices DROP COLUMN …;"
    UPGRADE_GLAM = ""      # nothing to do for this half
    DOWNGRADE_GLAM = ""

    def upgrade() -> None:
        apply(cde=UPGRADE_CDE, glam=UPGRADE_GLAM)

    def downgrade() -> None:
        apply(cde=DOWNGRADE_CDE, glam=DOWNGRADE_GLAM)

The halves never mention one another, because `cde` may live on a server of its own: then the same
revisions run once on each server, with `-x schemas=cde` and `-x schemas=glam`. Each server keeps
its own version table. Several statements in one text are welcome, `%` and `:` need no escaping,
and everything up to the last revision is one transaction: nothing here may commit.
"""

from typing import Literal, cast, get_args

from alembic import op
from asyncpg import Connection

Schemas = Literal["cde", "glam", "both"]

DEFAULT_SCHEMAS: Schemas = "both"


def parse_schemas(text: str) -> Schemas:
    """Take `cde`, `glam` or `both`; anything else is a ValueError that names the three."""
    if text not in get_args(Schemas):
        msg = f"schemas must be one of {', '.join(get_args(Schemas))}, not {text!r}"
        raise ValueError(msg)
    return cast("Schemas", text)


def apply(*, cde: str, glam: str) -> None:
    """Run the halves that belong on this server, `cde` first; an empty text is nothing to do."""
    schemas = cast("Schemas", op.get_context().opts["schemas"])
    if schemas in {"cde", "both"}:
        run_sql(cde)
    if schemas in {"glam", "both"}:
        run_sql(glam)


def run_sql(text: str) -> None:
    """Run SQL of any number of statements inside the migration's transaction.

    Alembic's own `op.execute` prepares each text, and PostgreSQL prepares only single statements;
    asyncpg's `execute` without arguments uses the simple protocol, which takes a whole script.
    """
    if not text.strip():
        return
    connection = op.get_bind()
    # SQLAlchemy sends its BEGIN with the first statement that it sees, and it does not see ours.
    connection.exec_driver_sql("SELECT 1")
    adapted = connection.connection.dbapi_connection
    assert adapted is not None, "the migration's connection is closed"

    async def script(driver: Connection) -> None:
        assert driver.is_in_transaction(), "a migration must run inside its transaction"
        await driver.execute(text)

    adapted.run_async(script)
