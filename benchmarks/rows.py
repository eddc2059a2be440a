"""What is compared: a row is a few lines here, and a framework a file in `apps/`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from redis import Redis

Left = Callable[["Redis", int], int]


def keys(pattern: str) -> Left:
    """One key for each result."""

    def left(client: Redis, count: int) -> int:
        return count - sum(1 for _ in client.scan_iter(pattern, count=2000))

    return left


def fields(key: str) -> Left:
    """One field of a hash for each result."""
    return lambda client, count: count - int(client.hlen(key))


def members(key: str) -> Left:
    """A set of those whose result is not stored yet."""
    return lambda client, count: int(client.zcard(key))


@dataclass(frozen=True)
class Framework:
    app: str  # the module in apps/
    environment: str  # "main", or the name of benchmarks/*.in
    left: Left  # how many of `count` results are still to be stored
    packages: tuple[str, ...]  # whose versions are reported
    fill: str = "sender"  # the publisher that fills a worker's queue


@dataclass(frozen=True)
class Row:
    name: str
    framework: Framework
    command: str = ""  # of the worker; {redis} is the server's URL
    task: str = "noop"
    sender: str = "sender"  # the publisher in the app's module
    env: Mapping[str, str] = field(default_factory=dict)
    share: float = 1.0  # of the tasks, for a row that would take minutes
    note: str = ""
    web: str = ""  # the module of the web process in apps/
    site: str = ""  # options of its server
    client: str = "sockets"  # how it is told: see `follower`


_REDIS = "celery-task-meta-*"
CELERY = Framework("stock", "main", keys(_REDIS), ("celery", "kombu", "redis"))
OURS = Framework("ours", "main", keys(_REDIS), ("celeriac",), fill="delay")
TASKIQ = Framework("taskiq", "peers", keys("result:*"), ("taskiq", "taskiq-redis", "redis"))
STREAQ = Framework("streaq", "peers", keys("streaq:default:task:results:*"), ("streaq", "coredis"))
DRAMATIQ = Framework("dramatiq", "peers", keys("dramatiq-results:*"), ("dramatiq", "redis"))
RQ = Framework("rq", "peers", keys("rq:results:*"), ("rq", "redis"))
HUEY = Framework("huey", "peers", fields("huey.results.bench"), ("huey", "redis"))
ARQ = Framework("arq", "peers-redis5", keys("arq:result:*"), ("arq", "redis"))
SAQ = Framework("saq", "peers-redis5", members("saq:default:incomplete"), ("saq", "redis"))
BARE = Framework("stock", "main", keys(_REDIS), ("fastapi", "uvicorn", "websockets"))
BROADCASTER = Framework(
    "broadcaster", "peers-broadcaster", keys(_REDIS), ("broadcaster", "celery", "redis")
)

_STOCK = "celery -A benchmarks.apps.stock worker --loglevel WARNING"
_OURS = "celery -A benchmarks.apps.ours worker --loglevel WARNING"
_TASKIQ = "taskiq worker benchmarks.apps.taskiq:broker --workers 1 --log-level WARNING"
_ARQ = "arq benchmarks.apps.arq.Worker --custom-log-dict benchmarks.apps.arq.QUIET"
_SAQ = "saq benchmarks.apps.saq.settings"
_STREAQ = "streaq run benchmarks.apps.streaq:worker"
_POOL = {"BENCH_POOL": "celeriac.pool:TaskPool"}

_LATE = "late acknowledgement"
_ASYNC = "async def"
WORKER = [
    Row("Celery prefork -c 2", CELERY, f"{_STOCK} -P prefork -c 2", note=_LATE),
    Row(
        "Celery prefork -c 2, events",
        CELERY,
        f"{_STOCK} -P prefork -c 2 -E",
        note=f"{_LATE}, task events on",
    ),
    Row("Celery threads -c 2", CELERY, f"{_STOCK} -P threads -c 2", note=_LATE),
    Row("Celery solo", CELERY, f"{_STOCK} -P solo", note=_LATE),
    Row("celeriac pool", OURS, f"{_OURS} -c 100", env=_POOL, note=f"async def, {_LATE}"),
    Row(
        "celeriac pool, events",
        OURS,
        f"{_OURS} -c 100 -E",
        env=_POOL,
        note=f"async def, {_LATE}, task events on",
    ),
    Row(
        "celeriac pool, sync",
        OURS,
        f"{_OURS} -c 100",
        "noop_sync",
        env=_POOL,
        note=f"def, in the pool's threads, {_LATE}",
    ),
    Row("celeriac prefork -c 2", OURS, f"{_OURS} -c 2", "noop_sync", note=f"def, {_LATE}"),
    Row(
        "taskiq list",
        TASKIQ,
        f"{_TASKIQ} --max-async-tasks 100",
        env={"BENCH_BROKER": "list"},
        note="async def, at most once: a list has no acknowledgement",
    ),
    Row(
        "taskiq stream",
        TASKIQ,
        f"{_TASKIQ} --max-async-tasks 100 --ack-type when_saved",
        note="async def, acknowledged after the result",
    ),
    Row("arq", ARQ, _ARQ, note="async def, at least once"),
    Row("saq", SAQ, _SAQ, note="async def, at least once"),
    Row("streaq", STREAQ, _STREAQ, note="async def, at least once"),
    Row(
        "dramatiq",
        DRAMATIQ,
        "dramatiq benchmarks.apps.dramatiq -p 1 -t 8",
        note="def, acknowledged after the result",
    ),
    Row(
        "rq",
        RQ,
        "rq worker --url {redis} --quiet -S json -w rq.SimpleWorker",
        note="def, SimpleWorker: the default forks for each job",
    ),
    Row(
        "huey",
        HUEY,
        "huey_consumer benchmarks.apps.huey.huey -q -k thread -w 2",
        note="def, at most once: no acknowledgement",
    ),
]

_K = {"BENCH_CONCURRENCY": "1000"}
IO = [
    Row(
        "Celery prefork -c 8",
        CELERY,
        f"{_STOCK} -P prefork -c 8",
        "wait",
        share=0.25,
        note="def, eight at once",
    ),
    Row(
        "Celery threads -c 100",
        CELERY,
        f"{_STOCK} -P threads -c 100",
        "wait",
        note="def, a hundred at once",
    ),
    Row("celeriac pool", OURS, f"{_OURS} -c 1000", "wait", env=_POOL, note=_LATE),
    Row(
        "celeriac threads -c 100",
        OURS,
        f"{_OURS} -P threads -c 100",
        "wait",
        note="async def, a hundred at once on one loop",
    ),
    Row(
        "taskiq list",
        TASKIQ,
        f"{_TASKIQ} --max-async-tasks 1000",
        "wait",
        env={"BENCH_BROKER": "list"},
    ),
    Row("taskiq stream", TASKIQ, f"{_TASKIQ} --max-async-tasks 1000", "wait"),
    Row("arq", ARQ, _ARQ, "wait", env=_K),
    Row("saq", SAQ, _SAQ, "wait", env=_K),
    Row("streaq", STREAQ, _STREAQ, "wait", env=_K),
]
CROWD = [
    Row("celeriac pool -c 10000", OURS, f"{_OURS} -c 10000", "wait", env=_POOL, note=_LATE),
]

LATENCY = [
    Row("Celery solo", CELERY, f"{_STOCK} -P solo", note=_LATE),
    Row(
        "Celery solo, STARTED",
        CELERY,
        f"{_STOCK} -P solo",
        env={"BENCH_STARTED": "1"},
        note=f"{_LATE}, task_track_started",
    ),
    Row("Celery prefork -c 1", CELERY, f"{_STOCK} -P prefork -c 1", note=_LATE),
    Row("Celery threads -c 1", CELERY, f"{_STOCK} -P threads -c 1", note=_LATE),
    Row("celeriac pool", OURS, f"{_OURS} -c 100", env=_POOL, note=f"async def, {_LATE}"),
    Row("celeriac solo", OURS, f"{_OURS} -P solo", "noop_sync", note=f"def, {_LATE}"),
    Row("celeriac prefork -c 1", OURS, f"{_OURS} -P prefork -c 1", "noop_sync", note=_LATE),
]

PUBLISH = [
    Row("Celery delay()", CELERY, note="blocks the loop"),
    Row("Celery run_in_threadpool", CELERY, sender="threadpool", note="40 threads"),
    Row("celeriac adelay", OURS),
    Row("celeriac delay()", OURS, sender="delay", note="blocks the loop"),
    Row("taskiq list", TASKIQ, env={"BENCH_BROKER": "list"}),
    Row("taskiq stream", TASKIQ),
    Row("arq", ARQ),
    Row("saq", SAQ),
    Row("streaq", STREAQ),
    Row("dramatiq", DRAMATIQ, note="blocks the loop"),
    Row("rq", RQ, note="blocks the loop"),
    Row("huey", HUEY, note="blocks the loop"),
]
ONCE = [
    Row("Celery delay() loop", CELERY, sender="delay_loop"),
    Row("kombu publish batch", CELERY, sender="batch", note="Celery's messages, kombu's batch"),
    Row("celeriac publish_many", OURS, sender="publish_many"),
    Row("celeriac gather(adelay)", OURS, sender="gather", note="a deadline of 60 s each"),
]

_PLAIN = "--ws-per-message-deflate false"
_BROADCASTER = "celery -A benchmarks.apps.broadcaster worker --loglevel WARNING -P prefork -c 2"
ENDS = [
    Row(
        "Celery, asked once a second",
        CELERY,
        f"{_STOCK} -P prefork -c 2",
        "timed",
        web="stock_web",
        client="polls",
        note="a route over AsyncResult, 20 clients",
    ),
    Row(
        "broadcaster, task_postrun",
        BROADCASTER,
        _BROADCASTER,
        "timed",
        web="broadcaster_web",
        note="def, prefork -c 2",
    ),
    Row("celeriac pool", OURS, f"{_OURS} -c 100", "timed", env=_POOL, web="ours_web", note=_ASYNC),
    Row("celeriac prefork -c 2", OURS, f"{_OURS} -c 2", "timed_sync", web="ours_web", note="def"),
]
SOCKETS = [
    Row("FastAPI alone", BARE, web="bare_web", site=_PLAIN, note="follows nothing"),
    Row(
        "broadcaster, task_postrun",
        BROADCASTER,
        _BROADCASTER,
        "timed",
        web="broadcaster_web",
        site=_PLAIN,
        share=0.2,
    ),
    Row("celeriac", OURS, f"{_OURS} -c 100", "timed", env=_POOL, web="ours_web", site=_PLAIN),
    Row(
        "celeriac, compressed",
        OURS,
        f"{_OURS} -c 100",
        "timed",
        env=_POOL | {"BENCH_DEFLATE": "1"},
        web="ours_web",
        note="as browsers offer it and uvicorn takes it",
    ),
]

_TELLS = {
    "nothing told": ("nothing", "its states taken out: results and runs alone"),
    "ends": ("ends", "task_track_started off: no STARTED"),
    "all told": ("all", "as it is"),
}
TOLD_BY_POOL = [
    Row(
        f"celeriac pool, {name}",
        OURS,
        f"{_OURS} -c 100",
        env=_POOL | {"BENCH_TOLD": what},
        note=note,
    )
    for name, (what, note) in _TELLS.items()
]
TOLD_BY_PREFORK = [
    Row(
        f"celeriac prefork -c 2, {name}",
        OURS,
        f"{_OURS} -c 2",
        "noop_sync",
        env={"BENCH_TOLD": what},
        note=note,
    )
    for name, (what, note) in _TELLS.items()
]

UNIT = Framework("outbox", "main", keys(_REDIS), ("celeriac", "sqlalchemy"))
PROCRASTINATE = Framework(
    "procrastinate", "peers-procrastinate", keys(_REDIS), ("procrastinate", "sqlalchemy")
)
UNITS = [
    Row("a row, no message", UNIT, sender="commit_only"),
    Row("adelay after the commit", UNIT, sender="delay_after", note="lost with its process"),
    Row("delay_on_commit", UNIT, sender="on_commit", note="lost with its process"),
    Row("delay_on_commit, outbox", UNIT, sender="outbox"),
    Row("the same, left to a relay", UNIT, sender="relayed"),
    Row("delay_on_commit, outbox, threads", UNIT, sender="outbox_in_threads", note="8 threads"),
]
UNITS_IN_POSTGRESQL = [
    *UNITS,
    Row("procrastinate defer", PROCRASTINATE, note="a transaction of its own, after the row's"),
]
