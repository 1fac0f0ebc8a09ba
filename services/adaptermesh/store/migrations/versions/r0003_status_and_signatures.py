"""What is said of a version after its upload, protected aliases, signatures, and the policies of namespaces.

Revision ID: r0003
Revises: r0002
"""

import sqlalchemy as sa
from alembic import op

revision = "r0003"
down_revision = "r0002"
branch_labels = None
depends_on = None

_KEY = sa.String(length=200).with_variant(sa.String(length=200, collation="C"), "postgresql")


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
    op.add_column(
        "alias_moves", sa.Column("protected", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    op.add_column(
        "alias_moves", sa.Column("action", sa.String(length=16), nullable=False, server_default="set")
    )
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
    op.drop_column("alias_moves", "action")
    op.drop_column("alias_moves", "protected")
    op.drop_table("version_statuses")
