"""The extension: a Celery app for each Flask application that it is given to."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from celery import Celery, Task
from flask import Flask, Response, current_app, g, has_app_context, jsonify

from celeriac import records
from celeriac.app import create_celery, find_app_with
from celeriac.app import current_app as current_celery
from celeriac.errors import ConfigurationError
from celeriac.flask.config import settings_from
from celeriac.flask.owners import OwnerPolicy, checked
from celeriac.flask.reads import Reads
from celeriac.typed import App, TaskMaker, shared_task, typed
from celeriac.web.owners import publisher
from celeriac.web.shown import AWAY, TRY_AGAIN, away

_KEY = "celeriac"


class Celeriac:
    """Celery in a Flask application: `celery = Celeriac()`, later `celery.init_app(app)`.

    It can be imported, and tasks be made with `@celery.task`, before there is any configuration.
    `init_app` makes the Celery app, from `app.config` (see `init_app`); it is the one that is meant
    in the application's context and in its tasks, and `app.extensions["celery"]` for `celery -A`.
    Given to several applications, it keeps them apart: each has its own Celery app, and all have
    its tasks. What else a Celery app has (`send_task`, `AsyncResult`, …) is that of the
    application whose context this is, or of the only one.
    """

    task: TaskMaker = staticmethod(shared_task)  # type: ignore[assignment]

    def __init__(self, app: Flask | None = None, *, owner: OwnerPolicy | None = None) -> None:
        """`app` and `owner` as in `init_app`."""
        self._given = False
        if app is not None:
            self.init_app(app, owner=owner)

    def init_app(self, app: Flask, *, owner: OwnerPolicy | None = None) -> None:
        """Give `app` its Celery app.

        From `app.config["CELERY"]`, a mapping of Celery's options by their lower-case names, and
        `CELERY_<OPTION>` keys; those of `celeriac.Settings`, such as `publish_timeout`, go in the
        same places. What neither says comes from the environment. `owner` is the policy that says
        whose the tasks are that a request sends.

        Raises ConfigurationError for what Celery does not have.
        """
        settings, options = settings_from(app.config)
        celery = create_celery(
            settings, name=app.import_name, task_context=_context_of(app), **options
        )
        self._given = True
        app.extensions[_KEY] = _Place(celery)
        app.extensions["celery"] = celery  # where Flask's own documentation has it
        for error in AWAY:
            app.register_error_handler(error, _unavailable)
        if owner is not None:
            _publish_as(app, owner)

    @property
    def app(self) -> App:
        """The Celery app of the Flask application whose context this is, or of the only one.

        Raises ConfigurationError where there is none yet, and AmbiguousAppError.
        """
        if not self._given:
            raise ConfigurationError("Celeriac: call init_app(app) first")
        return typed(current_celery())

    @staticmethod
    def stop(app: Flask) -> None:
        """End the streams and the long polls of `app`: a server that stops waits for them."""
        place_of(app).reads.stop()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by whoever inspects it
            raise AttributeError(name)
        return getattr(self.app, name)


class _Place:
    """What an application has of celeriac."""

    def __init__(self, celery: App) -> None:
        self.celery = celery
        self.reads = Reads(celery)


def place_of(app: Flask) -> _Place:
    """Raises ConfigurationError where `init_app` was not called."""
    place = app.extensions.get(_KEY)
    if not isinstance(place, _Place):
        raise ConfigurationError(f"Flask application {app.name!r}: call Celeriac().init_app(app)")
    return place


def _of_context() -> Celery | None:
    place = current_app.extensions.get(_KEY) if has_app_context() else None
    return place.celery if isinstance(place, _Place) else None


find_app_with(_of_context)


def _context_of(app: Flask) -> Callable[[Task], AbstractContextManager[Any]]:
    def context(task: Task) -> AbstractContextManager[Any]:
        here = has_app_context() and current_app._get_current_object() is app  # type: ignore[attr-defined]
        # A direct call is a call: it has the context, and the session, of its caller.
        return nullcontext() if here and task.request.called_directly else app.app_context()

    return context


def _publish_as(app: Flask, owner: OwnerPolicy) -> None:
    @app.before_request
    def begin() -> None:
        g.celeriac_owner = records.as_owner(publisher(checked(owner())))
        g.celeriac_owner.__enter__()

    @app.teardown_request
    def end(_: BaseException | None) -> None:
        manager = g.pop("celeriac_owner", None)
        if manager is not None:
            manager.__exit__(None, None, None)


def _unavailable(error: Exception) -> tuple[Response, int, dict[str, str]]:
    return jsonify(detail=away(error)), 503, TRY_AGAIN
