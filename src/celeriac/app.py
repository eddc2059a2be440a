"""Compose the parts around a plain Celery app, and find the app that is meant here."""

import atexit
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import celery
from celery import Celery, _state
from celery.local import Proxy
from celery.signals import (
    beat_init,
    celeryd_after_setup,
    celeryd_init,
    worker_process_shutdown,
    worker_shutdown,
)
from celery.utils.imports import symbol_by_name

from celeriac import (
    amqp,
    backend,
    bridge,
    burial,
    delivery,
    dispatcher,
    messages,
    profile,
    publish,
    rabbitmq,
    serialization,
    store,
    task,
)
from celeriac import lease as leases
from celeriac import lifespan as lifespans
from celeriac.errors import (
    AmbiguousAppError,
    ConfigurationError,
    LateAdoptionError,
    NoAppError,
)
from celeriac.settings import Settings, check_option
from celeriac.typed import App, typed

# Adopted apps that are alive, with the settings they were made from.
_adopted: WeakKeyDictionary[Celery, Settings | None] = WeakKeyDictionary()


_leases: WeakKeyDictionary[Celery, float] = WeakKeyDictionary()  # seconds


@dataclass
class _Fallback:
    """What makes an app where one is needed and none was made; what it made is no rival."""

    factory: Callable[[], Celery] | None = None
    app: Celery | None = None
    lock: AbstractContextManager[Any] = field(default_factory=RLock)


_fallback = _Fallback()
_finders: list[Callable[[], Celery | None]] = []
_chosen: ContextVar[Celery | None] = ContextVar("celeriac_app", default=None)


def adopt(
    app: Celery,
    *,
    status_store: str | None = None,
    publish_timeout: float | None = None,
    lifespan: lifespans.Lifespan | None = None,
    lease: float = leases.SECONDS,
    max_deliveries: int = delivery.MAX_DELIVERIES,
    task_context: task.TaskContext | None = None,
) -> App:
    """Make `app` known to celeriac and return it. Its tasks, workers and commands stay as they are.

    A sole adopted app becomes the default of shared tasks in every thread; of several, the one
    chosen with `use_app`, which a request of a FastAPI application does for its own. The states
    of all its tasks become visible while they run. What was configured on purpose stays.

    `status_store` is the URL of another Redis than the result backend's, for those who watch.
    `publish_timeout` is the deadline, in seconds, of publishing from coroutines (2 by default).
    `lifespan(app)` is an asynchronous context manager that every worker process enters before its
    first task and leaves after its last, on the event loop of its tasks. If it raises, the worker
    ends with a non-zero exit code and the reason in its log.
    `lease` is how many seconds a worker's hold on its messages lasts without being renewed: those
    of one that dies are back in their queues that soon (with a Redis as the broker).
    `max_deliveries` is how often a task is started whose worker dies of it (needs a Redis as the
    result backend).
    `task_context(task)` is a context manager that each task's body runs in, in whatever pool; where
    a task is called directly its `request.called_directly` is true.
    """
    if not lease >= 1:
        raise ConfigurationError(f"lease: expected at least 1 second, got {lease!r}")
    if task_context is not None:
        app.celeriac_task_context = task_context
    _support_async_bodies(app)
    serialization.use()
    if not max_deliveries >= 1:
        raise ConfigurationError(f"max_deliveries: expected at least 1, got {max_deliveries!r}")
    _leases[app] = lease
    delivery.max_deliveries[app] = max_deliveries
    burial.keep_exhausted(app)
    publish.support(app, publish_timeout)
    dispatcher.use_dispatcher(app)
    app.steps["worker"].add("celeriac.shutdown:Shutdown")
    _adopted.setdefault(app, None)
    if lifespan is not None:
        lifespans.keep(app, lifespan)
    if status_store is not None:
        store.keep_status_in(app, status_store)
    app.loader.override_backends = backend.BACKENDS | app.loader.override_backends
    app.add_defaults(
        {
            "task_track_started": True,
            "task_store_eager_result": True,
            "worker_consumer": "celeriac.delivery:Consumer",
        }
    )
    backend.report_ignored_results(app)
    app.steps["worker"].add("celeriac.pulse:Pulse")  # by name: only workers import it
    # Celery's own choice is the app made last in this thread, and none in any other.
    _state._set_current_app(None)
    _state.set_default_app(Proxy(current_app))
    return typed(app)


