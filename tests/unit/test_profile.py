import pytest
from celery.app.defaults import DEFAULTS
from kombu.entity import Exchange, Queue
from kombu.utils import functional

from celeriac import Settings, adopt, create_celery
from celeriac.profile import reliable
from celeriac.settings import celery_options
from support import free_port

REDIS = {"broker_url": "redis://host/0", "result_backend": "redis://host/0"}
RABBITMQ = REDIS | {"broker_url": "amqp://guest@host//"}


@pytest.mark.parametrize("services", [REDIS, RABBITMQ], ids=["redis", "rabbitmq"])
def test_every_default_is_an_option_of_celery_and_is_overridden_by_what_is_given(
    services: dict[str, str],
) -> None:
    made = reliable(services)
    assert made.keys() <= celery_options().keys()
    given = {name: DEFAULTS[name] for name in made} | services
    assert reliable(given).items() >= {k: v for k, v in given.items() if v}.items()


def test_a_task_outlives_its_worker_and_a_worker_its_broker() -> None:
    made = reliable(REDIS)
    assert made["task_acks_late"]
    assert made["task_reject_on_worker_lost"]
    assert made["worker_prefetch_multiplier"] == 1
    assert made["broker_connection_max_retries"] is None
    assert 0 < made["worker_soft_shutdown_timeout"] < 10
    assert made["result_expires"] == 86400


def test_no_wait_for_redis_lasts() -> None:
    options = reliable(REDIS)["broker_transport_options"]
    assert options["socket_timeout"] == options["socket_connect_timeout"] == 2
    assert options["socket_keepalive"]
    assert 1 + 2 * options["health_check_interval"] < 10  # seconds that kombu needs to notice
    given = {"broker_transport_options": {"socket_timeout": 9, "visibility_timeout": 60}}
    options = reliable(REDIS | given)["broker_transport_options"]
    assert (options["socket_timeout"], options["visibility_timeout"]) == (9, 60)
    assert options["socket_connect_timeout"] == 2


def test_on_rabbitmq_queues_are_quorum_queues_and_publishing_is_confirmed() -> None:
    made = reliable(RABBITMQ | {"task_queues": ["fast", "slow.mail"]})
    assert made["broker_transport_options"]["confirm_publish"]
    fast, slow = made["task_queues"]
    assert fast.queue_arguments["x-queue-type"] == "quorum"
    assert fast.queue_arguments["x-delivery-limit"] > 20
    assert (fast.exchange.name, fast.exchange.type) == ("celeriac", "topic")
    assert (fast.routing_key, slow.routing_key) == ("fast", "slow%2Email")


def test_queues_made_on_purpose_are_left_alone() -> None:
    mine = Queue("mine", Exchange("mine"), "key")  # type: ignore[no-untyped-call]
    made = reliable(RABBITMQ | {"task_queues": [mine, "ours"]})
    assert made["task_queues"][0] is mine
    assert mine.queue_arguments is None
    for choice in ({"task_default_queue_type": "classic"}, {"task_queue_max_priority": 5}):
        (queue,) = reliable(RABBITMQ | choice | {"task_queues": ["one"]})["task_queues"]
        assert queue.queue_arguments is None
        assert queue.exchange.type == "direct"


def test_redis_queues_are_plain_and_an_adopted_app_keeps_its_queues() -> None:
    (queue,) = reliable(REDIS | {"task_queues": ["one"]})["task_queues"]
    assert queue.queue_arguments is None
    from celery import Celery

    plain = adopt(Celery("plain", broker=RABBITMQ["broker_url"], set_as_current=False))
    assert plain.amqp.queues["celery"].queue_arguments is None
    assert plain.conf.broker_heartbeat == DEFAULTS["broker_heartbeat"]
    assert not plain.conf.broker_transport_options


def test_queues_that_are_not_listed_are_quorum_queues_too() -> None:
    settings = Settings(celery_broker_url=RABBITMQ["broker_url"], celery_result_backend="rpc://")
    app = create_celery(settings, task_default_queue="first")
    assert list(app.amqp.queues) == ["first"]
    for name in ("first", "later"):
        assert app.amqp.queues[name].queue_arguments["x-queue-type"] == "quorum"


def test_a_lost_broker_is_looked_for_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(functional, "sleep", lambda seconds: None)
    settings = Settings(celery_broker_url=f"redis://127.0.0.1:{free_port()}/0")
    app = create_celery(settings)

    def failed(error: Exception, pause: float) -> None:
        pauses.append(pause)
        if len(pauses) == 20:
            raise StopIteration

    with app.connection_for_read() as connection, pytest.raises(StopIteration):
        connection.ensure_connection(failed, app.conf.broker_connection_max_retries)
    assert max(pauses) == pauses[-1] == 4
