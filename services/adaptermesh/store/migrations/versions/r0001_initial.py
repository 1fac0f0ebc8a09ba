"""The initial schema.

Revision ID: r0001
Revises: none
"""

import sqlalchemy as sa
from alembic import op

revision = "r0001"
down_revision = None
branch_labels = None
depends_on = None

_KEY = sa.String(length=200).with_variant(sa.String(length=200, collation="C"), "postgresql")
_DIGEST = sa.String(length=71)


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("namespace", _KEY, nullable=False),
        sa.Column("name", _KEY, nullable=False),
        sa.Column("version_count", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_adapters"),
        sa.UniqueConstraint("namespace", "name", name="uq_adapters_namespace_name"),
    )
    op.create_table(
        "base_models",
        sa.Column("digest", _DIGEST, nullable=False),
        sa.Column("model_id", _KEY, nullable=False),
        sa.Column("config_digest", _DIGEST, nullable=False),
        sa.Column("weights_digest", _DIGEST, nullable=False),
        sa.Column("architecture", sa.String(length=200), nullable=False),
        sa.Column("hidden_size", sa.Integer(), nullable=False),
        sa.Column("num_layers", sa.Integer(), nullable=False),
        sa.Column("vocab_size", sa.Integer(), nullable=False),
        sa.Column("config_json", sa.Text(), nullable=False),
        sa.Column("feed_position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_base_models"),
    )
    op.create_index("ix_base_models_model_id_digest", "base_models", ["model_id", "digest"])
    op.create_table(
        "changes",
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("commit_time_us", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("position", name="pk_changes"),
    )
    op.create_table(
        "feed",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("feed_id", sa.String(length=36), nullable=False),
        sa.Column("head_position", sa.BigInteger(), nullable=False),
        sa.Column("trimmed_position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_feed"),
    )
    op.create_table(
        "routes",
        sa.Column("tenant", _KEY, nullable=False),
        sa.Column("task", _KEY, nullable=False),
        sa.Column("targets", sa.JSON(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("update_time_us", sa.BigInteger(), nullable=False),
        sa.Column("deleted", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "task", name="pk_routes"),
    )
    op.create_table(
        "versions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", _DIGEST, nullable=False),
        sa.Column("tensor_digest", _DIGEST, nullable=False),
        sa.Column("base_digest", _DIGEST, nullable=False),
        sa.Column("base_model_id", _KEY, nullable=False),
        sa.Column("task", sa.String(length=200), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("license", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("op_kinds", sa.JSON(), nullable=False),
        sa.Column("max_rank", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("servable", sa.Boolean(), nullable=False),
        sa.Column("unservable_reason", sa.Text(), nullable=False),
        sa.Column("warnings", sa.JSON(), nullable=False),
        sa.Column("create_time_us", sa.BigInteger(), nullable=False),
        sa.Column("source_files", sa.JSON(), nullable=False),
        sa.Column("feed_position", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_versions_adapter_id"),
        sa.ForeignKeyConstraint(["base_digest"], ["base_models.digest"], name="fk_versions_base_digest"),
        sa.PrimaryKeyConstraint("id", name="pk_versions"),
        sa.UniqueConstraint("adapter_id", "number", name="uq_versions_adapter_id_number"),
        sa.UniqueConstraint("digest", name="uq_versions_digest"),
    )
    op.create_table(
        "alias_moves",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("alias", _KEY, nullable=False),
        sa.Column("generation", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("version_number", sa.Integer(), nullable=False),
        sa.Column("update_time_us", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id", "version_number"],
            ["versions.adapter_id", "versions.number"],
            name="fk_alias_moves_adapter_id_version_number",
        ),
        sa.PrimaryKeyConstraint("adapter_id", "alias", "generation", name="pk_alias_moves"),
    )
    op.create_table(
        "version_tags",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("tag", sa.String(length=200), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_version_tags_version_id"),
        sa.PrimaryKeyConstraint("version_id", "tag", name="pk_version_tags"),
    )
    op.create_index("ix_version_tags_tag", "version_tags", ["tag"])
    op.create_table(
        "aliases",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("alias", _KEY, nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id", "alias", "generation"],
            ["alias_moves.adapter_id", "alias_moves.alias", "alias_moves.generation"],
            name="fk_aliases_adapter_id_alias_generation",
        ),
        sa.PrimaryKeyConstraint("adapter_id", "alias", name="pk_aliases"),
    )


def downgrade() -> None:
    op.drop_table("aliases")
    op.drop_index("ix_version_tags_tag", table_name="version_tags")
    op.drop_table("version_tags")
    op.drop_table("alias_moves")
    op.drop_table("versions")
    op.drop_table("routes")
    op.drop_table("feed")
    op.drop_table("changes")
    op.drop_index("ix_base_models_model_id_digest", table_name="base_models")
    op.drop_table("base_models")
    op.drop_table("adapters")
