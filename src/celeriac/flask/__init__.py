"""Flask's edge: configuration that comes late, the application's context in every task, status."""

from celeriac.flask.blueprint import find_task, status_blueprint
from celeriac.flask.config import FileConfig, read_config
from celeriac.flask.extension import Celeriac
from celeriac.flask.owners import public
from celeriac.web.owners import PUBLIC, ReadTokens
from celeriac.web.shown import TaskStatus, shown_error

__all__ = [
    "PUBLIC",
    "Celeriac",
    "FileConfig",
    "ReadTokens",
    "TaskStatus",
    "find_task",
    "public",
    "read_config",
    "shown_error",
    "status_blueprint",
]
