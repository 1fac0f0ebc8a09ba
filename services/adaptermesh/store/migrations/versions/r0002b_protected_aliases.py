"""Aliases that are protected, and what each entry of an alias' history did.

Revision ID: r0002b
Revises: r0002
"""

import sqlalchemy as sa
from alembic import op

revision = "r0002b"
down_revision = "r0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "alias_moves", sa.Column("protected", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    op.add_column(
        "alias_moves", sa.Column("action", sa.String(length=16), nullable=False, server_default="set")
    )


def downgrade() -> None:
    op.drop_column("alias_moves", "action")
    op.drop_column("alias_moves", "protected")
