"""Celery for FastAPI and Flask, as if they had been built together."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from celeriac.errors import CeleriacError, ConfigurationError, ServiceError, exit_on_error

if TYPE_CHECKING:
    from celeriac.app import adopt, create_celery, current_app, default_app, settings_of, use_app
    from celeriac.settings import Settings

__all__ = [
    "CeleriacError",
    "ConfigurationError",
    "ServiceError",
    "Settings",
    "adopt",
    "create_celery",
    "current_app",
    "default_app",
    "exit_on_error",
    "settings_of",
    "use_app",
]


def __getattr__(name: str) -> Any:
    """Import on first use: whoever wants one part does not wait for redis and pydantic."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module("celeriac.settings" if name == "Settings" else "celeriac.app")
    return getattr(module, name)
