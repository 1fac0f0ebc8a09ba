"""Removals of blobs that are under way.

Revision ID: r0008
Revises: r0007
"""

import sqlalchemy as sa
from alembic import op

revision = "r0008"
down_revision = "r0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "blob_removals",
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("holder", sa.String(length=36), nullable=False),
        sa.Column("expire_time_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("digest", "holder", name="pk_blob_removals"),
    )


def downgrade() -> None:
    op.drop_table("blob_removals")
