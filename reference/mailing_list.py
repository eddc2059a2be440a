"""A third-party API for development and tests, on this machine: slow, and broken on demand.

PUT /behaviour changes it: `delay` in seconds, `failure_rate` from 0 to 1, `fail_next` calls.
GET /calls lists what came in, so that retries can be watched.
"""

import asyncio
import random
import time

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field


class Behaviour(BaseModel):
    delay: float = Field(default=2.0, ge=0, le=60)
    failure_rate: float = Field(default=0.0, ge=0, le=1)
    fail_next: int = Field(default=0, ge=0)
    status: int = Field(default=503, ge=400, le=599)


class Member(BaseModel):
    email: str


class Call(BaseModel):
    email: str
    at: float
    """Seconds since the epoch."""
    status: int


def create_app() -> FastAPI:
    app = FastAPI(title="Mailing list (a local stub)")
    behaviour = Behaviour()
    calls: list[Call] = []

    @app.get("/behaviour")
    async def get_behaviour() -> Behaviour:
        return behaviour

    @app.put("/behaviour")
    async def put_behaviour(new: Behaviour) -> Behaviour:
        nonlocal behaviour
        behaviour = new
        return behaviour

    @app.get("/calls")
    async def get_calls() -> list[Call]:
        return calls

    @app.delete("/calls", status_code=204)
    async def delete_calls() -> None:
        calls.clear()

    @app.post("/members", status_code=201)
    async def add_member(member: Member) -> Member:
        fails = behaviour.fail_next > 0 or random.random() < behaviour.failure_rate
        behaviour.fail_next = max(0, behaviour.fail_next - 1)
        status = behaviour.status if fails else 201
        calls.append(Call(email=member.email, at=time.time(), status=status))
        del calls[:-1000]
        await asyncio.sleep(behaviour.delay)
        if fails:
            raise HTTPException(status, "the mailing list is out of order")
        return member

    return app


app = create_app()
