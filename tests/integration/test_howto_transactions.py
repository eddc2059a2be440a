"""The examples of docs/howto/transactions.md."""

import re
from pathlib import Path

import httpx

from celeriac.embedded import Valkey
from support import ROOT, clean_environment, empty_redis, free_port, python

FOLDER = ROOT / "docs" / "howto" / "transactions"


def test_the_page_shows_what_is_in_the_file() -> None:
    code = (FOLDER / "main.py").read_text()
    shown = re.findall(
        r"^```python\n(.*?)^```$", FOLDER.with_suffix(".md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(shown) == 2
    for example in shown:
        assert example in code


def test_an_order_is_shipped(valkey: Valkey, tmp_path: Path) -> None:
    empty_redis(valkey.celery_url)
    port = free_port()
    env = clean_environment(
        REDIS_URL=valkey.celery_url,
        DATABASE_URL=f"sqlite:///{tmp_path / 'orders.sqlite3'}",
    )
    worker = "-m", "celery", "-A", "main.celery", "worker", "-l", "info", "-P", "solo"
    with (
        python("-m", "uvicorn", "main:app", "--port", str(port), cwd=FOLDER, env=env) as web,
        python(*worker, cwd=FOLDER, env=env) as working,
    ):
        web.wait_for("Application startup complete")
        working.wait_for(r" ready\.$")
        answer = httpx.post(f"http://127.0.0.1:{port}/orders", params={"article": "a book"})
        task_id = answer.json()["task_id"]
        working.wait_for(rf"{task_id}\] succeeded .*'a book is on its way'")
