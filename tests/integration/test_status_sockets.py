"""Whatever clients do with WebSockets: others are served, and nothing is left behind."""

import asyncio
import base64
import json
import random
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from celery import Celery
from fastapi import FastAPI
from redis import Redis
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from celeriac import adopt, records
from celeriac.fastapi import attach, routes, sockets, status_router
from celeriac.fastapi.desk import Desk
from celeriac.status import Reader, reader_of
from celeriac.store import redis_url
from support import close_results, free_port

pytestmark = pytest.mark.anyio

CLIENTS, ROUNDS = 20, 10
PATIENCE = 0.5  # seconds


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def celery(redis_server: str) -> Iterator[Celery]:
    app = Celery("sockets", broker=redis_server, backend=redis_server, set_as_current=False)
    app.conf.broker_pool_limit = 0  # no pool: nothing is left to close
    yield adopt(app)
    close_results(app.backend)


class Door:
    """An ASGI middleware that counts the WebSockets and the streams of events inside."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._inside, self._moved = app, 0, asyncio.Condition()
        self.entered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket" and not scope.get("path", "").endswith("/events"):
            await self._app(scope, receive, send)
            return
        self._inside += 1
        self.entered += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1
            async with self._moved:
                self._moved.notify_all()

    async def until(self, inside: int) -> None:
        async with asyncio.timeout(10), self._moved:
            await self._moved.wait_for(lambda: self._inside <= inside)


class Server(uvicorn.Server):
    def __init__(self, app: ASGIApp, port: int, **options: Any) -> None:
        # Its own configuration of logging would keep what it says from the test.
        given: dict[str, Any] = {"log_level": "warning", "log_config": None, "lifespan": "on"}
        super().__init__(uvicorn.Config(app, port=port, **(given | options)))
        self.ready = asyncio.Event()

    def install_signal_handlers(self) -> None:
        """They are the test runner's."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


class Web:
    """A server, what it holds, and its clients: all of them ada's."""

    def __init__(self, celery: Celery, door: Door, desk: Desk, port: int) -> None:
        self.celery, self.door, self._desk, self.port = celery, door, desk, port
        self.reader: Reader = reader_of(celery)

    def open(self, path: str, **options: Any) -> connect:
        address = f"ws://127.0.0.1:{self.port}{path}"
        options = {"close_timeout": 1, "ping_interval": None} | options
        return connect(address, additional_headers={"X-User": "ada"}, **options)

    async def raw(self, path: str) -> socket.socket:
        """A WebSocket whose frames nobody makes, and of which nobody reads."""
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        headers = (
            "Upgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
        )
        return await self.ask(path, 101, headers)

    async def ask(self, path: str, status: int, headers: str = "") -> socket.socket:
        """What is answered is not read; small buffers."""
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", self.port))
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-User: ada\r\n{headers}\r\n"
        await loop.sock_sendall(sock, request.encode())
        assert (await loop.sock_recv(sock, 12)) == f"HTTP/1.1 {status}".encode()
        return sock

    async def publish(self) -> str:
        with records.as_owner("ada"):
            return str((await asyncio.to_thread(self.celery.send_task, "work", queue="q")).id)

    async def progress(self, task_id: str, result: Any) -> None:
        await asyncio.to_thread(self.celery.backend.store_result, task_id, result, "PROGRESS")

    async def check_nothing_is_left(self, tasks: set["asyncio.Task[Any]"], inside: int = 0) -> None:
        """But for `inside` sockets, and for `tasks`, which were there before."""
        await self.door.until(inside)
        assert sum(self._desk._streams.values()) == inside
        assert sum(map(len, self.reader._followers.values())) == inside
        assert len(self.reader._task_ids) == 2 * inside
        assert self.reader._snapshots == {}
        if ending := asyncio.all_tasks() - tasks:
            _, left = await asyncio.wait(ending, timeout=5)
            assert left == set()
        # Of the same connection, so that it has unsubscribed by now.
        await self.reader.snapshot(await self.publish())
        with Redis.from_url(redis_url(self.celery.conf.result_backend)) as client:
            heard = await asyncio.to_thread(client.pubsub_channels, "celeriac:events:*")
        assert len(heard) == inside


