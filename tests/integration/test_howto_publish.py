"""The examples of docs/howto/publish.md, and what it says of tasks that are not ours."""

import asyncio
import os
import re
import signal
from pathlib import Path

import celery
from celery import Celery
from redis import Redis

from celeriac import adelay, publish_many
from celeriac.embedded import Valkey
from publishing import make_app, took_task_ids
from support import ROOT, clean_environment, empty_redis, python

FOLDER = ROOT / "docs" / "howto" / "publish"


def test_the_page_shows_what_is_in_the_file() -> None:
    code = (FOLDER / "main.py").read_text()
    shown = re.findall(
        r"^```python\n(.*?)^```$", FOLDER.with_suffix(".md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(shown) == 3
    for example in shown:
        assert example in code


def queued(server: Valkey) -> list[str]:
    app = make_app(server.celery_url)
    app.conf.task_default_queue = "celery"
    return took_task_ids(app)


def test_many_are_sent_in_one_call(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    code = "import asyncio, main; print(len(asyncio.run(main.report_to_all(range(20)))))"
    with python("-c", code, cwd=FOLDER, env=clean_environment(REDIS_URL=valkey.celery_url)) as run:
        run.wait_for("^20$")
        assert run.wait() == 0
    assert len(set(queued(valkey))) == 20


def test_a_second_try_with_the_same_id_is_no_second_task(tmp_path: Path) -> None:
    code = "import asyncio, main; asyncio.run(main.charge_once(7, 'charge-7'))"
    with Valkey(tmp_path) as server:
        with Redis.from_url(server.redis_url) as client:
            pid = int(client.info("server")["process_id"])
        os.kill(pid, signal.SIGSTOP)
        env = clean_environment(REDIS_URL=server.celery_url)
        with python("-c", code, cwd=FOLDER, env=env) as run:
            try:
                run.wait_for("task charge-7 was not sent: ")
            finally:
                os.kill(pid, signal.SIGCONT)
            assert run.wait() == 0
        assert set(queued(server)) == {"charge-7"}


def test_a_task_whose_base_class_is_not_ours_is_sent_too(redis_app: Celery) -> None:
    class Foreign(celery.Task):  # type: ignore[misc]
        """Somebody's, made before the app was adopted."""

    @redis_app.task(base=Foreign, shared=False)
    def foreign(x: int) -> int:
        return x

    async def publish() -> list[str]:
        assert not hasattr(foreign, "adelay")
        sent = [await adelay(foreign, 1), *await publish_many([foreign.s(2)])]
        return [result.id for result in sent]

    assert asyncio.run(publish()) == took_task_ids(redis_app)
