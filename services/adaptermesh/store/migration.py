"""Brings a database to the newest schema, and gives a new one its identity."""

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, insert, select

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store import schema

log = logging.getLogger(__name__)

_SCRIPTS = Path(__file__).parent / "migrations"


def migrate(connection: Connection, new_feed_id: str) -> None:
    """Runs what is missing, inside the caller's write transaction, which keeps every other writer out.

    Args:
        connection: in a write transaction that the caller commits.
        new_feed_id: the feed's identity if the database is new.

    Raises:
        MeshError: FAILED_PRECONDITION if a newer store has brought the database to a schema of its own.
    """
    # It logs how it works at INFO; what it did is logged below.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    before = MigrationContext.configure(connection).get_current_revision()
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if before is not None and before not in known:
        message = f"the database has schema {before}, of a newer store than this one"
        raise MeshError(Code.FAILED_PRECONDITION, Reason.INTERNAL, message)
    command.upgrade(config, "head")
    after = MigrationContext.configure(connection).get_current_revision()
    if connection.execute(select(schema.feed.c.id)).first() is None:
        row = {"id": 1, "feed_id": new_feed_id, "head_position": 0, "trimmed_position": 0}
        connection.execute(insert(schema.feed).values(row))
    if before != after:
        log.info("database migrated", extra={"from_revision": before or "", "to_revision": after or ""})
