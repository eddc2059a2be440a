"""The status routes, for the owner of all tasks."""

from fastapi import FastAPI

from benchmarks.apps.ours import OWNER, app
from celeriac.fastapi import attach, status_router


async def owner() -> str:
    return OWNER


web = FastAPI()
attach(web, app)
web.include_router(status_router(app, owner=owner, streams=100_000))
