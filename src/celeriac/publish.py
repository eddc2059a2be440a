"""Publish from a coroutine: Celery's own message, sent without blocking the event loop.

On Redis over one connection of the loop, elsewhere by a few threads. Every call ends at its
deadline.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from functools import partial
from itertools import islice
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import celery
from celery import Celery, _state, signals
from celery.canvas import Signature
from celery.result import ResultBase
from celery.utils import uuid
from kombu.exceptions import OperationalError
from redis.exceptions import ResponseError

from celeriac import amqp, bridge, conf, producer, rabbitmq, threads
from celeriac.errors import ConfigurationError, PublishError, PublishManyError
from celeriac.handle import Handle, handle

TIMEOUT = 2.0  # seconds
_LANES = 8  # of one `publish_many`, each with so many messages on their way at once:
_BURST = 8  # as many are begun in one tick of the loop: others wait meanwhile

T = TypeVar("T")

_timeouts: WeakKeyDictionary[Celery, float] = WeakKeyDictionary()


def support(app: Celery, timeout: float | None) -> None:
    """Keep the deadline of calls that give none, and let every message of a canvas have it."""
    if timeout is not None:
        _timeouts[app] = _checked(timeout)
    amqp.use_amqp(app)
    conf.use_conf(app)


def _checked(seconds: float) -> float:
    if not seconds > 0:
        raise ConfigurationError(f"publish_timeout: expected seconds above 0, got {seconds!r}")
    return seconds


def _timeout_of(app: Celery, given: float | None) -> float:
    return _timeouts.get(app, TIMEOUT) if given is None else _checked(given)


async def adelay(task: celery.Task | Signature, /, *args: Any, **kwargs: Any) -> Handle:
    """`task.delay(…)` of any task, signature, chain, group or chord, without blocking the loop.

    Gives Celery's AsyncResult, whose `result` is awaited, and a GroupResult for a group. Raises
    PublishError within the deadline, by default 2 seconds, if the broker is away, refuses or does
    not answer.
    """
    return await aapply_async(task, args, kwargs)


async def aapply_async(
    task: celery.Task | Signature,
    args: Iterable[Any] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    publish_timeout: float | None = None,
    **options: Any,
) -> Handle:
    """`task.apply_async(…)`, with the options of Celery's, without blocking the loop.

    `publish_timeout` is the deadline in seconds. `retry` and `retry_policy` do nothing: a message
    is written once, since a second time might double the task. Raises PublishError.
    """
    if not isinstance(task, Signature):
        options["task_id"] = options.get("task_id") or uuid()
    elif type(task) is Signature:
        options["task_id"] = options.get("task_id") or task.options.get("task_id") or uuid()
    else:  # a canvas: several messages, and what a chord keeps in the result backend
        sent = await _publish(
            task.app, task.apply_async, (args, kwargs), options, publish_timeout, canvas=True
        )
        return handle(sent, task.app)
    sent = await _publish(task.app, task.apply_async, (args, kwargs), options, publish_timeout)
    return handle(sent, task.app)


async def asend_task(
    app: Celery,
    name: str,
    args: Iterable[Any] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    publish_timeout: float | None = None,
    **options: Any,
) -> Handle:
    """`app.send_task(name, …)`, for a task that is not defined here, without blocking the loop."""
    options["task_id"] = options.get("task_id") or uuid()
    if options.get("countdown") or options.get("eta"):
        options |= rabbitmq.delay(app, options)
    sent = await _publish(
        app, app.send_task, (name, args, kwargs), options, publish_timeout, eager=False
    )
    return handle(sent)


async def _publish(
    app: Celery,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    timeout: float | None,
    *,
    canvas: bool = False,
    eager: bool = True,
) -> Any:
    timeout = _timeout_of(app, timeout)
    eager = eager and app.conf.task_always_eager
    if eager:
        with _eager_runs:
            return await bridge.call(partial(function, *args, **options))
    if not canvas and (link := await producer.link(app)) is not None:
        return await _over_link(link, function, args, options, timeout)
    context = bridge.context_of_tracer()
    if "reply_to" not in options and not canvas:
        options["reply_to"] = app.thread_oid  # of this thread, where the answer is awaited

    def send(sender: threads.Sender) -> Any:
        if canvas:
            return function(*args, **options)
        return function(*args, **{"producer": sender.producer, **options})

    with _refusals(options.get("task_id")):
        return await threads.run(app, send, timeout, context)


async def _over_link(
    link: producer.Link,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    timeout: float,
) -> Any:
    due = asyncio.get_running_loop().time() + timeout
    with _refusals(options.get("task_id")):
        if (begun := _begin(link, function, args, options, due)) is not None:
            return await begun.end()
        context: Context = bridge.context_of_tracer()
        context.run(producer.deadline.set, due)
        send = partial(function, *args, **{**link.options, **options})
        return await bridge.Hosted(send).run(context)


def _begin(
    link: producer.Link,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    due: float,
) -> producer.Begun | None:
    """Write the message, if that is all that `function` is to do; its reply comes later."""
    if link.begins and _nobody_waits(function):
        with suppress(producer.MustWaitError):
            return link.begin(partial(function, *args, **{**link.options, **options}), due)
    return None


def _nobody_waits(function: Callable[..., Any]) -> bool:
    """Whether nothing comes after the writing of a message that belongs after its reply."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, Signature):
        function = owner._apply_async  # the task's
    return (
        not any(signal.receivers for signal in _SIGNALS)
        and getattr(function, "__func__", None) in _only_publish
        and _state.get_current_worker_task() is None  # which keeps the results of what it sent
    )


