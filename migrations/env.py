"""Alembic's environment. hubtool hands over an open connection inside a transaction; there is no alembic.ini."""

from __future__ import annotations

from alembic import context

from hubtool.registry.schema import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,  # SQLite alters tables by copying them
    transactional_ddl=True,
)
context.run_migrations()