@asynccontextmanager
async def serve(
    celery: Celery, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> AsyncIterator[Web]:
    desks: list[Desk] = []

    class Recorded(Desk):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            desks.append(self)

    async def user(connection: HTTPConnection) -> str:
        return connection.headers.get("x-user", "")

    monkeypatch.setattr(routes, "Desk", Recorded)
    app = FastAPI()
    attach(app, celery)
    app.include_router(status_router(celery, owner=user, streams=1000))
    door, port = Door(app), free_port()
    server = Server(door, port, **options)
    serving = asyncio.create_task(server.serve())
    await server.ready.wait()
    web = Web(celery, door, desks[0], port)
    await web.reader.snapshot(await web.publish())  # the connection that stays is open now
    try:
        yield web
    finally:
        server.should_exit = True
        await serving


def frame(opcode: int, payload: bytes, length: int | None = None) -> bytes:
    """As a client sends it; it may claim another length than it has."""
    length = len(payload) if length is None else length
    return struct.pack("!BBHI", 0x80 | opcode, 0x80 | 126, length, 0) + payload


TEXT, BINARY, PING = 1, 2, 9
FOLLOW = '{"follow": "%s"}'
# Each ends the connection, with 1008 or, if bytes, with 1003.
NONSENSE: list[str | bytes] = [
    "", "{", "5", "null", "[]", "{}", '"x"', "\x00", b"", b"\x00", b"\xff" * 1000, b'{"follow": 1}',
    '{"follow": 5}', '{"follow": ""}', '{"follow": null}', '{"follow": ["x"]}', '{"unfollow": {}}',
    '{"follow": "\\u0000"}', '{"follow": "\\ud800"}', '{"unfollow": "\\udfff"}',
    '{"follow": "a\\nb"}', FOLLOW % ("x" * 256), FOLLOW % ("x" * 500_000),
    '{"follow": "x", "after": -1}', '{"follow": "x", "after": "1"}',
    '{"follow": "x", "after": true}', '{"follow": "x", "after": 1.5}',
    '{"follow": "x", "after": NaN}', '{"follow": "x", "after": 1e999}',
    '{"follow": "x", "after": %s}' % ("9" * 3000), '{"follow": "x", "a": "%s"}' % ("x" * 5000),
    "[" * 2000, "[" * 500_000, '{"follow": ' * 300, "[[]," * 1000,
]  # fmt: skip


async def test_who_says_nonsense_is_told_what_is_expected(
    celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(celery, monkeypatch) as web:
        before = asyncio.all_tasks()
        async with web.open("/ws/tasks") as client:  # as long as what makes sense can be
            await client.send('{"unfollow": null, "follow": "%s"}' % (r"\ud83d\ude00" * 255))
            assert json.loads(await client.recv())["code"] == "unknown"
        for said in NONSENSE:
            async with web.open("/ws/tasks") as client:
                await client.send(said)
                with pytest.raises(ConnectionClosed):
                    await client.recv()
            expected = 1008 if isinstance(said, str) else 1003
            assert client.close_code == expected, said[:100]
            assert (client.close_reason or "").startswith('expected {"follow"'), said[:100]
        await web.check_nothing_is_left(before)


async def test_a_socket_follows_so_many_tasks_and_no_more(
    celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_TASKS", 3)
    async with serve(celery, monkeypatch) as web:
        before = asyncio.all_tasks()
        ids = [await web.publish() for _ in range(4)]
        async with web.open("/ws/tasks") as client:
            for task_id in ids[:3]:
                await client.send(FOLLOW % task_id)
                assert json.loads(await client.recv())["state"] == "PENDING"
            await client.send(FOLLOW % ids[0])  # anew
            assert json.loads(await client.recv())["task_id"] == ids[0]
            await client.send(FOLLOW % ids[3])
            with pytest.raises(ConnectionClosed):
                await client.recv()
            assert client.close_code == 1008
        await web.check_nothing_is_left(before)


class Rude:
    """A client that behaves badly, in a way that chance picks: the same for the same number."""

    def __init__(self, web: Web, ids: list[str], number: int) -> None:
        self._web, self._ids, self._chance = web, ids, random.Random(number)

    async def behave(self) -> None:
        path = self._chance.choice(["/ws/tasks", f"/ws/task_status/{self._id()}"])
        ways = [self._talk, self._flood, self._leave, self._break_the_protocol]
        with suppress(ConnectionClosed, OSError):
            await self._chance.choice(ways)(path)

    def _id(self) -> str:
        return self._chance.choice([*self._ids, "no-such-task"])

    def _wish(self) -> str:
        verb = self._chance.choice(["follow", "follow", "unfollow"])
        wish: dict[str, Any] = {verb: self._id()}
        if self._chance.random() < 0.5:
            wish["after"] = self._chance.choice([None, 0, 1, 99, 2**53])
        return json.dumps(wish)

    async def _talk(self, path: str) -> None:
        async with self._web.open(path) as client:
            for _ in range(self._chance.randrange(5)):
                await client.send(self._wish())
            await client.send(self._chance.choice(NONSENSE))
            while path == "/ws/tasks":  # the other one takes no notice
                await client.recv()

    async def _flood(self, path: str) -> None:
        """And read nothing of what comes meanwhile."""
        async with self._web.open(path, max_queue=1) as client:
            for _ in range(500):
                await client.send(self._wish())

    async def _leave(self, path: str) -> None:
        """In the middle of what is told."""
        async with self._web.open(path) as client:
            for _ in range(3):
                await client.send(self._wish())
            if path != "/ws/tasks":
                await client.recv()
            if self._chance.random() < 0.5:
                client.transport.abort()  # without a word

    async def _break_the_protocol(self, path: str) -> None:
        said = self._chance.choice(
            [
                b"",
                bytes(100),
                b"GET / HTTP/1.1\r\n\r\n",
                frame(TEXT, self._wish().encode()),
                frame(TEXT, b"\xff"),  # no UTF-8
                frame(TEXT, b'{"follow": ', length=1000),  # and the rest never comes
                frame(3, b""),  # no such frame
                frame(PING, bytes(200)),  # longer than one may be
                struct.pack("!BB", 0x80 | TEXT, 2) + b"{}",  # a server's, not a client's
            ]
        )
        with await self._web.raw(path) as client:
            await asyncio.get_running_loop().sock_sendall(client, said)
            if self._chance.random() < 0.5:  # reset, not closed
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def test_whatever_clients_do_others_are_served_and_nothing_is_left(
    celery: Celery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(celery, monkeypatch) as web:
        ids = [await web.publish() for _ in range(5)]
        async with web.open(f"/ws/task_status/{ids[0]}") as steady:
            assert json.loads(await steady.recv())["state"] == "PENDING"
            await web.progress(ids[0], -1)
            assert json.loads(await steady.recv())["result"] == -1
            before = asyncio.all_tasks()
            for turn in range(ROUNDS):
                numbers = range(turn * CLIENTS, (turn + 1) * CLIENTS)
                crowd = asyncio.gather(*(Rude(web, ids, each).behave() for each in numbers))
                await web.progress(ids[0], turn)
                async with asyncio.timeout(5):
                    assert json.loads(await steady.recv())["result"] == turn
                await crowd
            assert web.door.entered > ROUNDS * CLIENTS / 2
            await web.check_nothing_is_left(before, inside=1)
    said = {each.getMessage() for each in caplog.records}
    assert said <= {"Invalid UTF-8 sequence received from client."}


@asynccontextmanager
async def much_told(web: Web) -> AsyncIterator[tuple[str, Callable[[], Awaitable[None]]]]:
    """A task, and what makes it tell more than all buffers on the way to a client have room for.

    Somebody follows it meanwhile, and is not delayed.
    """
    large = random.Random(1).randbytes(100_000).hex()
    task_id = await web.publish()
    async with web.open(f"/ws/task_status/{task_id}", compression=None) as steady:
        await web.progress(task_id, -1)
        while json.loads(await steady.recv())["state"] != "PROGRESS":
            pass

        async def tell() -> None:
            for number in range(60):
                await web.progress(task_id, [number, large])
                async with asyncio.timeout(5):
                    assert json.loads(await steady.recv())["result"][0] == number

        yield task_id, tell


@pytest.mark.parametrize("path", ["/ws/task_status/{}", "/ws/tasks"])
async def test_who_takes_no_more_is_given_up_and_delays_nobody(
    celery: Celery, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(sockets, "_PATIENCE", PATIENCE)
    async with serve(celery, monkeypatch) as web, much_told(web) as (task_id, tell):
        before = asyncio.all_tasks()
        with await web.raw(path.format(task_id)) as client:
            follow = frame(TEXT, (FOLLOW % task_id).encode())
            await asyncio.get_running_loop().sock_sendall(client, follow)
            await tell()
            await web.check_nothing_is_left(before, inside=1)


async def test_who_leaves_a_stream_of_events_that_waits_for_it_leaves_nothing(
    celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(celery, monkeypatch) as web, much_told(web) as (task_id, tell):
        before = asyncio.all_tasks()
        with await web.ask(f"/tasks/{task_id}/events", 200):
            await tell()
        await web.check_nothing_is_left(before, inside=1)


async def test_who_is_gone_without_a_word_is_given_up(
    celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is one whose network is: the server asks, and nobody answers."""
    quick = {"ws_ping_interval": 0.1, "ws_ping_timeout": 0.1}
    async with serve(celery, monkeypatch, **quick) as web:
        task_id = await web.publish()
        before = asyncio.all_tasks()
        with await web.raw(f"/ws/task_status/{task_id}"), await web.raw("/ws/tasks") as client:
            follow = frame(TEXT, (FOLLOW % task_id).encode())
            await asyncio.get_running_loop().sock_sendall(client, follow)
            await web.check_nothing_is_left(before)
