"""The application's own tests: no broker, no worker, no network."""

import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
from alembic.config import Config as AlembicConfig
from fastapi import FastAPI
from fastapi.testclient import TestClient

from alembic import command
from celeriac import use_app
from project import create_app
from project.config import TestingConfig

REFERENCE = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects to a broker, or to anything else, has failed."""

    def refuse(self: socket.socket, address: object) -> None:
        pytest.fail(f"a connection to {address!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FastAPI]:
    """The application in its `testing` configuration, on a database of its own."""
    for name in os.environ:
        if name.startswith("CELERY_") or name == "WS_MESSAGE_QUEUE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("FASTAPI_CONFIG", "testing")
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'app.sqlite3'}")
    command.upgrade(AlembicConfig(REFERENCE / "alembic.ini"), "head")
    app = create_app(TestingConfig())
    with use_app(app.celery_app):  # type: ignore[attr-defined]
        yield app  # and what a test calls itself belongs to it


@pytest.fixture
def client(app: FastAPI, mailing_list: list[httpx.Request]) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture
def mailing_list(monkeypatch: pytest.MonkeyPatch) -> list[httpx.Request]:
    """The requests that reach the third party; it says yes to all of them."""
    received: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        received.append(request)
        return httpx.Response(201)

    client = partial(httpx.AsyncClient, transport=httpx.MockTransport(answer))
    monkeypatch.setattr("project.third_party.httpx.AsyncClient", client)
    return received
