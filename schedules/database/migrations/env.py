"""Alembic's entry: migrations run in the transaction that `migrate.upgrade` hands over."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
context.run_migrations()
