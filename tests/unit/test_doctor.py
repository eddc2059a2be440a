"""What `celeriac doctor` tells from the configuration alone; each hazard present, and absent."""

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pytest
from celery import Celery
from celery.schedules import crontab

from celeriac import Settings, adopt, create_celery
from celeriac.doctor import Finding, Patient, Severity, configuration, durations, rabbitmq

REDIS = "redis://127.0.0.1:6379/0"
RABBITMQ = "amqp://guest:guest@127.0.0.1:5672//"
ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

Check = Callable[[Patient], Iterator[Finding]]


def plain(broker: str = REDIS, backend: Any = REDIS, **options: Any) -> Celery:
    app = Celery("plain", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(options)
    return app


def ours(broker: str = REDIS, backend: str = REDIS, **options: Any) -> Celery:
    settings = Settings(celery_broker_url=broker, celery_result_backend=backend)
    return create_celery(settings, **options)


def found(check: Check, app: Celery, settings: Settings | None = None) -> list[Severity]:
    with Patient(app, settings, None) as patient:
        findings = list(check(patient))
    assert all(each.what and each.remedy for each in findings)
    return [each.severity for each in findings]


def add_task(app: Celery, name: str = "task", **options: Any) -> None:
    @app.task(name=name, shared=False, **options)
    def body() -> None: ...


def test_early_acknowledgement() -> None:
    assert found(configuration.acknowledgement, ours()) == []
    app = plain()
    add_task(app)
    assert found(configuration.acknowledgement, app) == [WARNING]
    assert found(configuration.acknowledgement, plain(task_acks_late=True)) == [WARNING]
    app = ours()
    add_task(app, acks_late=False)
    assert found(configuration.acknowledgement, app) == [NOTE]


@pytest.mark.parametrize("option", ["accept_content", "result_accept_content"])
def test_pickle(option: str) -> None:
    assert found(configuration.content, ours()) == found(configuration.content, plain()) == []
    assert found(configuration.content, plain(REDIS, REDIS, **{option: ["json", "pickle"]})) == [
        ERROR
    ]
    assert found(configuration.content, plain(task_serializer="pickle")) == [ERROR]


def test_eager_tasks() -> None:
    assert found(configuration.eager, ours()) == []
    assert found(configuration.eager, ours(task_always_eager=True)) == [ERROR]


def test_no_result_backend_or_one_that_others_cannot_read() -> None:
    assert found(configuration.results, ours()) == []
    assert found(configuration.results, plain(backend=None)) == [WARNING]
    assert found(configuration.results, plain(backend="rpc://")) == [WARNING]
    assert found(configuration.results, plain(broker="memory://")) == [ERROR]


@pytest.mark.parametrize(
    ("broker", "expected"),
    [
        (REDIS, []),
        (RABBITMQ, []),
        ("amqps://guest:guest@broker//", [ERROR]),
        ("amqps://broker//", [ERROR]),
        ("amqps://user:l0ng-4nd-0wn@broker//", []),
        ("rediss://broker/0", [ERROR]),
        ("rediss://:secret@broker/0", [ERROR]),
        ("rediss://:l0ng-4nd-0wn@broker/0", []),
        ("redis://:l0ng-4nd-0wn@broker/0", [NOTE]),
    ],
)
def test_passwords_that_everybody_knows(broker: str, expected: list[Severity]) -> None:
    assert found(configuration.secrets, plain(broker=broker)) == expected


def test_a_secret_that_is_written_in_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Settings):
        secret_key: str = "changed-by-nobody"

    app = ours()
    assert found(configuration.secrets, app, Mine()) == [ERROR]
    monkeypatch.setenv("SECRET_KEY", "own")
    assert found(configuration.secrets, app, Mine()) == []


def test_two_beats() -> None:
    entry = {"task": "task", "schedule": crontab(minute=0)}
    assert found(configuration.schedulers, plain()) == []
    assert found(configuration.schedulers, plain(beat_schedule={"often": entry})) == [WARNING]
    assert found(configuration.schedulers, ours(beat_schedule={"often": entry})) == []


def test_the_visibility_timeout_of_kombus_transport() -> None:
    for app in (ours(), adopt(plain())):
        add_task(app, time_limit=4000)
        assert found(configuration.visibility, app) == []  # renewed by a lease
    app = plain(task_time_limit=10)
    add_task(app, time_limit=4000)
    assert found(configuration.visibility, app) == [ERROR]
    options: dict[str, Any] = {"broker_transport_options": {"visibility_timeout": 5000}}
    app = plain(task_time_limit=10, **options)
    add_task(app, time_limit=4000)
    assert found(configuration.visibility, app) == []
    app = plain(**options)
    add_task(app, "endless")
    assert found(configuration.visibility, app) == [WARNING]
    app = ours(broker_transport="kombu.transport.redis:Transport", task_time_limit=60)
    app.conf.beat_schedule = {
        "later": {"task": "task", "schedule": 60, "options": {"countdown": 7200}}
    }
    assert found(configuration.visibility, app) == [ERROR]
    assert found(configuration.visibility, plain(broker=RABBITMQ)) == []


def test_the_longest_run_and_wait() -> None:
    app = plain(task_time_limit=100)
    add_task(app, "short", time_limit=5, default_retry_delay=7)
    add_task(app, "long", max_retries=0)
    add_task(app, "backoff", retry_backoff=True, retry_backoff_max=500)
    with Patient(app, None, None) as patient:
        run, wait = durations.longest_run(patient), durations.longest_wait(patient)
        assert run is not None
        assert run.seconds == 100
        assert wait is not None
        assert wait.seconds == 500
        assert durations.unlimited(patient) == []


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    app, installed = ours(), metadata.version
    assert found(configuration.versions, app) == []
    versions = {"celery": "5.4.0", "broadcaster": "0.3.1"}
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or installed(name))
    assert found(configuration.versions, app) == [WARNING, ERROR]


def test_classic_queues_and_quorum_queues_without_dead_letters() -> None:
    assert found(rabbitmq.queue_types, ours(RABBITMQ)) == []
    assert found(rabbitmq.queue_types, plain(RABBITMQ)) == [NOTE]
    assert found(rabbitmq.queue_types, plain(RABBITMQ, task_default_queue_type="quorum")) == [
        WARNING
    ]
    assert found(rabbitmq.queue_types, plain(REDIS)) == []


def test_publisher_confirms_and_heartbeats() -> None:
    assert found(rabbitmq.confirms, ours(RABBITMQ)) == []
    assert found(rabbitmq.confirms, plain(RABBITMQ)) == [WARNING]
    assert found(rabbitmq.heartbeat, ours(RABBITMQ)) == []
    assert found(rabbitmq.heartbeat, plain(RABBITMQ, broker_heartbeat=0)) == [WARNING]
    assert found(rabbitmq.heartbeat, ours(RABBITMQ, worker_pool="solo")) == [WARNING]
    limited = ours(RABBITMQ, worker_pool="solo", task_time_limit=5)
    add_task(limited)
    assert found(rabbitmq.heartbeat, limited) == []
