"""How often versions were downloaded, and what cards say of languages and metrics.

Cards are not in the database: the languages and metrics of adapters that are there already are found after
their next version.

Revision ID: r0007
Revises: r0006
"""

import sqlalchemy as sa
from alembic import op

revision = "r0007"
down_revision = "r0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "adapters", sa.Column("download_count", sa.BigInteger(), nullable=False, server_default="0")
    )
    op.create_index("ix_adapters_download_count_id", "adapters", ["download_count", "id"])
    op.create_table(
        "version_downloads",
        sa.Column("version_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("version_id", name="pk_version_downloads"),
        sa.ForeignKeyConstraint(
            ["version_id"], ["versions.id"], name="fk_version_downloads_version_id", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "search_languages",
        sa.Column("adapter_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("language", sa.String(length=64), nullable=False),
        sa.Column("feed_position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", "language", name="pk_search_languages"),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_search_languages_adapter_id", ondelete="CASCADE"
        ),
    )
    op.create_index(
        "ix_search_languages_language_feed_position", "search_languages", ["language", "feed_position"]
    )
    op.create_table(
        "search_scores",
        sa.Column("adapter_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("metric", sa.String(length=200), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", "metric", name="pk_search_scores"),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_search_scores_adapter_id", ondelete="CASCADE"
        ),
    )
    op.create_index(
        "ix_search_scores_metric_value_adapter_id", "search_scores", ["metric", "value", "adapter_id"]
    )
    if op.get_bind().dialect.name == "postgresql":
        # SQLite's index knows by itself which words are of the name.
        op.execute("ALTER TABLE search_words ADD COLUMN names TSVECTOR NOT NULL DEFAULT ''::tsvector")
        op.execute("UPDATE search_words SET names = ts_filter(document, '{a}')")
        op.execute("CREATE INDEX ix_search_words_names ON search_words USING gin (names)")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE search_words DROP COLUMN names")
    op.drop_table("search_scores")
    op.drop_table("search_languages")
    op.drop_table("version_downloads")
    op.drop_index("ix_adapters_download_count_id", table_name="adapters")
    op.drop_column("adapters", "download_count")