def _support_async_bodies(app: Celery) -> None:
    if app in _adopted:
        return
    if "Task" in app.__dict__:  # the base class of its tasks, made with the first of them
        made = [name for name in app._tasks if not name.startswith("celery.")]
        if made:
            raise LateAdoptionError(made)
        del app.__dict__["Task"]
    base = symbol_by_name(app.task_cls)
    if not issubclass(base, task.Task):
        ours = task.Task
        app.task_cls = ours if base is celery.Task else type("Task", (ours, base), {})
    task.follow_bodies()
    app.on_after_finalize.connect(_adopt_foreign_tasks)
    worker_process_shutdown.connect(_close_loop)
    worker_shutdown.connect(_close_loop)


def _adopt_foreign_tasks(sender: Celery, **_: Any) -> None:
    for each in sender._tasks.values():
        task.adopt_body(each)


@celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def _adopt_tasks_made_since(instance: Any, **_: Any) -> None:
    """Those registered after the app was finalized, before the worker's pool starts."""
    if instance.app in _adopted:
        try:
            _adopt_foreign_tasks(instance.app)
        except ConfigurationError as error:
            raise SystemExit(f"error: {error}") from None


@celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def _refuse_other_queues(instance: Any, **_: Any) -> None:
    """A queue that exists on RabbitMQ as another one ends the start with one line."""
    if _adopted.get(instance.app) is not None:
        rabbitmq.refuse_mismatch(instance.app)


def _close_loop(**_: Any) -> None:
    lifespans.leave()
    bridge.close()
    leases.process.stop()


@celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def _keep_leases(instance: Any, **_: Any) -> None:
    if instance.app in _leases:
        keeper = leases.process.keep(_leases[instance.app])
        backend.keep_runs(instance.app, keeper)
        atexit.register(leases.process.stop)  # a cold shutdown sends no signal


@contextmanager
def watching_runs(app: Celery) -> Iterator[None]:
    """End, inside the block, the runs of `app`'s tasks whose worker is gone, as its workers do."""
    keeper = leases.Keeper(_leases.get(app, leases.SECONDS))
    backend.keep_runs(app, keeper, in_worker=False)
    try:
        yield
    finally:
        keeper.stop()


def create_celery(
    settings: Settings,
    *,
    name: str = "celeriac",
    lifespan: lifespans.Lifespan | None = None,
    task_context: task.TaskContext | None = None,
    **options: Any,
) -> App:
    """A Celery app made from `settings`, with defaults that lose nothing, adopted.

    `options` are Celery's own, by their lower-case names; `settings` win over them, and both over
    the defaults. `lifespan` and `task_context` are `adopt`'s. Raises ConfigurationError for an
    option that Celery does not have.
    """
    for option in options:
        check_option(option, option)
    config = profile.reliable(options | settings.celery_config(), settings.max_message_size)
    config["beat_lease"] = settings.beat_lease
    app = Celery(name, set_as_current=False)
    app.backend_cls = config["result_backend"]  # which CELERY_RESULT_BACKEND does not beat
    app.conf.update(_without_environment(config))
    if profile.has_quorum_queues(config):
        app.amqp_cls = amqp.QuorumAMQP
        app.steps["consumer"] |= {rabbitmq.DeadLetters, "celeriac.deadqueue:DeadQueue"}
    adopted = adopt(
        app,
        status_store=settings.ws_message_queue,
        publish_timeout=settings.publish_timeout,
        lifespan=lifespan,
        lease=settings.worker_lease,
        max_deliveries=settings.max_deliveries,
        task_context=task_context,
    )
    messages.limit(app, settings.max_message_size)
    _adopted[app] = settings
    return adopted


