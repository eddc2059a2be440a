"""Celery for FastAPI and Flask, as if they had been built together."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from celeriac.errors import CeleriacError, ConfigurationError, PublishError, exit_on_error

if TYPE_CHECKING:
    from celeriac.app import adopt, create_celery, current_app, default_app, settings_of, use_app
    from celeriac.publish import adelay, asend_task, publish_many
    from celeriac.settings import Settings
    from celeriac.typed import shared_task

__all__ = [
    "CeleriacError",
    "ConfigurationError",
    "PublishError",
    "Settings",
    "adelay",
    "adopt",
    "asend_task",
    "create_celery",
    "current_app",
    "default_app",
    "exit_on_error",
    "publish_many",
    "settings_of",
    "shared_task",
    "use_app",
]
_MODULES = {
    "Settings": "settings",
    "adelay": "publish",
    "asend_task": "publish",
    "publish_many": "publish",
    "shared_task": "typed",
}


def __getattr__(name: str) -> Any:
    """Import on first use: whoever wants one part does not wait for redis and pydantic."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"celeriac.{_MODULES.get(name, 'app')}"), name)
