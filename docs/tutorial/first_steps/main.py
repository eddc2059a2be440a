"""A whole application in one file: FastAPI, Celery, and live status of every task."""

import asyncio
import os

from celery import Celery
from dotenv import load_dotenv
from fastapi import FastAPI

import celeriac
from celeriac.fastapi import attach, public, status_router

load_dotenv()
redis_url = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")

celery = Celery(
    "worker",
    broker=os.environ.get("CELERY_BROKER_URL", redis_url),
    backend=os.environ.get("CELERY_RESULT_BACKEND", redis_url),
)
celeriac.adopt(celery)  # the one call; everything else is plain Celery and plain FastAPI
celery.conf.worker_pool = "celeriac.pool:TaskPool"  # runs async tasks together, in one process


@celery.task
async def divide(x: float, y: float) -> float:
    await asyncio.sleep(1)  # somebody's API, a database, a model: hundreds wait at once
    return x / y


app = FastAPI()
attach(app, celery)
app.include_router(status_router(celery, owner=public))  # /tasks/{task_id}, WebSocket…


@app.get("/")
def index() -> dict[str, str]:
    return {"message": "Hello World"}


@app.get("/health-check")
def health_check() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/divide", status_code=202)
async def start(x: float, y: float) -> dict[str, str]:
    task = await divide.adelay(x, y)  # a broker that is away holds up no other request
    return {"task_id": task.id}