@celeryd_init.connect  # type: ignore[untyped-decorator]
def _refuse_unknown_queues(instance: Any, options: Mapping[str, Any], **_: Any) -> None:
    """`celery worker -Q misspelt` ends with one line instead of Celery's traceback."""
    app = instance.app
    if app not in _adopted or app.conf.task_create_missing_queues:
        return
    known = app.amqp.queues
    for option in ("queues", "exclude_queues"):
        for queue in options.get(option) or ():
            if queue not in known:
                raise SystemExit(
                    f"error: {queue!r} is no queue; task_queues has {', '.join(sorted(known))}"
                )


@celeryd_init.connect  # type: ignore[untyped-decorator]
def _refuse_absent_broker(instance: Any, **_: Any) -> None:
    """`celery worker` without a broker ends with one line, not with a hundred tries."""
    _probe(instance.app)


@beat_init.connect  # type: ignore[untyped-decorator]
def _refuse_absent_broker_of_beat(sender: Any, **_: Any) -> None:
    _probe(sender.app)


def _probe(app: Celery) -> None:
    if app not in _adopted or _adopted[app] is None:
        return  # somebody's own configuration stays as it is
    if app.conf.broker_connection_retry_on_startup:
        return
    with app.connection_for_read() as connection:
        try:
            connection.ensure_connection(
                max_retries=1, interval_start=0, timeout=profile.SERVER_TIMEOUT
            )
        except Exception as error:  # whatever a broker's library raises
            raise SystemExit(
                f"error: the broker {connection.as_uri()} does not answer: {error}"
            ) from None


def _without_environment(config: dict[str, Any]) -> dict[str, Any]:
    """`config` such that it holds where Celery would rather believe CELERY_BROKER_URL."""
    if os.environ.get("CELERY_BROKER_URL", config["broker_url"]) != config["broker_url"]:
        url = config["broker_url"]
        return {"broker_read_url": url, "broker_write_url": url} | config
    return config


def current_app() -> Celery:
    """The app chosen with `use_app` here, else that of a framework's context, else the sole one.

    Raises NoAppError or AmbiguousAppError.
    """
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    for find in _finders:
        if (found := find()) is not None:
            return found
    if len(_rivals()) > 1:
        gc.collect()  # an app that nobody holds any more lives on in its cycles
    match _rivals():
        case [app]:
            return app
        case [_, *_] as apps:
            raise AmbiguousAppError([app.main or "?" for app in apps])
    with _fallback.lock:
        if _fallback.app is None:
            if _fallback.factory is None:
                raise NoAppError
            _fallback.app = _fallback.factory()
        return _fallback.app


def find_app_with(find: Callable[[], Celery | None]) -> None:
    """Ask `find` for the app that is meant, as a framework knows what request is handled here."""
    _finders.append(find)


def _rivals() -> list[Celery]:
    return [app for app in _adopted if app is not _fallback.app]


def default_app(factory: Callable[[], Celery]) -> None:
    """Call `factory` for an app where one is needed and none was made, as in a shell.

    So `from project.tasks import divide; divide.delay(1, 2)` finds its broker without an entry
    point. Importing still creates nothing.
    """
    _fallback.factory, _fallback.app = factory, None
    if _state.default_app is None:
        _state.set_default_app(Proxy(current_app))


@contextmanager
def use_app(app: Celery) -> Iterator[Celery]:
    """Make `app` the one that shared tasks, and `AsyncResult`, mean inside the block."""
    token = _chosen.set(app)
    try:
        yield app
    finally:
        _chosen.reset(token)


def settings_of(app: Celery | None = None) -> Settings:
    """The settings that `app`, or the current one, was made from by `create_celery`."""
    found = app or current_app()
    settings = _adopted.get(found)
    if settings is None:
        raise ConfigurationError(f"{found!r} was not made from settings: use create_celery")
    return settings
