from importlib import import_module

from alembic import context
from celeriac import exit_on_error
from celeriac.database import Database
from project import FEATURES
from project.config import load_config
from project.database import Base

for feature in FEATURES:
    import_module(f"project.{feature}.models")


def run() -> None:
    config = load_config()
    database = Database(config.database_url, connect_args=config.database_connect_dict)
    with database.engine.connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            compare_type=True,
            render_as_batch=connection.dialect.name == "sqlite",  # SQLite cannot alter a column
        )
        with context.begin_transaction():
            context.run_migrations()
    database.dispose()


def run_offline() -> None:
    database = Database(load_config().database_url)
    context.configure(
        url=database.url, target_metadata=Base.metadata, literal_binds=True, compare_type=True
    )
    with context.begin_transaction():
        context.run_migrations()


with exit_on_error():
    if context.is_offline_mode():
        run_offline()
    else:
        run()
