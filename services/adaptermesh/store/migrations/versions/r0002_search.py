"""Documents for the search: what can be searched of each adapter's newest version, and its words.

Cards are not in the database: those of adapters that are there already are found after their next version.

Revision ID: r0002
Revises: r0001
"""

import re
import unicodedata

import sqlalchemy as sa
from alembic import op

revision = "r0002"
down_revision = "r0001"
branch_labels = None
depends_on = None

_KEY = sa.String(length=200).with_variant(sa.String(length=200, collation="C"), "postgresql")
_DIGEST = sa.String(length=71)
_FIELDS = ("base_digest", "base_model_id", "task", "kind", "license")
_AT_ONCE = 500


def upgrade() -> None:
    op.create_table(
        "search_documents",
        sa.Column("adapter_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("feed_position", sa.BigInteger(), nullable=False),
        sa.Column("base_digest", _DIGEST, nullable=False),
        sa.Column("base_model_id", _KEY, nullable=False),
        sa.Column("task", sa.String(length=200), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("license", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", name="pk_search_documents"),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_search_documents_adapter_id_adapters"
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["versions.id"], name="fk_search_documents_version_id_versions"
        ),
    )
    op.create_index("ix_search_documents_feed_position", "search_documents", ["feed_position"])
    for field in ("base_model_id", "task", "kind", "license"):
        name = f"ix_search_documents_{field}_feed_position"
        op.create_index(name, "search_documents", [field, "feed_position"])
    op.create_table(
        "search_tags",
        sa.Column("adapter_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("tag", sa.String(length=200), nullable=False),
        sa.Column("feed_position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", "tag", name="pk_search_tags"),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_search_tags_adapter_id_adapters"),
    )
    op.create_index("ix_search_tags_tag_feed_position", "search_tags", ["tag", "feed_position"])
    postgres = op.get_bind().dialect.name == "postgresql"
    if postgres:
        op.execute(
            "CREATE TABLE search_words ("
            "adapter_id INTEGER PRIMARY KEY REFERENCES adapters (id), document TSVECTOR NOT NULL)"
        )
        op.execute("CREATE INDEX ix_search_words_document ON search_words USING gin (document)")
    else:
        op.execute(
            "CREATE VIRTUAL TABLE search_words USING fts5("
            "name, tags, description, card, tokenize = 'unicode61 remove_diacritics 0', prefix = '2 3')"
        )
    _fill(postgres=postgres)


def downgrade() -> None:
    op.drop_table("search_words")
    op.drop_table("search_tags")
    op.drop_table("search_documents")


def _fill(*, postgres: bool) -> None:
    connection = op.get_bind()
    adapters = sa.table("adapters", *_plain("id", "namespace", "name", "version_count"))
    versions = sa.table(
        "versions",
        *_plain("id", "adapter_id", "number", "feed_position", "description", *_FIELDS),
        sa.column("tags", sa.JSON()),
    )
    newest = (versions.c.adapter_id == adapters.c.id) & (versions.c.number == adapters.c.version_count)
    documents = sa.select(
        adapters.c.id, versions.c.id, versions.c.feed_position, *(versions.c[field] for field in _FIELDS)
    ).join(versions, newest)
    columns = ("adapter_id", "version_id", "feed_position", *_FIELDS)
    target = sa.table("search_documents", *_plain(*columns))
    connection.execute(sa.insert(target).from_select(columns, documents))
    version_tags = sa.table("version_tags", *_plain("version_id", "tag"))
    tags = (
        sa.select(adapters.c.id, version_tags.c.tag, versions.c.feed_position)
        .join(versions, newest)
        .join(version_tags, version_tags.c.version_id == versions.c.id)
    )
    tag_columns = ("adapter_id", "tag", "feed_position")
    target = sa.table("search_tags", *_plain(*tag_columns))
    connection.execute(sa.insert(target).from_select(tag_columns, tags))
    texts = (
        sa.select(
            adapters.c.id, adapters.c.namespace, adapters.c.name, versions.c.description, versions.c.tags
        )
        .join(versions, newest)
        .order_by(adapters.c.id)
    )
    statement = sa.text(_INSERT_POSTGRES if postgres else _INSERT_SQLITE)
    last = 0
    while rows := connection.execute(texts.where(adapters.c.id > last).limit(_AT_ONCE)).all():
        last = rows[-1].id
        connection.execute(
            statement,
            [
                {
                    "id": row.id,
                    "name": _words(f"{row.namespace}/{row.name}"),
                    "tags": _words(" ".join(row.tags)),
                    "description": _words(row.description),
                }
                for row in rows
            ],
        )


_INSERT_SQLITE = (
    "INSERT INTO search_words (rowid, name, tags, description, card) "
    "VALUES (:id, :name, :tags, :description, '')"
)
_INSERT_POSTGRES = (
    "INSERT INTO search_words (adapter_id, document) VALUES (:id, "
    "setweight(to_tsvector('simple', :name), 'A') || setweight(to_tsvector('simple', :tags), 'B') || "
    "setweight(to_tsvector('simple', :description), 'C'))"
)


def _plain(*names: str) -> tuple[sa.ColumnClause[object], ...]:
    return tuple(sa.column(name) for name in names)


def _words(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return " ".join(word[:64] for word in re.findall(r"[^\W_]+", unicodedata.normalize("NFC", plain)))
