"""The catalogue's tables. A change here needs a revision in `migrations/versions`."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)

# Pages go by these columns, so their order must be that of the bytes on every database.
_KEY = String(200).with_variant(String(200, collation="C"), "postgresql")
_DIGEST = String(71)

feed = Table(
    "feed",
    metadata,
    # One row. A mutation takes the next position by updating it, which also lets one writer in at a time.
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("feed_id", String(36), nullable=False),
    Column("head_position", BigInteger, nullable=False),
    # Changes up to here are gone.
    Column("trimmed_position", BigInteger, nullable=False),
)

changes = Table(
    "changes",
    metadata,
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("commit_time_us", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("body", Text, nullable=False),
)

base_models = Table(
    "base_models",
    metadata,
    Column("digest", _DIGEST, primary_key=True),
    Column("model_id", _KEY, nullable=False),
    Column("config_digest", _DIGEST, nullable=False),
    Column("weights_digest", _DIGEST, nullable=False),
    Column("architecture", String(200), nullable=False),
    Column("hidden_size", Integer, nullable=False),
    Column("num_layers", Integer, nullable=False),
    Column("vocab_size", Integer, nullable=False),
    Column("config_json", Text, nullable=False),
    Column("feed_position", BigInteger, nullable=False),
    Index(None, "model_id", "digest"),
)

adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("namespace", _KEY, nullable=False),
    Column("name", _KEY, nullable=False),
    # Also the last number that was given: removed versions count, theirs are never given again.
    Column("version_count", Integer, nullable=False),
    # 0 where every version was removed.
    Column("newest_number", Integer, nullable=False, server_default="0"),
    Column("deleted_count", Integer, nullable=False, server_default="0"),
    # Of all its versions, also of those that are gone.
    Column("download_count", BigInteger, nullable=False, server_default="0"),
    UniqueConstraint("namespace", "name"),
    Index(None, "download_count", "id"),
)

versions = Table(
    "versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", ForeignKey("adapters.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", _DIGEST, nullable=False, unique=True),
    Column("tensor_digest", _DIGEST, nullable=False),
    Column("base_digest", ForeignKey("base_models.digest"), nullable=False),
    Column("base_model_id", _KEY, nullable=False),
    Column("task", String(200), nullable=False),
    Column("description", Text, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("license", Text, nullable=False),
    Column("kind", String(64), nullable=False),
    Column("op_kinds", JSON, nullable=False),
    Column("max_rank", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("servable", Boolean, nullable=False),
    Column("unservable_reason", Text, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("create_time_us", BigInteger, nullable=False),
    Column("source_files", JSON, nullable=False),
    Column("feed_position", BigInteger, nullable=False),
    UniqueConstraint("adapter_id", "number"),
)

blob_removals = Table(
    "blob_removals",
    metadata,
    # Of blobs that no version needed when the row was written, and that may vanish until it is gone.
    Column("digest", _DIGEST, primary_key=True),
    Column("holder", String(36), primary_key=True),
    Column("expire_time_us", BigInteger, nullable=False),
)

version_statuses = Table(
    "version_statuses",
    metadata,
    # A version without a row is active and never was anything else.
    Column("version_id", ForeignKey("versions.id"), primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("replacement", String(512), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("update_time_us", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
)

status_changes = Table(
    "status_changes",
    metadata,
    # Every status that a version ever had. By number, because it stays when the version is removed.
    Column("adapter_id", ForeignKey("adapters.id"), primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("generation", BigInteger, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("replacement", String(512), nullable=False),
    Column("update_time_us", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
)

deleted_versions = Table(
    "deleted_versions",
    metadata,
    # A version that is removed has no row in `versions`, so nothing that reads those can find it.
    Column("adapter_id", ForeignKey("adapters.id"), primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    # Not unique: the same content may have been there, and removed, more than once.
    Column("digest", _DIGEST, nullable=False),
    Column("delete_time_us", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Index(None, "digest"),
)

version_parents = Table(
    "version_parents",
    metadata,
    # What a version was made from, as its manifest says.
    Column("version_id", ForeignKey("versions.id"), primary_key=True, autoincrement=False),
    Column("digest", _DIGEST, primary_key=True),
    Index(None, "digest"),
)

unread_lineages = Table(
    "unread_lineages",
    metadata,
    # Versions of before `version_parents`, whose manifests are still to be read.
    Column("version_id", ForeignKey("versions.id"), primary_key=True, autoincrement=False),
)

version_signatures = Table(
    "version_signatures",
    metadata,
    Column("version_id", ForeignKey("versions.id"), primary_key=True, autoincrement=False),
    # A list: all of them are read with the version.
    Column("entries", JSON, nullable=False),
)

version_downloads = Table(
    "version_downloads",
    metadata,
    # Apart from the versions, which never change. One without a row was never downloaded.
    Column(
        "version_id", ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    ),
    Column("count", BigInteger, nullable=False),
)

namespace_policies = Table(
    "namespace_policies",
    metadata,
    Column("namespace", _KEY, primary_key=True),
    Column("signatures", String(16), nullable=False),
    # The trusted keys.
    Column("keys", JSON, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("update_time_us", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", _KEY, primary_key=True),
    # 0 is no bound.
    Column("max_bytes", BigInteger, nullable=False),
    Column("max_versions", BigInteger, nullable=False),
    Column("max_requests_per_minute", BigInteger, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("update_time_us", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
)

namespaces = Table(
    "namespaces",
    metadata,
    # Every namespace in which there is, or ever was, an adapter, and those that were given away before.
    Column("name", _KEY, primary_key=True),
    Column("tenant", ForeignKey("tenants.name"), nullable=False),
    Column("used_bytes", BigInteger, nullable=False),
    Column("used_versions", BigInteger, nullable=False),
    Index(None, "tenant"),
)

grants = Table(
    "grants",
    metadata,
    Column("namespace", ForeignKey("namespaces.name"), primary_key=True),
    # Empty: every adapter of the namespace.
    Column("name", _KEY, primary_key=True),
    # A tenant, or "*" for everybody.
    Column("grantee", _KEY, primary_key=True),
    Column("roles", JSON, nullable=False),
    Column("update_time_us", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Index(None, "grantee"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(12), primary_key=True),
    # A tenant, or "*" for an operator's key.
    Column("tenant", _KEY, nullable=False),
    Column("roles", JSON, nullable=False),
    Column("namespaces", JSON, nullable=False),
    # What is kept of the secret: see `access/secrets.py`.
    Column("secret_hash", String(200), nullable=False),
    Column("comment", Text, nullable=False),
    Column("create_time_us", BigInteger, nullable=False),
    Column("expire_time_us", BigInteger, nullable=False),
    Column("revoke_time_us", BigInteger, nullable=False),
    Column("last_use_time_us", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("feed_position", BigInteger, nullable=False),
    Index(None, "tenant", "feed_position"),
)

audit_entries = Table(
    "audit_entries",
    metadata,
    # Of each change of the feed one, which stays when the change is gone.
    Column("feed_position", BigInteger, primary_key=True, autoincrement=False),
    Column("time_us", BigInteger, nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", String(512), nullable=False),
    Column("namespace", _KEY, nullable=False),
    Column("tenant", _KEY, nullable=False),
    Column("key_id", String(12), nullable=False),
    Column("key_tenant", _KEY, nullable=False),
    Column("actor", Text, nullable=False),
    Index(None, "tenant", "feed_position"),
    Index(None, "key_tenant", "feed_position"),
    Index(None, "namespace", "feed_position"),
)

search_documents = Table(
    "search_documents",
    metadata,
    # One for each adapter: what can be searched of its newest version. Its words are in `search_words`, whose
    # form is the database's own.
    Column("adapter_id", ForeignKey("adapters.id"), primary_key=True, autoincrement=False),
    Column("version_id", ForeignKey("versions.id"), nullable=False),
    Column("feed_position", BigInteger, nullable=False),
    Column("base_digest", _DIGEST, nullable=False),
    Column("base_model_id", _KEY, nullable=False),
    Column("task", String(200), nullable=False),
    Column("kind", String(64), nullable=False),
    Column("license", Text, nullable=False),
    Index(None, "feed_position"),
    Index(None, "base_model_id", "feed_position"),
    Index(None, "task", "feed_position"),
    Index(None, "kind", "feed_position"),
    Index(None, "license", "feed_position"),
)

search_tags = Table(
    "search_tags",
    metadata,
    # Those of each adapter's newest version, with its position: what has a tag is found in order of time.
    Column("adapter_id", ForeignKey("adapters.id"), primary_key=True, autoincrement=False),
    Column("tag", String(200), primary_key=True),
    Column("feed_position", BigInteger, nullable=False),
    Index(None, "tag", "feed_position"),
)

search_languages = Table(
    "search_languages",
    metadata,
    # Those that the card of each adapter's newest version names.
    Column(
        "adapter_id", ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    ),
    Column("language", String(64), primary_key=True),
    Column("feed_position", BigInteger, nullable=False),
    Index(None, "language", "feed_position"),
)

search_scores = Table(
    "search_scores",
    metadata,
    # What the card of each adapter's newest version says of a metric, as "metric" and as "task/metric".
    Column(
        "adapter_id", ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    ),
    Column("metric", String(200), primary_key=True),
    Column("value", Double, nullable=False),
    Index(None, "metric", "value", "adapter_id"),
)

version_tags = Table(
    "version_tags",
    metadata,
    Column("version_id", ForeignKey("versions.id"), primary_key=True),
    Column("tag", String(200), primary_key=True),
    Index(None, "tag"),
)

upload_sessions = Table(
    "upload_sessions",
    metadata,
    # The digest of the key that the client has.
    Column("id", _DIGEST, primary_key=True),
    # As JSON.
    Column("header", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("expire_time_us", BigInteger, nullable=False),
    # What has become of it, as JSON. Empty until it is completed.
    Column("outcome", Text, nullable=False),
    # Whose share of the room it takes.
    Column("tenant", _KEY, nullable=False),
    Index(None, "expire_time_us"),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("session_id", ForeignKey("upload_sessions.id"), primary_key=True),
    # By the header's order.
    Column("file_index", Integer, primary_key=True, autoincrement=False),
    Column("offset_bytes", BigInteger, primary_key=True, autoincrement=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", _DIGEST, nullable=False),
    Index(None, "digest"),
)

alias_moves = Table(
    "alias_moves",
    metadata,
    Column("adapter_id", Integer, primary_key=True),
    Column("alias", _KEY, primary_key=True),
    Column("generation", BigInteger, primary_key=True, autoincrement=False),
    Column("version_number", Integer, nullable=False),
    # Kept here, because the version may have been removed since.
    Column("digest", _DIGEST, nullable=False),
    Column("update_time_us", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("comment", Text, nullable=False),
    Column("protected", Boolean, nullable=False, server_default=false()),
    # Rows of before this column are settings.
    Column("action", String(16), nullable=False, server_default="set"),
    ForeignKeyConstraint(["adapter_id"], ["adapters.id"]),
)

aliases = Table(
    "aliases",
    metadata,
    Column("adapter_id", Integer, primary_key=True),
    Column("alias", _KEY, primary_key=True),
    # The move that holds now. An alias that was removed has no row here.
    Column("generation", BigInteger, nullable=False),
    ForeignKeyConstraint(
        ["adapter_id", "alias", "generation"],
        ["alias_moves.adapter_id", "alias_moves.alias", "alias_moves.generation"],
    ),
)

routes = Table(
    "routes",
    metadata,
    Column("tenant", _KEY, primary_key=True),
    Column("task", _KEY, primary_key=True),
    Column("targets", JSON, nullable=False),
    # Goes on counting over a deletion, so that a generation never stands for two different routes.
    Column("generation", BigInteger, nullable=False),
    Column("update_time_us", BigInteger, nullable=False),
    Column("deleted", Boolean, nullable=False),
)
