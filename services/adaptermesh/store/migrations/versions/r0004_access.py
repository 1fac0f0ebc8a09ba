"""Tenants and their namespaces, API keys, grants, and the audit log.

All namespaces that are there belong to the tenant "default". The audit log begins here.

Revision ID: r0004
Revises: r0003
"""

import json
from collections import defaultdict

import sqlalchemy as sa
from alembic import op

revision = "r0004"
down_revision = "r0003"
branch_labels = None
depends_on = None

_KEY = sa.String(length=200).with_variant(sa.String(length=200, collation="C"), "postgresql")
_AT_ONCE = 500


def upgrade() -> None:
    _make_tenants()
    _make_grants_and_keys()
    op.create_table(
        "audit_entries",
        sa.Column("feed_position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("time_us", sa.BigInteger(), nullable=False),
        sa.Column("action", sa.String(length=32), nullable=False),
        sa.Column("subject", sa.String(length=512), nullable=False),
        sa.Column("namespace", _KEY, nullable=False),
        sa.Column("tenant", _KEY, nullable=False),
        sa.Column("key_id", sa.String(length=12), nullable=False),
        sa.Column("key_tenant", _KEY, nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("feed_position", name="pk_audit_entries"),
    )
    for column in ("tenant", "key_tenant", "namespace"):
        op.create_index(
            f"ix_audit_entries_{column}_feed_position", "audit_entries", [column, "feed_position"]
        )
    _fill()


def downgrade() -> None:
    # An older store can't read changes of kinds that it does not know: who follows takes a snapshot.
    op.execute("DELETE FROM changes")
    op.execute("UPDATE feed SET trimmed_position = head_position")
    for table in ("audit_entries", "api_keys", "grants", "namespaces", "tenants"):
        op.drop_table(table)


def _make_tenants() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", _KEY, nullable=False),
        sa.Column("max_bytes", sa.BigInteger(), nullable=False),
        sa.Column("max_versions", sa.BigInteger(), nullable=False),
        sa.Column("max_requests_per_minute", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("update_time_us", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.create_table(
        "namespaces",
        sa.Column("name", _KEY, nullable=False),
        sa.Column("tenant", _KEY, nullable=False),
        sa.Column("used_bytes", sa.BigInteger(), nullable=False),
        sa.Column("used_versions", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_namespaces_tenant"),
        sa.PrimaryKeyConstraint("name", name="pk_namespaces"),
    )
    op.create_index("ix_namespaces_tenant", "namespaces", ["tenant"])


def _make_grants_and_keys() -> None:
    op.create_table(
        "grants",
        sa.Column("namespace", _KEY, nullable=False),
        sa.Column("name", _KEY, nullable=False),
        sa.Column("grantee", _KEY, nullable=False),
        sa.Column("roles", sa.JSON(), nullable=False),
        sa.Column("update_time_us", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["namespace"], ["namespaces.name"], name="fk_grants_namespace"),
        sa.PrimaryKeyConstraint("namespace", "name", "grantee", name="pk_grants"),
    )
    op.create_index("ix_grants_grantee", "grants", ["grantee"])
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(length=12), nullable=False),
        sa.Column("tenant", _KEY, nullable=False),
        sa.Column("roles", sa.JSON(), nullable=False),
        sa.Column("namespaces", sa.JSON(), nullable=False),
        sa.Column("secret_hash", sa.String(length=200), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("create_time_us", sa.BigInteger(), nullable=False),
        sa.Column("expire_time_us", sa.BigInteger(), nullable=False),
        sa.Column("revoke_time_us", sa.BigInteger(), nullable=False),
        sa.Column("last_use_time_us", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("feed_position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key_id", name="pk_api_keys"),
    )
    op.create_index("ix_api_keys_tenant_feed_position", "api_keys", ["tenant", "feed_position"])


def _fill() -> None:
    connection = op.get_bind()
    connection.execute(sa.text("INSERT INTO tenants VALUES ('default', 0, 0, 0, 0, 0, '')"))
    sizes: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)
    query = sa.text(
        "SELECT a.namespace, v.size_bytes, v.source_files "
        "FROM versions v JOIN adapters a ON a.id = v.adapter_id"
    )
    for namespace, size_bytes, source_files in connection.execute(query):
        # JSON comes as text from SQLite, and as a list from PostgreSQL.
        files = json.loads(source_files) if isinstance(source_files, str) else source_files
        sizes[namespace] += size_bytes + sum(file["size_bytes"] for file in files)
        counts[namespace] += 1
    rows = [{"name": name, "bytes": sizes[name], "versions": counts[name]} for name in sorted(counts)]
    fill = sa.text("INSERT INTO namespaces VALUES (:name, 'default', :bytes, :versions)")
    for start in range(0, len(rows), _AT_ONCE):
        connection.execute(fill, rows[start : start + _AT_ONCE])
