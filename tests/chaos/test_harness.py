"""The scenarios believe the ledger and the proxy: they do what they say."""

import multiprocessing
import socket
from collections.abc import Iterator

import pytest

from chaos.ledger import Ledger, runs
from chaos.proxy import Proxy
from chaos.servers import RedisServer
from support import eventually


def write_a_run(at: str, key: str) -> None:
    ledger = Ledger.open(at, "book")
    for number in range(50):
        ledger.write(key, "begin", f"{key}-{number}", "id")
        ledger.write(key, "end", f"{key}-{number}", "id")
    ledger.close()


def test_no_entry_of_processes_that_write_at_once_is_lost_or_torn(ledger: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_a_run, args=(ledger, f"k{n}")) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    book = Ledger.open(ledger, "book")
    found = runs(book.entries())
    book.close()
    assert {key: len(of_key) for key, of_key in found.items()} == {"k0": 50, "k1": 50, "k2": 50}
    assert all(run.ended and run.ended >= run.began for of_key in found.values() for run in of_key)


@pytest.fixture
def proxy(redis: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis.port) as made:
        yield made


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=1)


def ping(connection: socket.socket) -> bytes:
    connection.sendall(b"PING\r\n")
    return connection.recv(100)


def test_what_is_passed_on_arrives_and_what_is_reset_is_told(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert ping(connection) == b"+PONG\r\n"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(100)
    with connect(proxy) as another:
        assert ping(another) == b"+PONG\r\n"


def test_where_connections_are_refused_there_are_none_until_it_heals(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert ping(connection) == b"+PONG\r\n"
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            connection.recv(100)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.heal()
    with connect(proxy) as another:
        assert ping(another) == b"+PONG\r\n"


def test_of_what_a_black_hole_has_swallowed_nobody_hears_again(proxy: Proxy) -> None:
    with connect(proxy) as before, connect(proxy) as another:
        assert ping(before) == b"+PONG\r\n"
        proxy.swallow()
        with connect(proxy) as during:
            for connection in (before, during):
                with pytest.raises(TimeoutError):
                    ping(connection)
            proxy.heal()
            for connection in (before, during, another):
                with pytest.raises(TimeoutError):
                    ping(connection)
    with connect(proxy) as after:
        assert ping(after) == b"+PONG\r\n"


def test_a_server_that_was_killed_has_all_that_it_accepted(redis: RedisServer) -> None:
    with redis.client() as client:
        for number in range(100):
            client.set(f"key{number}", number)
    redis.kill()
    assert not redis.answers()
    redis.start()
    with redis.client() as client:
        assert client.dbsize() == 100
    redis.pause()
    assert not redis.answers()
    redis.resume()
    eventually(redis.answers)
