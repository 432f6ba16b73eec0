"""The history of the database's schema, as Alembic revisions that hold plain SQL.

`versions/` has one file a step, `support` runs their SQL, `env` is what Alembic calls. No rule of
the product stands here, and nothing here is imported by the daemon's request paths. The package
is installed beside `glamd` so that a daemon without its checkout can still migrate.
"""
