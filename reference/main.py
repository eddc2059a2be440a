"""Entry point of the web side: `uvicorn main:app`, `celery -A main.celery …`."""

from celeriac import exit_on_error
from project import create_app

with exit_on_error():
    app = create_app()
    celery = app.celery_app  # type: ignore[attr-defined]
