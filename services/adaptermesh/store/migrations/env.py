"""Alembic's entry: runs on the connection that `adaptermesh.store.migration` hands over."""

from alembic import context

from adaptermesh.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
# No transaction of its own: the caller's covers the lock, every revision and the feed's identity.
context.run_migrations()
