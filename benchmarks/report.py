"""Results: medians, the machine, JSON, and the tables of docs/benchmarks.md."""

import datetime
import json
import os
import platform
import re
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

from redis import Redis

from benchmarks.process import ROOT, bin_of
from benchmarks.rows import Framework, Row

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "benchmarks.md"
TITLES = {
    "tasks_per_second": "tasks/s",
    "messages_per_second": "messages/s",
    "seconds": "s",
    "cpu_us": "CPU µs each",
    "peak_mb": "peak MB",
    "call_p50_ms": "call p50 ms",
    "call_p99_ms": "call p99 ms",
    "loop_lag_p99_ms": "loop lag p99 ms",
    "round_trip_p50_ms": "p50 ms",
    "round_trip_p99_ms": "p99 ms",
    "told_p50_ms": "p50 ms",
    "told_p99_ms": "p99 ms",
    "socket_kb": "KB each",
    "redis_connections": "Redis connections",
    "redis_subscribed": "subscribed",
    "all_seconds": "all told, s",
    "work_seconds": "all ended, s",
    "server_us": "server's µs each",
}
OURS = "ours"  # the app of our rows
BASELINE = "stock"
_BETTER = {
    "tasks_per_second": 1,
    "messages_per_second": 1,
    "seconds": -1,
    "cpu_us": -1,
    "round_trip_p50_ms": -1,
    "told_p50_ms": -1,
    "socket_kb": -1,
}


@dataclass
class Table:
    name: str
    columns: tuple[str, ...]
    rows: list[Row]
    samples: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))
    errors: dict[str, str] = field(default_factory=dict)
    against: str = ""  # the row that all are compared with, where that is none of plain Celery's

    def medians(self, row: Row) -> dict[str, float]:
        samples = self.samples.get(row.name)
        if not samples or row.name in self.errors:
            return {}
        return {name: median(sample[name] for sample in samples) for name in samples[0]}

    def ratios(self, row: Row, other: Row) -> dict[str, float]:
        """How many times better `row` is than `other`, in the first column and in CPU."""
        mine, theirs = self.medians(row), self.medians(other)
        if not mine or not theirs:
            return {}
        names = [
            name for name in (self.columns[0], "cpu_us") if name in mine.keys() & theirs.keys()
        ]
        return {name: (mine[name] / theirs[name]) ** _BETTER[name] for name in names}

    @property
    def rivals(self) -> dict[str, Row]:
        """Those that every row is compared with, by what they are called."""
        if self.against:
            named = next((row for row in self.rows if row.name == self.against), None)
            found = {self.against: named}
        else:
            celery = (row for row in self.rows if row.framework.app == BASELINE)
            found = {"Celery": next(celery, None), "best peer": self.best_peer}
        return {name: row for name, row in found.items() if row is not None}

    @property
    def best_peer(self) -> Row | None:
        column = self.columns[0]
        peers = [row for row in self.rows if row.framework.app not in (OURS, BASELINE)]
        found = [
            (self.medians(row)[column] ** _BETTER[column], row)
            for row in peers
            if self.medians(row)
        ]
        return max(found, key=lambda pair: pair[0])[1] if found else None


def machine(url: str) -> dict[str, Any]:
    try:
        information = Path("/proc/cpuinfo").read_text()
    except OSError:
        information = ""
    model = re.search(r"^model name\s*: (.+)$", information, re.MULTILINE)
    with Redis.from_url(url) as client:
        info: Any = client.info("server")
    kind = "Valkey" if "valkey_version" in info else "Redis"
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "server": f"{kind} {info.get('valkey_version') or info['redis_version']}",
        "load": round(os.getloadavg()[0], 2),  # before the first row
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def versions(framework: Framework) -> dict[str, str]:
    folder = bin_of(framework.environment).parent
    packages = [str(path) for path in folder.glob("lib*/python*/site-packages")]
    found = {found.name: found.version for found in distributions(path=packages)}
    return {name: found[name] for name in framework.packages if name in found}


def write_json(path: Path, name: str, machine: dict[str, Any], tables: list[Table]) -> None:
    result = {
        "benchmark": name,
        "machine": machine,
        "tables": [
            {
                "name": table.name,
                "rows": [
                    {
                        "name": row.name,
                        "note": row.note,
                        "command": row.command,
                        "versions": versions(row.framework),
                        "median": table.medians(row),
                        "samples": table.samples.get(row.name, []),
                        **{
                            f"to_{name.lower().replace(' ', '_')}": table.ratios(row, rival)
                            for name, rival in table.rivals.items()
                        },
                        "error": table.errors.get(row.name),
                    }
                    for row in table.rows
                ],
            }
            for table in tables
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


_CALLED = {"best peer": "the best peer"}


def _table(table: Table) -> str:
    titles = (f"to {_CALLED.get(name, name)}" for name in table.rivals)
    head = ["", *(TITLES[column] for column in table.columns), *titles, "how"]
    lines = [head, ["---", *["---:"] * (len(head) - 2), "---"]]
    for row in table.rows:
        medians = table.medians(row)
        figures = [_number(medians.get(column)) for column in table.columns]
        for rival in table.rivals.values():
            ratios = table.ratios(row, rival).values()
            figures.append(" / ".join(f"{_number(ratio)}x" for ratio in ratios))
        note = "failed" if row.name in table.errors else row.note
        if row.share != 1:
            note = "; ".join(filter(None, (note, f"{medians.get('tasks', 0):.0f} tasks")))
        lines.append([row.name, *figures, note])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tables(machine: dict[str, Any], found: list[Table]) -> str:
    apps = {row.framework.app: row.framework for table in found for row in table.rows}
    used = [" ".join(f"{n} {v}" for n, v in versions(each).items()) for each in apps.values()]
    line = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, "
        f"Python {machine['python']}, {machine['server']}, {machine['date']}."
    )
    return "\n\n".join([*map(_table, found), line, f"{'; '.join(used)}."])


def write_docs(name: str, text: str) -> None:
    """Put `text` between the markers of this benchmark."""
    start, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
    before, _, rest = DOCS.read_text().partition(start)
    _, _, after = rest.partition(end)
    DOCS.write_text(f"{before}{start}\n{text}\n{end}{after}")
