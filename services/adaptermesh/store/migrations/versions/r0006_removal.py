"""Versions that are removed, what versions were made from, and every status that a version ever had.

Revision ID: r0006
Revises: r0005
"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "r0006"
down_revision = "r0005"
branch_labels = None
depends_on = None

_KEY = sa.String(length=200).with_variant(sa.String(length=200, collation="C"), "postgresql")
_DIGEST = sa.String(length=71)
_MOVED_VERSION = "fk_alias_moves_adapter_id_version_number"
_ROWS_AT_ONCE = 500
_STATUS = ("generation", "state", "reason", "replacement", "update_time_us", "actor")


def upgrade() -> None:
    for name in ("newest_number", "deleted_count"):
        op.add_column("adapters", sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
    op.execute("UPDATE adapters SET newest_number = version_count")
    _make_tables()
    op.execute("INSERT INTO unread_lineages (version_id) SELECT id FROM versions")
    _keep_status_history()
    _free_moves()


def downgrade() -> None:
    # An older store can't read changes of kinds that it does not know: who follows takes a snapshot.
    op.execute("DELETE FROM changes")
    op.execute("UPDATE feed SET trimmed_position = head_position")
    # What is removed is in no older schema, nor can its place in the history of an alias be.
    _bind_moves()
    for name in ("unread_lineages", "version_parents", "deleted_versions", "status_changes"):
        op.drop_table(name)
    # An older store takes this for the number of the newest version.
    op.execute("UPDATE adapters SET version_count = newest_number")
    op.execute("DELETE FROM adapters WHERE version_count = 0")
    for name in ("deleted_count", "newest_number"):
        op.drop_column("adapters", name)


def _make_tables() -> None:
    op.create_table(
        "status_changes",
        sa.Column("adapter_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("generation", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("replacement", sa.String(length=512), nullable=False),
        sa.Column("update_time_us", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_status_changes_adapter_id"),
        sa.PrimaryKeyConstraint("adapter_id", "number", "generation", name="pk_status_changes"),
    )
    op.create_table(
        "deleted_versions",
        sa.Column("adapter_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", _DIGEST, nullable=False),
        sa.Column("delete_time_us", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_deleted_versions_adapter_id"),
        sa.PrimaryKeyConstraint("adapter_id", "number", name="pk_deleted_versions"),
    )
    op.create_index("ix_deleted_versions_digest", "deleted_versions", ["digest"])
    op.create_table(
        "version_parents",
        sa.Column("version_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", _DIGEST, nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_version_parents_version_id"),
        sa.PrimaryKeyConstraint("version_id", "digest", name="pk_version_parents"),
    )
    op.create_index("ix_version_parents_digest", "version_parents", ["digest"])
    op.create_table(
        "unread_lineages",
        sa.Column("version_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_unread_lineages_version_id"),
        sa.PrimaryKeyConstraint("version_id", name="pk_unread_lineages"),
    )


def _keep_status_history() -> None:
    """Every status that the feed still has; of a version whose statuses it has lost, the one of now."""
    connection = op.get_bind()
    known = sa.table("status_changes", *map(sa.column, ("adapter_id", "number", *_STATUS)))
    rows = _statuses_of_feed(connection)
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        connection.execute(sa.insert(known), some)
    names = ", ".join(_STATUS)
    op.execute(
        f"INSERT INTO status_changes (adapter_id, number, {names}) "  # noqa: S608 (constants)
        f"SELECT v.adapter_id, v.number, {', '.join(f's.{name}' for name in _STATUS)} "
        "FROM version_statuses s JOIN versions v ON v.id = s.version_id WHERE NOT EXISTS (SELECT 1 FROM "
        "status_changes c WHERE c.adapter_id = v.adapter_id AND c.number = v.number "
        "AND c.generation = s.generation)"
    )


def _statuses_of_feed(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    position = 0
    page = sa.text(
        "SELECT position, body FROM changes WHERE kind = 'version_status_set' AND position > :position "
        "ORDER BY position LIMIT 500"
    )
    find = sa.text("SELECT id FROM adapters WHERE namespace = :namespace AND name = :name")
    while rows := connection.execute(page, {"position": position}).all():
        for row in rows:
            version = json.loads(row.body)
            names = {"namespace": version["namespace"], "name": version["name"]}
            adapter_id = connection.execute(find, names).scalar()
            if adapter_id is not None:
                status = {name: version["status"][name] for name in _STATUS}
                yield {"adapter_id": adapter_id, "number": version["number"], **status}
        position = rows[-1].position


def _free_moves() -> None:
    """The history of an alias keeps a version's digest itself: the version need not be there any more."""
    if op.get_bind().dialect.name == "sqlite":
        digest = (
            "(SELECT v.digest FROM versions v WHERE v.adapter_id = m.adapter_id "
            "AND v.number = m.version_number)"
        )
        bound = sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_alias_moves_adapter_id")
        _make_moves_again(digest, (sa.Column("digest", _DIGEST, nullable=False),), bound)
        return
    op.add_column("alias_moves", sa.Column("digest", _DIGEST))
    op.execute(
        "UPDATE alias_moves SET digest = v.digest FROM versions v "
        "WHERE v.adapter_id = alias_moves.adapter_id AND v.number = alias_moves.version_number"
    )
    op.alter_column("alias_moves", "digest", nullable=False)
    op.drop_constraint(_MOVED_VERSION, "alias_moves", type_="foreignkey")
    op.create_foreign_key("fk_alias_moves_adapter_id", "alias_moves", "adapters", ["adapter_id"], ["id"])


