"""Alembic's environment: migrates over the application's engine."""

from alembic import context

from shop import Base, engine

with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        context.run_migrations()
