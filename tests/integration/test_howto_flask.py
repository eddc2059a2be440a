"""The examples of docs/howto/flask.md and docs/tutorial/flask-in-ten-minutes.md."""

import re
from pathlib import Path

import pytest

from celeriac.embedded import Valkey
from support import ROOT, clean_environment, empty_redis, python, run_python

TUTORIAL = ROOT / "docs" / "tutorial" / "flask_in_ten_minutes"
PAGES = {
    ROOT / "docs" / "howto" / "flask.md": ROOT / "examples" / "flask",
    TUTORIAL.parent / "flask-in-ten-minutes.md": TUTORIAL,
}

ASK = """
from app import User, create_app, db
app = create_app()
with app.app_context():
    db.create_all()
ada, bob = app.test_client(), app.test_client()
ada.post("/log-in/ada"), bob.post("/log-in/bob")
task_id = ada.post("/users/ada@example.com").json["task_id"]
print(ada.get(f"/tasks/{task_id}", query_string={"wait": 20}).json["state"])
while (found := ada.get(f"/tasks/{task_id}").json)["state"] != "SUCCESS":
    seen = ada.get(f"/tasks/{task_id}").headers["ETag"]
    ada.get(f"/tasks/{task_id}", query_string={"wait": 20}, headers={"If-None-Match": seen})
print(found["result"])
print(bob.get(f"/tasks/{task_id}").status_code)
"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_show_what_is_in_the_files(page: Path) -> None:
    code = [file.read_text() for file in PAGES[page].rglob("*.py")]
    shown = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(shown) >= 4
    for example in shown:
        assert any(example in each for each in code), example


def test_the_application_of_the_tutorial_runs(valkey: Valkey, tmp_path: Path) -> None:
    empty_redis(valkey.celery_url)
    database = f"sqlite:///{tmp_path / 'app.sqlite3'}"
    env = clean_environment(REDIS_URL=valkey.celery_url, DATABASE_URL=database)
    command = "-m", "celery", "-A", "make_celery", "worker", "-l", "info", "-P", "solo"
    with python(*command, cwd=TUTORIAL, env=env) as worker:
        worker.wait_for(r"ready\.$")
        asked = run_python("-c", ASK, cwd=TUTORIAL, env=env, timeout=60)
    assert asked.stdout.splitlines()[1:] == ["a mail to ada@example.com", "404"], asked.stderr