def _bind_moves() -> None:
    op.execute(
        "DELETE FROM alias_moves WHERE NOT EXISTS (SELECT 1 FROM versions v "
        "WHERE v.adapter_id = alias_moves.adapter_id AND v.number = alias_moves.version_number)"
    )
    columns, versions = ["adapter_id", "version_number"], ["adapter_id", "number"]
    if op.get_bind().dialect.name == "sqlite":
        bound = sa.ForeignKeyConstraint(
            columns, [f"versions.{name}" for name in versions], name=_MOVED_VERSION
        )
        _make_moves_again("", (), bound)
        return
    op.drop_constraint("fk_alias_moves_adapter_id", "alias_moves", type_="foreignkey")
    op.create_foreign_key(_MOVED_VERSION, "alias_moves", "versions", columns, versions)
    op.drop_column("alias_moves", "digest")


def _make_moves_again(digest: str, added: tuple[sa.Column[Any], ...], bound: sa.Constraint) -> None:
    """SQLite can't change a foreign key, nor remove a table that others name: so `aliases` goes first."""
    op.execute("CREATE TABLE kept_aliases AS SELECT adapter_id, alias, generation FROM aliases")
    op.drop_table("aliases")
    op.rename_table("alias_moves", "kept_moves")
    names = [
        "adapter_id",
        "alias",
        "generation",
        "version_number",
        "update_time_us",
        "actor",
        "comment",
        "protected",
        "action",
    ]
    op.create_table(
        "alias_moves",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("alias", _KEY, nullable=False),
        sa.Column("generation", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("version_number", sa.Integer(), nullable=False),
        sa.Column("update_time_us", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("protected", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("action", sa.String(length=16), nullable=False, server_default="set"),
        *added,
        bound,
        sa.PrimaryKeyConstraint("adapter_id", "alias", "generation", name="pk_alias_moves"),
    )
    into = ", ".join([*names, *(["digest"] if digest else [])])
    values = ", ".join([*(f"m.{name}" for name in names), *([digest] if digest else [])])
    op.execute(f"INSERT INTO alias_moves ({into}) SELECT {values} FROM kept_moves m")  # noqa: S608 (constants)
    op.drop_table("kept_moves")
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
    op.execute("INSERT INTO aliases SELECT adapter_id, alias, generation FROM kept_aliases")
    op.drop_table("kept_aliases")
