"""What is said of a version after its upload.

Revision ID: r0002
Revises: r0001
"""

import sqlalchemy as sa
from alembic import op

revision = "r0002"
down_revision = "r0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "version_statuses",
        sa.Column("version_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("replacement", sa.String(length=512), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("update_time_us", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_version_statuses_version_id"),
        sa.PrimaryKeyConstraint("version_id", name="pk_version_statuses"),
    )


def downgrade() -> None:
    op.drop_table("version_statuses")
