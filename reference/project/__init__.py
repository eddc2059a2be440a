"""The application: its features, and the two factories that entry points call."""

from typing import TYPE_CHECKING

from celery import Celery

from celeriac import create_celery, default_app, use_app
from celeriac.outbox import use_outbox
from project.config import Config, load_config

if TYPE_CHECKING:
    from fastapi import FastAPI

# Each is a package here with models, schemas, tasks and views.
FEATURES = ["users"]


def create_celery_app(config: Config | None = None) -> Celery:
    """The Celery app, all its tasks loaded. Knows nothing of the web side."""
    from project import logs, routing
    from project.database import get_database
    from project.lifespan import lifespan

    config = config or load_config()
    celery = create_celery(
        config,
        name="project",
        lifespan=lifespan,
        include=[f"project.{feature}.tasks" for feature in FEATURES],
        task_routes=(routing.route_task,),
    )
    with use_app(celery):
        use_outbox(celery, get_database())
    celery.loader.import_default_modules()
    routing.check(celery)
    logs.set_up_worker(celery, config)
    return celery


def create_app(config: Config | None = None) -> "FastAPI":
    """The FastAPI application, with its Celery app as `app.celery_app`."""
    from project.web import build  # not above: a worker does not load the web side

    config = config or load_config()
    return build(config, create_celery_app(config))


# In a shell, a task that is called before any factory was finds its broker all the same.
default_app(create_celery_app)
