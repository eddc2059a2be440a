"""What a beat that takes over believes of when each entry ran."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.schedules import crontab, schedule

from celeriac import adopt, use_app
from celeriac.beat import Scheduler
from celeriac.embedded import Valkey
from celeriac.leadership import Leadership, LostLeadershipError, find_place
from support import empty_redis

Make = Callable[[], Scheduler]


@pytest.fixture
def app(valkey: Valkey) -> Iterator[Celery]:
    empty_redis(valkey.celery_url)
    app = Celery("beats", broker=valkey.celery_url, backend="disabled://", set_as_current=False)
    app.conf.beat_schedule = {
        "interval": {"task": "ran", "schedule": 86400.0},
        "rounded": {"task": "ran", "schedule": schedule(86400.0, relative=True)},
        "crontab": {"task": "ran", "schedule": crontab(minute="0")},
    }
    adopt(app)
    with use_app(app):  # Celery's entries that were read from a file have none of their own
        yield app
    app.close()


@pytest.fixture
def make(app: Celery, tmp_path: Path) -> Iterator[Make]:
    made: list[Scheduler] = []

    def make() -> Scheduler:
        path = tmp_path / f"schedule-{len(made)}"
        made.append(Scheduler(app, schedule_filename=str(path)))
        made[-1].tick()
        return made[-1]

    yield make
    for each in made:
        each.close()


def run_all(scheduler: Scheduler, **fields: Any) -> dict[str, Any]:
    """Note that every entry ran, as `scheduler` would; when."""
    assert scheduler.leadership is not None
    for name, entry in scheduler.schedule.items():
        scheduler.schedule[name] = next(entry)
        tick = scheduler._tick(entry)
        tick.record |= fields
        scheduler.leadership.settle(tick, gone=True)
    return {name: entry.last_run_at for name, entry in scheduler.schedule.items()}


def believed(scheduler: Scheduler) -> dict[str, Any]:
    return {name: entry.last_run_at for name, entry in scheduler.schedule.items()}


def test_the_next_beat_knows_when_every_entry_ran(make: Make) -> None:
    first = make()
    ran = run_all(first)
    first.close()
    assert believed(make()) == ran


def test_of_a_clock_that_is_ahead_intervals_count_and_dates_do_not(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    first = make()
    assert first.leadership is not None
    ran = run_all(first, offset=first.leadership.offset + 3600)
    first.close()
    second = make()
    assert second.leadership is not None
    found = believed(second)
    assert found["crontab"] == ran["crontab"]
    assert found["rounded"] == ran["rounded"]
    ago = ran["interval"] - found["interval"]
    assert abs(ago - timedelta(hours=1)) < timedelta(seconds=1)
    assert "another beat's clock is 3600." in caplog.text


def test_a_redis_that_forgot_makes_nothing_due_again(make: Make, valkey: Valkey) -> None:
    beat = make()
    ran = run_all(beat)
    empty_redis(valkey.celery_url)
    assert beat.leadership is not None
    beat._leads = False
    beat.tick()
    assert beat._leads
    assert believed(beat) == ran


def test_a_lease_is_lost_when_it_is_not_ours_any_more(app: Celery) -> None:
    place = find_place(app, 30.0)
    assert place is not None
    first, second = (Leadership(place, "beats", 30.0) for _ in range(2))
    assert first.ask()
    assert not second.ask()
    assert second.holder == first.me
    first.release()
    assert second.ask()
    with pytest.raises(LostLeadershipError):
        first.load({})
    second.release()
    assert not second.held


def test_two_applications_in_one_redis_have_a_lease_each(app: Celery) -> None:
    place = find_place(app, 30.0)
    assert place is not None
    one, other = Leadership(place, "one", 30.0), Leadership(place, "other", 30.0)
    assert one.ask()
    assert other.ask()
    one.release()
    other.release()


def test_the_prefix_of_the_broker_is_that_of_the_lease(app: Celery, valkey: Valkey) -> None:
    from redis import Redis

    app.conf.broker_transport_options = {"global_keyprefix": "ours:"}
    place = find_place(app, 30.0)
    assert place is not None
    lead = Leadership(place, "beats", 30.0)
    assert lead.ask()
    with Redis.from_url(valkey.redis_url) as client:
        assert client.get("ours:celeriac:beat:beats:lease") == lead.me.encode()
    lead.release()
