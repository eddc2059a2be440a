"""What a type checker says about tasks."""

import re
from pathlib import Path

from support import ROOT, run_python

USES = Path(__file__).parent / "uses.py"


def test_a_wrong_argument_is_an_error_and_a_right_one_is_none(tmp_path: Path) -> None:
    command = ("-m", "mypy", "--cache-dir", tmp_path, "--config-file", ROOT / "pyproject.toml")
    done = run_python(*command, USES, cwd=ROOT, timeout=110)
    refused = {int(line) for line in re.findall(r"uses\.py:(\d+): error", done.stdout)}
    lines = USES.read_text().splitlines()
    assert refused == {n for n, line in enumerate(lines, 1) if line.endswith("# E")}, done.stdout
