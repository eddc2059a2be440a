"""Entry point of a worker without the web side: `celery -A worker.celery worker`."""

from celeriac import exit_on_error
from project import create_celery_app

with exit_on_error():
    celery = create_celery_app()
