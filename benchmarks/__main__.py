"""./run bench: every row of a benchmark, interleaved, on one server; medians of the runs."""

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import report, rows
from benchmarks.measure import Figures, answered, published, worked_off
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


CALLS = ("messages_per_second", "call_p50_ms", "call_p99_ms", "loop_lag_p99_ms", "cpu_us")
RATE = ("tasks_per_second", "cpu_us", "peak_mb")
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
}


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
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
    table = report.Table(part.name, part.columns, picked)
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
            shown = ", ".join(f"{name} {figures[name]:.4g}" for name in part.columns)
            print(f"{part.name} {number + 1} {row.name}: {shown}", flush=True)
    return table


def main() -> None:
    # SIGTERM ends what was started, as Ctrl-C does: the workers are in sessions of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: terminated"))
    given = options(sys.argv[1:])
    parts = BENCHMARKS[given.benchmark]
    picked = [(part, chosen(part, given.rows)) for part in parts]
    if not any(found for _, found in picked):
        names = ", ".join(row.name for part in parts for row in part.rows)
        sys.exit(f"bench: no row is named {given.rows!r}; there are: {names}")
    for _, found in picked:
        for row in found:
            if not bin_of(row.framework.environment).exists():
                sys.exit(f"bench: {row.name} needs an environment that ./run bench makes")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="celeriac-bench-")))
        url = given.redis or stack.enter_context(server(folder))
        machine = report.machine(url)
        tables = [run(part, found, given, url, folder) for part, found in picked if found]
    whole = not (given.quick or given.rows or given.json)
    target = given.json or (report.RESULTS / f"{given.benchmark}.json" if whole else None)
    text = report.tables(machine, tables)
    if target is not None:
        report.write_json(target, given.benchmark, machine, tables)
    if whole:
        report.write_docs(given.benchmark, text)
    print(f"\n{text}")
    if any(table.errors for table in tables):
        sys.exit(1)


if __name__ == "__main__":
    main()
