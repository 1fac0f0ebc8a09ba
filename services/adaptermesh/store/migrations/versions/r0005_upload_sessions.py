"""Uploads that can be continued: what was begun, and which parts have been received.

Revision ID: r0005
Revises: r0004
"""

import sqlalchemy as sa
from alembic import op

revision = "r0005"
down_revision = "r0004"
branch_labels = None
depends_on = None

_DIGEST = sa.String(length=71)
_KEY = sa.String(length=200).with_variant(sa.String(length=200, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "upload_sessions",
        sa.Column("id", _DIGEST, nullable=False),
        sa.Column("header", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("expire_time_us", sa.BigInteger(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("tenant", _KEY, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_upload_sessions"),
    )
    op.create_index("ix_upload_sessions_expire_time_us", "upload_sessions", ["expire_time_us"])
    op.create_table(
        "upload_parts",
        sa.Column("session_id", _DIGEST, nullable=False),
        sa.Column("file_index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("offset_bytes", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("digest", _DIGEST, nullable=False),
        sa.ForeignKeyConstraint(
            ["session_id"], ["upload_sessions.id"], name="fk_upload_parts_session_id_upload_sessions"
        ),
        sa.PrimaryKeyConstraint("session_id", "file_index", "offset_bytes", name="pk_upload_parts"),
    )
    op.create_index("ix_upload_parts_digest", "upload_parts", ["digest"])


def downgrade() -> None:
    op.drop_table("upload_parts")
    op.drop_table("upload_sessions")
