"""The one-file start of the tutorial, with Celery's and uvicorn's own commands."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support import FIRST_STEPS, ROOT, Process, clean_environment, eventually, free_port, python

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"


@pytest.fixture
def env(redis_server: str) -> dict[str, str]:
    return clean_environment(CELERY_BROKER_URL=redis_server, CELERY_RESULT_BACKEND=redis_server)


@pytest.fixture
def worker(env: dict[str, str]) -> Iterator[Process]:
    command = ("-m", "celery", "-A", "main.celery", "worker", "--loglevel=info")
    with python(*command, cwd=FIRST_STEPS, env=env) as worker:
        worker.wait_for(r"ready\.$")
        yield worker


def test_p10_p18_the_web_side_starts_and_holds_the_live_celery_app(env: dict[str, str]) -> None:
    port = free_port()
    command = ("-m", "uvicorn", "main:app", "--reload", "--port", str(port))
    with python(*command, cwd=FIRST_STEPS, env=env) as web:
        web.wait_for("Application startup complete")
        base = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{base}/").json() == {"message": "Hello World"}
        assert httpx.get(f"{base}/health-check").json() == {"status": "ok"}
    code = (
        "import main\n"
        "assert main.app.celery is main.celery and main.app.celery_app is main.celery\n"
        "print('broker', main.celery.connection().as_uri())\n"
    )
    with python("-c", code, cwd=FIRST_STEPS, env=env) as shell:
        shell.wait_for(r"broker redis")


def test_p11_a_plain_file_of_somebodys_needs_one_call_more(
    env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "main.py").write_text(
        "import os\n"
        "from celery import Celery\n"
        "import celeriac\n"
        "broker = os.environ['CELERY_BROKER_URL']\n"
        "celery = Celery('worker', broker=broker, backend=broker)\n"
        "celeriac.adopt(celery)\n"
        "@celery.task\n"
        "def divide(x, y):\n"
        "    return x / y\n"
    )
    command = ("-m", "celery", "-A", "main.celery", "worker", "--loglevel=info")
    with python(*command, cwd=tmp_path, env=env) as worker:
        worker.wait_for(r"\.> concurrency: \d+ \(prefork\)")
        worker.wait_for(r"ready\.$")
        code = "from main import divide; print('end', divide.delay(1, 2).get(timeout=10))"
        with python("-c", code, cwd=tmp_path, env=env) as shell:
            shell.wait_for(r"end 0\.5")


def test_p11_p17_a_worker_runs_the_tasks_and_another_process_reads_their_end(
    worker: Process, env: dict[str, str]
) -> None:
    for line in (r"\.> app: +worker:", r"\.> transport: +redis", r"\.> results: ", r"concurrency:"):
        worker.wait_for(line)
    worker.wait_for(r"concurrency: 100 \(pool\)")
    worker.wait_for(r"\.> celery +exchange=celery\(direct\) key=celery")
    worker.wait_for(r"^\[tasks\]\n  \. main\.divide")
    code = (
        "from main import divide\n"
        "print('type', type(divide))\n"
        "t = divide.apply_async((1, 2), countdown=1)\n"
        "print('handle', type(t), t.id, t.state, t.result)\n"
        "print('end', t.get(timeout=10), t.state, t.result)\n"
        "f = divide.delay(1, 0)\n"
        "print('failed', f.id, repr(f.get(timeout=10, propagate=False)), f.state)\n"
    )
    with python("-c", code, cwd=FIRST_STEPS, env=env) as shell:
        shell.wait_for(rf"handle <class 'celery\.result\.AsyncResult'> {UUID} PENDING None")
        shell.wait_for(r"end 0\.5 SUCCESS 0\.5")
        failed = shell.wait_for(
            rf"failed ({UUID}) ZeroDivisionError\('division by zero'\) FAILURE"
        ).group(1)
    code = (
        "from celery.result import AsyncResult\n"
        "import main\n"
        f"r = AsyncResult({failed!r})\n"
        "print(r.state, repr(r.result))\n"
    )
    with python("-c", code, cwd=FIRST_STEPS, env=env) as shell:
        shell.wait_for(r"FAILURE ZeroDivisionError\('division by zero'\)")


def test_p16_flower_lists_what_was_sent(env: dict[str, str]) -> None:
    port = free_port()
    flower_env = env | {"FLOWER_UNAUTHENTICATED_API": "true"}
    flower = ("-m", "celery", "-A", "main.celery", "flower", f"--port={port}")
    command = ("-m", "celery", "-A", "main.celery", "worker", "--loglevel=info")
    with python(*flower, cwd=FIRST_STEPS, env=flower_env) as shown:
        shown.wait_for("Connected to redis")
        with python(*command, cwd=FIRST_STEPS, env=env) as worker:
            worker.wait_for(r"ready\.$")
            # Flower switches the worker's events on; it asks again and again.
            worker.wait_for(r"[Ee]vents of group .task. enabled", timeout=30)
            code = (
                "from main import divide\n"
                "good, bad = divide.delay(1, 2), divide.delay(1, 0)\n"
                "good.get(timeout=10); bad.get(timeout=10, propagate=False)\n"
                "print('sent', good.id, bad.id)\n"
            )
            with python("-c", code, cwd=FIRST_STEPS, env=env) as shell:
                good, bad = shell.wait_for(rf"sent ({UUID}) ({UUID})").groups()

            def listed() -> bool:
                tasks = httpx.get(f"http://127.0.0.1:{port}/api/tasks").json()
                return [tasks.get(one, {}).get("state") for one in (good, bad)] == [
                    "SUCCESS",
                    "FAILURE",
                ]

            eventually(listed, what="both tasks in Flower")


def test_settings_come_from_an_env_file_too(redis_server: str, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text((FIRST_STEPS / "main.py").read_text())
    (tmp_path / ".env").write_text(f"REDIS_URL={redis_server}\n")
    code = "import main; print('broker', main.celery.conf.broker_url)"
    with python("-c", code, cwd=tmp_path, env=clean_environment()) as shell:
        shell.wait_for(rf"broker {re.escape(redis_server)}")


def test_the_tutorial_shows_the_very_file_that_is_tested() -> None:
    code = (FIRST_STEPS / "main.py").read_text()
    for page in (ROOT / "README.md", ROOT / "docs" / "tutorial" / "first-steps.md"):
        assert code in page.read_text(), f"{page.name} does not show {FIRST_STEPS / 'main.py'}"
