"""./run bench: every row of a benchmark, interleaved, on one server; medians of the runs."""

import argparse
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import report, rows
from benchmarks.followed import crowded, told
from benchmarks.measure import Figures, answered, committed, published, worked_off
from benchmarks.process import RowError, bin_of, server
from benchmarks.rows import Row


@dataclass(frozen=True)
class Part:
    """One table: so many tasks or messages, measured for each of its rows."""

    name: str
    rows: list[Row]
    count: int
    measure: Callable[..., Figures]  # (row, redis, folder, count=…)
    columns: tuple[str, ...]  # the first is what the ratios are of
    against: str = ""  # the row that they are to, where that is not Celery's


CALLS = ("messages_per_second", "call_p50_ms", "call_p99_ms", "loop_lag_p99_ms", "cpu_us")
UNITS = ("messages_per_second", "call_p50_ms", "call_p99_ms", "cpu_us")
RATE = ("tasks_per_second", "cpu_us", "peak_mb")
TOLD = ("told_p50_ms", "told_p99_ms", "cpu_us")
SOCKETS = (
    *("socket_kb", "redis_connections", "redis_subscribed"),
    *("work_seconds", "all_seconds", "told_p99_ms", "cpu_us"),
)
TELLING = ("tasks_per_second", "cpu_us", "server_us")
ROUND_TRIP = ("round_trip_p50_ms", "round_trip_p99_ms", "cpu_us")
TIME = ("seconds", "cpu_us", "peak_mb")
BENCHMARKS = {
    "worker": [Part("noop", rows.WORKER, 5000, partial(worked_off, argument=None), RATE)],
    "io": [
        Part("wait", rows.IO, 2000, partial(worked_off, argument=0.1), ("tasks_per_second", *TIME)),
        Part("crowd", rows.CROWD, 10_000, partial(worked_off, argument=1.0), TIME),
    ],
    "latency": [Part("idle", rows.LATENCY, 1000, answered, ROUND_TRIP)],
    "publish": [
        Part("handlers", rows.PUBLISH, 10_000, partial(published, mode="handlers"), CALLS),
        Part("once", rows.ONCE, 10_000, partial(published, mode="once"), ("seconds", "cpu_us")),
    ],
    "outbox": [
        Part(name, found, 4000, partial(committed, database=name), UNITS, found[0].name)
        for name, found in (("sqlite", rows.UNITS), ("postgresql", rows.UNITS_IN_POSTGRESQL))
    ],
    "status-ends": [Part("ends", rows.ENDS, 200, told, TOLD)],
    "status-sockets": [
        Part("sockets", rows.SOCKETS, 5000, crowded, SOCKETS, "broadcaster, task_postrun")
    ],
    "status-cost": [
        Part(name, found, 5000, partial(worked_off, argument=None), TELLING, found[0].name)
        for name, found in (("pool", rows.TOLD_BY_POOL), ("prefork", rows.TOLD_BY_PREFORK))
    ],
}
GROUPS = {"status": ("status-ends", "status-sockets", "status-cost")}


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__)
    parser.add_argument("benchmark", choices=[*BENCHMARKS, *GROUPS])
    parser.add_argument("--quick", action="store_true", help="a twentieth of the work, one run")
    parser.add_argument("--rows", help="only those whose name holds one of these, comma-separated")
    parser.add_argument("--runs", type=int, help="default 3")
    parser.add_argument("--json", type=Path, help="write the results here, and no table")
    parser.add_argument("--redis", help="a server to use; ITS DATABASE IS EMPTIED")
    return parser.parse_args(arguments)


def chosen(part: Part, wanted: str | None) -> list[Row]:
    if wanted is None:
        return part.rows
    words = [word.strip().lower() for word in wanted.split(",")]
    return [row for row in part.rows if any(word in row.name.lower() for word in words)]


def run(
    part: Part, picked: list[Row], given: argparse.Namespace, url: str, folder: Path
) -> report.Table:
    count = part.count // 20 if given.quick else part.count
    table = report.Table(part.name, part.columns, picked, against=part.against)
    for number in range(given.runs or (1 if given.quick else 3)):
        for row in picked:
            if row.name in table.errors:
                continue
            try:
                figures = part.measure(row, url, folder, count=count)
            except RowError as error:
                table.errors[row.name] = str(error)
                print(
                    f"{part.name} {number + 1} {row.name}: FAILED {str(error)[-500:]}", flush=True
                )
                continue
            table.samples[row.name].append(figures)
            shown = ", ".join(
                f"{name} {figures[name]:.4g}" for name in part.columns if name in figures
            )
            print(f"{part.name} {number + 1} {row.name}: {shown}", flush=True)
    return table


def main() -> None:
    # SIGTERM ends what was started, as Ctrl-C does: the workers are in sessions of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: terminated"))
    given = options(sys.argv[1:])
    names = GROUPS.get(given.benchmark, (given.benchmark,))
    picked = {
        name: [(part, chosen(part, given.rows)) for part in BENCHMARKS[name]] for name in names
    }
    picked = {name: parts for name, parts in picked.items() if any(found for _, found in parts)}
    if not picked:
        known = ", ".join(
            row.name for name in names for part in BENCHMARKS[name] for row in part.rows
        )
        sys.exit(f"bench: no row is named {given.rows!r}; there are: {known}")
    if given.json and len(picked) > 1:
        sys.exit(f"bench: --json takes one of {', '.join(picked)}")
    for row in (row for parts in picked.values() for _, found in parts for row in found):
        if not bin_of(row.framework.environment).exists():
            sys.exit(f"bench: {row.name} needs an environment that ./run bench makes")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # thousands of sockets are open
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="celeriac-bench-")))
        url = given.redis or stack.enter_context(server(folder))
        failed = [
            name for name, parts in picked.items() if not bench(name, parts, given, url, folder)
        ]
    if failed:
        sys.exit(1)


def bench(
    name: str,
    parts: list[tuple[Part, list[Row]]],
    given: argparse.Namespace,
    url: str,
    folder: Path,
) -> bool:
    """All tables of one benchmark; whether none of their rows failed."""
    machine = report.machine(url)
    tables = [run(part, found, given, url, folder) for part, found in parts if found]
    whole = not (given.quick or given.rows or given.json)
    target = given.json or (report.RESULTS / f"{name}.json" if whole else None)
    text = report.tables(machine, tables)
    if target is not None:
        report.write_json(target, name, machine, tables)
    if whole:
        report.write_docs(name, text)
    print(f"\n{text}", flush=True)
    return not any(table.errors for table in tables)


if __name__ == "__main__":
    main()
