"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""

from migrations import support

revision = "${up_revision}"
down_revision: str | None = ${'"%s"' % down_revision if down_revision else 'None'}
branch_labels: str | None = None
depends_on: str | None = None

UPGRADE_CDE = """
"""

DOWNGRADE_CDE = """
"""

UPGRADE_GLAM = """
"""

DOWNGRADE_GLAM = """
"""


def upgrade() -> None:
    """Expand the schema; what is no longer used goes in a later revision."""
    support.apply(cde=UPGRADE_CDE, glam=UPGRADE_GLAM)


def downgrade() -> None:
    """Take this revision back."""
    support.apply(cde=DOWNGRADE_CDE, glam=DOWNGRADE_GLAM)
