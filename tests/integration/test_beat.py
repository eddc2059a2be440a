"""Beats in real processes: one tick is one message, whatever becomes of the beats and of Redis."""

import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import psutil
import pytest
from celery import Celery
from kombu.exceptions import ChannelError
from redis import Redis

from celeriac import records
from celeriac.embedded import Valkey
from publishing import take
from support import Process, clean_environment, empty_redis, eventually, given, python, wanted
from workers import APPS

LEASE = 2.0
OFTEN = {"often": {"every": 0.4}}
HOURLY = {"every": 3600.0}
EVERY_HOUR = {"every": {"minute": "0"}}


class Sent(NamedTuple):
    entry: str
    task_id: str
    pid: int
    at: float


class Beats:
    """Beats of one application, and everything that they have sent."""

    def __init__(self, folder: Path, broker: str, redis: Valkey, **env: str) -> None:
        self._folder, self._numbers = folder, count(1)
        self.broker, self.redis = broker, redis
        # For each beat an image of its own: they share nothing but the servers.
        self._env = {"BROKER": broker, "BACKEND": redis.celery_url} | env
        self.client = Celery("client", broker=broker, backend="disabled://", set_as_current=False)
        self.client.conf.update(json.loads(env.get("CONF", "{}")), broker_pool_limit=0)
        self._sent: list[Sent] = []
        self._running = ExitStack()

    def start(self, schedule: dict[str, Any] | None = None, **env: str) -> Process:
        file = self._folder / f"schedule-{next(self._numbers)}"
        command = ("-m", "celery", "-A", "beat_app.celery", "beat", "-l", "info", "--pidfile=")
        given = {"SCHEDULE": json.dumps(schedule or OFTEN), "LEASE": str(LEASE)} | self._env | env
        return self._running.enter_context(
            python(*command, "-s", file, cwd=APPS, env=clean_environment(**given))
        )

    def start_two(self, schedule: dict[str, Any] | None = None, **env: str) -> list[Process]:
        leader = self.start(schedule, **env)
        leader.wait_for(r"beat: leading")
        standby = self.start(schedule, **env)
        standby.wait_for(r"beat: standing by: \S+ leads")
        return [leader, standby]

    def sent(self) -> list[Sent]:
        while (message := self._take()) is not None:
            pid, at, *_ = message.decode()[0]
            headers = message.headers
            assert headers["celery_beat_task"] is True
            assert headers[records.OWNER] == records.SYSTEM
            self._sent.append(Sent(headers["task"], headers["id"], pid, at))
        return self._sent

    def _take(self) -> Any:
        try:
            return take(self.client)
        except ChannelError:  # the first beat that sends makes the queue
            return None

    def wait_for(self, number: int, *, pid: int | None = None, timeout: float = 15.0) -> list[Sent]:
        """All that were sent, once there are `number` of them, counted from here, from `pid`."""
        before = len(self.sent())

        def enough() -> bool:
            new = [each for each in self.sent()[before:] if pid in (None, each.pid)]
            return len(new) >= number

        eventually(enough, timeout, f"{number} ticks of {pid or 'any beat'}")
        return self._sent

    def recorded(self) -> dict[str, Any]:
        with Redis.from_url(self.redis.redis_url) as client:
            found = client.hgetall("celeriac:beat:beat_app:ran")
        assert isinstance(found, dict)
        return {name.decode(): json.loads(record) for name, record in found.items()}

    def write(self, **records: dict[str, Any]) -> None:
        with Redis.from_url(self.redis.redis_url) as client:
            for name, record in records.items():
                text = json.dumps({"count": 1, "offset": 0.0, "id": ""} | record)
                client.hset("celeriac:beat:beat_app:ran", name, text)

    def close(self) -> None:
        self._running.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    """One that a test may restart."""
    with Valkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Valkey]:
    """A broker that is not where the lease is kept: it is given two addresses, so either may be."""
    with Valkey(tmp_path / "broker") as server:
        server.celery_url += f";{server.celery_url}"
        yield server


@pytest.fixture(params=["redis", "elsewhere", *wanted("rabbitmq", "TEST_AMQP_URL")])
def beats(request: pytest.FixtureRequest, tmp_path: Path, server: Valkey) -> Iterator[Beats]:
    """Whose broker holds the lease too, or does not."""
    conf = json.dumps({"task_default_queue": f"beat-{uuid4()}"})
    match request.param:
        case "redis":
            broker = server.celery_url
        case "elsewhere":
            broker = request.getfixturevalue("elsewhere").celery_url
        case _:
            broker = given("TEST_AMQP_URL")
    running = Beats(tmp_path, broker, server, CONF=conf)
    yield running
    running.close()
    if request.param == "rabbitmq":
        with running.client.connection() as connection:
            connection.default_channel.queue_delete(running.client.conf.task_default_queue)


