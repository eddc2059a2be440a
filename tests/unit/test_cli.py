from pathlib import Path

import pytest

from celeriac import ConfigurationError
from celeriac.cli.apps import load


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("named_project.py").write_text(
        "from celery import Celery\nwork = Celery('found', broker='memory://')\nnumber = 1\n"
    )


@pytest.mark.parametrize("path", ["named_project", "named_project.work", "named_project:work"])
def test_an_app_is_found_as_celerys_own_commands_find_it(path: str) -> None:
    assert load(path).main == "found"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nowhere_at_all.celery", "no Celery app nowhere_at_all.celery: No module named"),
        ("named_project:celery", "no Celery app named_project:celery: No module named"),
        ("named_project.number", "named_project.number is no Celery app but a int: name the app"),
    ],
)
def test_what_is_no_app_is_refused_with_its_name(path: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load(path)
    assert str(raised.value).startswith(told)
    assert "-A" in str(raised.value)
