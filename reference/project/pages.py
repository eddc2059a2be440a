"""HTML: templates of the application and of each feature, with headers that keep scripts ours."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.templating import Jinja2Templates

from celeriac.fastapi import TaskId
from project import FEATURES

_HERE = Path(__file__).parent
_templates = Jinja2Templates(
    directory=[_HERE / "templates", *(_HERE / feature / "templates" for feature in FEATURES)]
)
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
}

_VARIES = {"Vary": "Accept"}  # one address, two answers: a cache keeps them apart

router = APIRouter(include_in_schema=False)


def render(request: Request, name: str, **context: Any) -> HTMLResponse:
    return _templates.TemplateResponse(request, name, context, headers=_HEADERS)


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """A page for a browser, a greeting for everybody else."""
    if "text/html" not in request.headers.get("accept", ""):
        return JSONResponse({"message": "Hello World"}, headers=_VARIES)
    page = render(request, "index.html", flower_url=request.app.state.config.flower_url)
    page.headers.update(_VARIES)
    return page


@router.get("/task/{task_id}/")
async def task_page(request: Request, task_id: TaskId) -> HTMLResponse:
    return render(request, "task.html", task_id=task_id)
