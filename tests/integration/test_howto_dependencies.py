"""The example of docs/howto/dependencies.md."""

import re
from pathlib import Path

from support import ROOT, clean_environment, run_python

FOLDER = ROOT / "docs" / "howto" / "dependencies"
RUN = """
import main
from fastapi.testclient import TestClient

main.celery.conf.update(task_always_eager=True, result_backend="cache+memory://")
main.Base.metadata.create_all(main.database.engine)
order_id = TestClient(main.app).post("/orders").json()
with main.database.session() as session:
    print("paid", session.get_one(main.Order, order_id).paid)


class Fake:
    def get_one(self, kind, order_id):
        print("asked for", kind.__name__, order_id)
        return self


from celeriac.inject import overrides

overrides(main.celery)[main.get_session] = Fake
main.pay(7)
"""


def test_the_page_shows_what_is_in_the_file() -> None:
    page = FOLDER.with_suffix(".md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert shown[0] in (FOLDER / "main.py").read_text()


def test_a_view_and_a_task_have_a_session_each_and_a_test_has_its_own(tmp_path: Path) -> None:
    env = clean_environment(DATABASE_URL=f"sqlite:///{tmp_path / 'app.db'}", REDIS_URL="memory://")
    done = run_python("-c", RUN, cwd=FOLDER, env=env)
    assert done.stdout.splitlines() == ["paid True", "asked for Order 7"], done.stderr
