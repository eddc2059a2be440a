"""What Celery's commands load: `celery -A celery_worker.celery worker`."""

from celeriac import exit_on_error
from server.core import create_app

with exit_on_error():
    app = create_app()

celery = app.extensions["celery"]