@pytest.fixture
def on_redis(tmp_path: Path, server: Valkey) -> Iterator[Beats]:
    running = Beats(tmp_path, server.celery_url, server)
    yield running
    running.close()


def assert_once_each(sent: list[Sent], every: float = 0.4) -> None:
    assert len({each.task_id for each in sent}) == len(sent)
    times = sorted(each.at for each in sent)
    gaps = [after - before for before, after in pairwise(times)]
    assert min(gaps) > every / 2, gaps


def test_of_two_beats_one_sends(beats: Beats) -> None:
    leader, _ = beats.start_two()
    sent = beats.wait_for(8)
    assert {each.pid for each in sent} == {leader.pid}
    assert_once_each(sent)


def test_the_second_takes_over_within_the_lease_when_the_first_is_killed(beats: Beats) -> None:
    leader, standby = beats.start_two()
    beats.wait_for(3)
    killed = time.time()
    leader.signal(signal.SIGKILL)
    sent = beats.wait_for(3, pid=standby.pid)
    standby.wait_for("beat: leading")
    first = next(each.at for each in sent if each.pid == standby.pid)
    assert first - killed < LEASE + 1.0
    assert_once_each(sent)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_the_second_takes_over_at_once_when_the_first_ends(
    end: signal.Signals, on_redis: Beats
) -> None:
    leader, standby = on_redis.start_two(LEASE="60")
    on_redis.wait_for(2)
    leader.signal(end)
    sent = on_redis.wait_for(3, pid=standby.pid, timeout=10)
    assert leader.wait() in (0, 1)  # 1 where Celery's beat was about to send
    assert_once_each(sent)


def test_a_paused_beat_that_comes_back_sends_nothing_while_another_leads(beats: Beats) -> None:
    leader, standby = beats.start_two()
    beats.wait_for(2)
    leader.signal(signal.SIGSTOP)
    beats.wait_for(3, pid=standby.pid)
    leader.signal(signal.SIGCONT)
    resumed = time.time()
    leader.wait_for(r"the lease is lost|standing by")
    sent = beats.wait_for(5)
    assert not [each for each in sent if each.pid == leader.pid and each.at > resumed]
    assert_once_each(sent)


def test_a_beat_paused_in_the_middle_of_sending_doubles_no_tick(
    beats: Beats, tmp_path: Path
) -> None:
    """It has seen that it leads, and stands still before it sends."""
    flag = tmp_path / "pause"
    schedule = {"once": EVERY_HOUR | {"pauses": True}}
    long_ago = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
    beats.write(once={"last": long_ago})
    flag.touch()
    paused = beats.start(schedule, PAUSE=str(flag))
    eventually(lambda: not flag.exists(), what="a beat that stands still")
    standby = beats.start(schedule, PAUSE=str(flag))
    standby.wait_for(r"beat: leading", timeout=10)
    unsure = beats.broker != beats.redis.celery_url
    if unsure:
        standby.wait_for("once was being sent when the beat that led ended")
    else:
        # It may have been sent by the time that the line was seen.
        eventually(lambda: any(each.pid == standby.pid for each in beats.sent()), what="the tick")
    paused.signal(signal.SIGCONT)
    paused.wait_for(r"standing by")
    (sent,) = eventually(beats.sent, what="the tick")
    assert sent.pid == (paused if unsure else standby).pid
    (tick,) = [record["id"] for record in beats.recorded().values()]
    assert tick == sent.task_id


def test_a_beat_paused_in_the_middle_of_sending_sends_nothing_later(
    on_redis: Beats, tmp_path: Path
) -> None:
    """The ticks that followed were sent by another."""
    flag = tmp_path / "pause"
    schedule = {"often": {"every": 0.4, "pauses": True}}
    leader, standby = on_redis.start_two(schedule, PAUSE=str(flag))
    flag.touch()
    on_redis.wait_for(3, pid=standby.pid)
    assert not flag.exists()
    leader.signal(signal.SIGCONT)
    leader.wait_for("another beat holds the lease")
    sent = on_redis.wait_for(3)
    assert [each.pid for each in sent[-6:]] == [standby.pid] * 6
    assert_once_each(sent)


