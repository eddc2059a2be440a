import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

import pytest
from celery import Celery, Task, current_app, shared_task
from celery.result import AsyncResult

from celeriac import Settings, adopt, create_celery, use_app
from celeriac.embedded import Valkey
from celeriac.errors import AmbiguousAppError, ConfigurationError
from support import run_python

T = TypeVar("T")


@shared_task
def shared() -> None: ...


@pytest.fixture(autouse=True)
def _no_app_of_another_test() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


def in_new_thread(function: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def make(name: str, broker: str = "memory://", **options: Any) -> Celery:
    settings = Settings(celery_broker_url=broker, celery_result_backend="cache+memory://")
    return create_celery(settings, name=name, **options)


def test_a_sole_adopted_app_is_the_default_in_every_thread() -> None:
    app = make("one")
    assert shared.app is app
    assert in_new_thread(lambda: shared.app) is app
    assert in_new_thread(lambda: AsyncResult("x").app.main) == "one"


def test_adopting_a_plain_app_changes_neither_it_nor_what_was_set_on_purpose() -> None:
    app = Celery("plain", broker="memory://", backend="cache+memory://")
    app.conf.task_track_started = False
    assert adopt(app) is app
    assert type(app) is Celery
    assert app.conf.task_track_started is False
    assert app.conf.task_acks_late is False


def test_of_two_apps_the_chosen_one_is_meant_and_without_a_choice_the_error_says_how() -> None:
    first, second = make("first"), make("second")
    with use_app(first):
        assert shared.app is first
        with use_app(second):
            assert shared.app is second
        assert current_app.main == "first"
        context = copy_context()  # as a server takes it along into its threads
        assert in_new_thread(lambda: context.run(lambda: shared.app)) is first
    with pytest.raises(AmbiguousAppError, match=r"first, second.*use_app"):
        shared.delay()
    with pytest.raises(AmbiguousAppError):
        in_new_thread(shared.delay)


def test_p19_a_task_sent_through_one_app_never_reaches_the_other(valkey: Valkey) -> None:
    apps = [make(f"app{n}", valkey.celery_url.replace("=0", f"={n}")) for n in (1, 2)]
    received: dict[str, set[str]] = {app.main: set() for app in apps}

    def send(app: Celery) -> None:
        with use_app(app):
            for _ in range(50):
                result = shared.delay()
                received[result.app.main].add(result.id)

    threads = [threading.Thread(target=send, args=(app,)) for app in apps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for app in apps:
        with app.connection_for_read() as connection, connection.channel() as channel:
            assert channel.queue_declare("celery").message_count == 50
            ids = {channel.basic_get("celery", no_ack=True).headers["id"] for _ in range(50)}
        assert ids == received[app.main]


def test_two_configurations_hold_although_the_environment_names_one_broker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://environment")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://environment")
    app = make("one")
    assert app.connection_for_write().transport_cls == "memory"
    assert app.connection_for_read().transport_cls == "memory"
    assert type(app.backend).__name__ == "CacheBackend"


def test_an_app_that_nobody_holds_is_no_longer_a_candidate() -> None:
    make("gone")
    app = make("kept")
    assert shared.app is app


def test_without_any_app_the_error_says_what_to_do_and_a_factory_is_asked_first() -> None:
    code = (
        "import celeriac, celery\n"
        "try:\n"
        "    celeriac.current_app()\n"
        "except celeriac.errors.NoAppError as error:\n"
        "    print(error)\n"
        "@celery.shared_task\n"
        "def shared(): ...\n"
        "def factory():\n"
        "    print('made')\n"
        "    return celeriac.adopt(celery.Celery('lazy', broker='memory://'))\n"
        "celeriac.default_app(factory)\n"
        "print('imported')\n"
        "print(shared.delay().app.main, shared.app.main)\n"
    )
    first, *rest = run_python("-c", code).stdout.splitlines()
    assert first == "no Celery app is adopted yet: call celeriac.adopt(celery_app) first"
    assert rest == ["imported", "made", "lazy lazy"]


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigurationError, match=r"task_ack_late is not .* mean task_acks_late"):
        make("one", task_ack_late=True)


def test_settings_win_over_options_and_options_over_the_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CELERY_TASK_TIME_LIMIT", "3")
    app = make("one", task_time_limit=9, task_acks_late=False)
    assert app.conf.task_time_limit == 3
    assert app.conf.task_acks_late is False
    assert app.conf.task_reject_on_worker_lost is True


def test_pickle_is_refused() -> None:
    assert make("one").conf.accept_content == ["json"]


def test_each_queue_gets_only_its_own_messages() -> None:
    app = make("one", task_queues=["fast", "slow"], task_default_queue="fast")
    with use_app(app):
        shared.delay()
        shared.apply_async(queue="slow")
    with app.connection_for_read() as connection, connection.channel() as channel:
        for queue in app.amqp.queues.values():
            queue(channel).declare()
            assert channel.queue_declare(queue.name).message_count == 1


def test_tasks_of_an_adopted_app_are_plain_tasks() -> None:
    app = make("one")

    @app.task(bind=True)
    def double(self: Task, x: int) -> int:
        assert isinstance(self, Task)
        return x * 2

    assert double.apply((2,)).get() == 4
    assert str(type(double.delay(2))) == "<class 'celery.result.AsyncResult'>"


def test_importing_celeriac_loads_no_framework_and_no_driver() -> None:
    code = (
        "import sys, celeriac\n"
        "print([m for m in ('fastapi','flask','sqlalchemy','redis','celery') if m in sys.modules])"
    )
    assert run_python("-c", code).stdout.strip() == "[]"
