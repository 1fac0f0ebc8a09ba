"""Signatures of versions, and what a namespace asks of its versions.

Revision ID: r0002c
Revises: r0002b
"""

import sqlalchemy as sa
from alembic import op

revision = "r0002c"
down_revision = "r0002b"
branch_labels = None
depends_on = None

_KEY = sa.String(length=200).with_variant(sa.String(length=200, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "version_signatures",
        sa.Column("version_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("entries", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_version_signatures_version_id"),
        sa.PrimaryKeyConstraint("version_id", name="pk_version_signatures"),
    )
    op.create_table(
        "namespace_policies",
        sa.Column("namespace", _KEY, nullable=False),
        sa.Column("signatures", sa.String(length=16), nullable=False),
        sa.Column("keys", sa.JSON(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("update_time_us", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("namespace", name="pk_namespace_policies"),
    )


def downgrade() -> None:
    op.drop_table("namespace_policies")
    op.drop_table("version_signatures")
