"""The benchmarks run end to end without the peers' environments; no figure is judged here."""

import json
from pathlib import Path

import psutil
import pytest

from benchmarks import rows
from benchmarks.__main__ import Part, options, run
from benchmarks.measure import Figures
from benchmarks.process import child
from benchmarks.rows import Row
from support import ROOT, run_python

MACHINE = {"cpu", "cores", "system", "python", "server", "load", "date"}
WORKED = {"tasks", "seconds", "tasks_per_second", "cpu_us", "server_us", "peak_mb"}
CALLED = {"messages_per_second", "call_p50_ms", "call_p99_ms", "loop_lag_p99_ms", "cpu_us"}
TOLD = {"told_p50_ms", "told_p99_ms", "cpu_us"}


@pytest.mark.parametrize(
    ("benchmark", "chosen", "figures"),
    [
        ("worker", "Celery solo,celeriac prefork", WORKED),
        ("io", "threads -c 100", WORKED),
        ("publish", "delay()", CALLED),
        ("status-ends", "asked,celeriac prefork", TOLD),
    ],
)
def test_a_quick_run_gives_every_figure_of_every_chosen_row(
    benchmark: str, chosen: str, figures: set[str], tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    command = ("-m", "benchmarks", benchmark, "--quick", "--rows", chosen, "--json", file)
    ran = run_python(*command, cwd=ROOT, timeout=100)
    assert ran.returncode == 0, ran.stdout + ran.stderr

    result = json.loads(file.read_text())
    assert result["benchmark"] == benchmark
    assert result["machine"].keys() == MACHINE
    table = result["tables"][0]
    names = [row["name"] for row in table["rows"]]
    assert len(names) == 2, "one of ours, one of plain Celery"
    for row in table["rows"]:
        assert row["error"] is None
        assert row["median"].keys() == figures
        assert len(row["samples"]) == 1
        assert all(figure >= 0 for figure in row["median"].values())
        assert row["to_celery"].keys() <= figures
        assert f"| {row['name']} | " in ran.stdout


def test_sockets_that_follow_tasks_are_told_and_their_cost_is_given(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = ("-m", "benchmarks", "status-sockets", "--quick", "--rows", "compressed")
    ran = run_python(*command, "--json", file, cwd=ROOT, timeout=100)
    assert ran.returncode == 0, ran.stdout + ran.stderr

    [table] = json.loads(file.read_text())["tables"]
    [row] = table["rows"]
    assert row["error"] is None
    assert row["median"]["redis_subscribed"] == 1
    assert 0 < row["median"]["work_seconds"] <= row["median"]["all_seconds"]
    assert row["median"]["socket_kb"] > 0


def test_a_row_that_fails_is_reported_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hangs, works = rows.WORKER[:2]
    before = psutil.Process().children()

    def measure(row: Row, url: str, folder: Path, count: int) -> Figures:
        if row is works:
            return {"seconds": 1.0, "cpu_us": 1.0}
        hanging = "import time; print('its last words', flush=True); time.sleep(60)"
        with child(f'python -c "{hanging}"', "main", folder / "log") as worker:
            worker.wait_for(lambda: "words" in worker.tail(), 20, "words")
            worker.wait_for(lambda: False, 0.1, "first task")
        return {}

    part = Part("noop", [hangs, works], 10, measure, ("seconds", "cpu_us"))
    table = run(part, part.rows, options(["worker", "--runs", "2"]), "", tmp_path)

    assert table.errors == {hangs.name: "no first task in 0.1 s: its last words"}
    assert len(table.samples[works.name]) == 2
    assert f"{hangs.name}: FAILED" in capsys.readouterr().out
    assert psutil.Process().children() == before


def test_no_row_by_that_name_is_an_error_that_names_those_that_there_are() -> None:
    refused = run_python("-m", "benchmarks", "worker", "--rows", "no such row", cwd=ROOT)
    assert refused.returncode == 1
    assert "celeriac pool" in refused.stderr
