"""Runs revisions on the connection that `database.migrate` gives, in its transaction."""

from alembic import context

from simrl.study.database import REVISION_TABLE, metadata

context.configure(
    connection=context.config.attributes['connection'], target_metadata=metadata, version_table=REVISION_TABLE
)
with context.begin_transaction():
    context.run_migrations()