_SIGNALS = signals.before_task_publish, signals.after_task_publish, signals.task_sent
_only_publish: set[Any] = {celery.Task.apply_async, Celery.send_task}


def only_publishes(function: T) -> T:
    """Say of a method that nothing but the message comes of it, as of Celery's own."""
    _only_publish.add(function)
    return function


@contextmanager
def _refusals(task_id: str | None) -> Iterator[None]:
    """Of a broker, as a PublishError of this task."""
    try:
        yield
    except PublishError as error:
        error.task_id = error.task_id or task_id
        raise
    except (OperationalError, ResponseError) as error:  # a reply, and what kombu makes of it
        raise PublishError(str(error), task_id=task_id) from error


class _EagerRuns:
    """Eager tasks that run at once on one loop.

    Celery's flag that forbids waiting for results inside a task is one for the process. Each run
    puts back what it found, which is another's where they overlap: the last puts it right.
    """

    def __init__(self) -> None:
        self._count, self._found = 0, False

    def __enter__(self) -> None:
        if self._count == 0:
            self._found = _state.task_join_will_block()
        self._count += 1

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if self._count == 0:
            _state._set_task_join_will_block(self._found)


_eager_runs = _EagerRuns()


async def publish_many(
    signatures: Iterable[Signature], *, publish_timeout: float | None = None
) -> list[Handle]:
    """Publish many signatures, of whatever apps; their results in the same order.

    On Redis they are written and answered in batches; the loop stays free in between. The
    deadline is that of each message, from its turn on. At the first failure nothing further is
    begun: PublishManyError says which were accepted. An error in a signature is raised as it is,
    with a note of how many were sent.
    """
    many = _Many(list(signatures), publish_timeout)
    await many.find_links()
    lanes: list[asyncio.Task[None]] = []
    try:
        for _ in range(_LANES):
            lanes.append(asyncio.create_task(many.send_in_turn(), name="celeriac-publish-many"))
            await asyncio.sleep(0)
        ended = await asyncio.gather(*lanes, return_exceptions=True)
    finally:
        for each in lanes:
            each.cancel()
    accepted = [each for each in many.outcomes if isinstance(each, ResultBase)]
    for error in ended:
        if isinstance(error, BaseException):
            error.add_note(f"{len(accepted)} of {len(many.asked)} messages were sent")
            raise error
    if len(accepted) < len(many.asked):
        raise PublishManyError(many.all_outcomes())
    return accepted


class _Many:
    """Many messages, sent by several lanes that each take the next ones when theirs are sent."""

    def __init__(self, asked: list[Signature], timeout: float | None) -> None:
        self.asked, self._timeout = asked, timeout
        self.outcomes: list[Handle | PublishError | None] = [None] * len(asked)
        self._turns = iter(range(len(asked)))
        self._links: dict[Celery, tuple[producer.Link, float]] = {}
        self._stopped = False

    async def find_links(self) -> None:
        """Of the apps whose messages can be written before the first is answered."""
        for app in {each.app for each in self.asked if type(each) is Signature}:
            link = await producer.link(app)
            if link is not None and not app.conf.task_always_eager:
                self._links[app] = link, _timeout_of(app, self._timeout)

    async def send_in_turn(self) -> None:
        while not self._stopped and (turns := list(islice(self._turns, _BURST))):
            under_way: list[tuple[int, producer.Begun]] = []
            try:
                await self._send(turns, under_way)
            except BaseException:
                self._stopped = True
                for _, begun in under_way:
                    begun.leave()
                raise

    async def _send(self, turns: list[int], under_way: list[tuple[int, producer.Begun]]) -> None:
        try:
            for turn in turns:
                if (begun := self._begin(self.asked[turn])) is not None:
                    under_way.append((turn, begun))
                elif not self._stopped:
                    alone = aapply_async(self.asked[turn], publish_timeout=self._timeout)
                    await self._settle(turn, None, alone)
        finally:
            for turn, begun in under_way:
                await self._settle(turn, begun.result.id, begun.end())

    def _begin(self, signature: Signature) -> producer.Begun | None:
        if self._stopped or type(signature) is not Signature or signature.app not in self._links:
            return None
        link, timeout = self._links[signature.app]
        task_id = signature.options.get("task_id") or uuid()
        due = asyncio.get_running_loop().time() + timeout
        return _begin(link, signature.apply_async, (), {"task_id": task_id}, due)

    async def _settle(
        self, turn: int, task_id: str | None, sending: Coroutine[Any, Any, Any]
    ) -> None:
        try:
            with _refusals(task_id):
                self.outcomes[turn] = handle(await sending)
        except PublishError as error:
            self.outcomes[turn], self._stopped = error, True

    def all_outcomes(self) -> list[Handle | PublishError]:
        reason = "not begun, since another one failed"
        return [
            PublishError(reason, task_id=signature.options.get("task_id"))
            if outcome is None
            else outcome
            for signature, outcome in zip(self.asked, self.outcomes, strict=True)
        ]