def test_what_was_due_while_no_beat_ran_is_sent_once_for_each_entry(on_redis: Beats) -> None:
    long_ago = {"last": (datetime.now(UTC) - timedelta(hours=5, minutes=1)).isoformat()}
    just_now = {"last": datetime.now(UTC).isoformat()}
    on_redis.write(interval=long_ago, crontab=long_ago, gone=long_ago, recent=just_now)
    schedule = {"interval": HOURLY, "crontab": EVERY_HOUR, "recent": HOURLY, "new": HOURLY}
    on_redis.start_two(schedule | OFTEN)
    sent = on_redis.wait_for(6)
    rare = [each.entry for each in sent if each.entry != "often"]
    assert sorted(rare) == ["crontab", "interval"]
    assert on_redis.recorded().keys() == schedule.keys() | OFTEN.keys()


def test_who_takes_over_sends_no_burst_and_leaves_nothing_out(on_redis: Beats) -> None:
    """The second has stood by for long: what it knows of the schedule is old."""
    leader, standby = on_redis.start_two({"rare": {"every": 5.0}})
    on_redis.wait_for(1)
    leader.signal(signal.SIGKILL)
    leader.wait()
    standby.wait_for("beat: leading")
    sent = on_redis.wait_for(1)
    assert sent[1].pid == standby.pid
    assert 4.5 < sent[1].at - sent[0].at < 6.5


def test_beats_survive_a_restart_of_redis(beats: Beats) -> None:
    leader, standby = beats.start_two()
    beats.wait_for(3)
    beats.redis.stop()
    leader.wait_for("beat: nothing can be sent|the lease was not renewed")
    standby.wait_for("beat: nothing can be sent")
    beats.redis.start()
    sent = beats.wait_for(5)
    assert_once_each(sent)
    assert leader.running
    assert standby.running


def test_a_tick_whose_sending_fails_is_sent_later(
    tmp_path: Path, server: Valkey, elsewhere: Valkey
) -> None:
    """The broker is away; who leads is known."""
    beats = Beats(tmp_path, elsewhere.celery_url, server)
    long_ago = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
    beats.write(hourly={"last": long_ago})
    flag = tmp_path / "pause"
    flag.touch()
    try:
        beat = beats.start({"hourly": HOURLY | {"pauses": True}}, PAUSE=str(flag), LEASE="60")
        stopped = psutil.STATUS_STOPPED
        eventually(lambda: psutil.Process(beat.pid).status() == stopped, what="a beat that stops")
        elsewhere.stop()
        beat.signal(signal.SIGCONT)
        beat.wait_for("Message Error: Couldn't apply scheduled task hourly")
        elsewhere.start()
        (sent,) = beats.wait_for(1)
        assert sent.task_id == beats.recorded()["hourly"]["id"]
    finally:
        beats.close()


def test_a_tick_that_cannot_be_sent_holds_up_no_other_entry(on_redis: Beats) -> None:
    schedule = {"bad": {"every": 1.0, "unreadable": True}} | OFTEN
    beat = on_redis.start(schedule)
    beat.wait_for("Message Error: Couldn't apply scheduled task bad", count=2)
    assert_once_each(on_redis.wait_for(4))


def test_a_ticks_id_is_that_of_its_entry_and_time(on_redis: Beats) -> None:
    """Two beats that know the same would send the same id."""
    last = {"last": (datetime.now(UTC) - timedelta(hours=2)).isoformat()}
    ids = set()
    for _ in range(2):
        on_redis.write(crontab=last, other=last)
        beat = on_redis.start({"crontab": EVERY_HOUR, "other": EVERY_HOUR})
        ids |= {each.task_id for each in on_redis.wait_for(2)}
        beat.stop()
        empty_redis(on_redis.redis.celery_url)
    assert len(ids) == 2


def test_without_any_redis_a_beat_says_that_a_second_would_double(
    tmp_path: Path, server: Valkey
) -> None:
    folders = ("data_folder_in", "data_folder_out", "control_folder")
    conf = {"broker_transport_options": dict.fromkeys(folders, str(tmp_path))}
    beats = Beats(tmp_path, "filesystem://", server, CONF=json.dumps(conf))
    try:
        beat = beats.start(BACKEND="cache+memory://")
        beat.wait_for("Scheduler: Sending due task often", count=3)
        assert len(re.findall("a second beat would double every task", beat.output)) == 1
    finally:
        beats.close()
