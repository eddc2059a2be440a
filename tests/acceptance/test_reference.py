"""The contract of the reference system, row by row, against real processes."""

import json
import re
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from socket import SHUT_RDWR

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from support import REFERENCE, eventually, python
from system import System
from workers import APPS

USER = {"email": "ada@example.com", "username": "ada"}
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"


def frames(system: System, task_id: str) -> list[dict[str, object]]:
    with system.watch(task_id) as socket:
        return [json.loads(frame) for frame in socket]


def submit(system: System) -> str:
    answer = system.http.post("/users/form/", json=USER)
    assert answer.status_code == 200
    task_id: str = answer.json()["task_id"]
    assert re.fullmatch(UUID, task_id)
    return task_id


def states(system: System, task_id: str) -> list[object]:
    return [frame["state"] for frame in frames(system, task_id)]


def test_p10_a_client_gets_hello_world_and_a_browser_the_index(system: System) -> None:
    assert system.http.get("/").json() == {"message": "Hello World"}
    page = system.http.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["vary"] == "Accept"
    assert system.http.head("/").status_code == 200
    assert system.http.get("/health-check").json() == {"status": "ok"}


def test_the_pages_of_the_api_need_no_other_server(system: System) -> None:
    page = system.http.get("/docs").text
    assert "swagger-ui" in page
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert addresses
    for address in addresses:
        assert address.startswith("/"), address
        assert system.http.get(address).status_code == 200


def test_p40_p41_a_form_is_a_task_that_can_be_polled_to_its_end(system: System) -> None:
    task_id = submit(system)

    def end() -> dict[str, str] | None:
        found: dict[str, str] = system.http.get(
            "/users/task_status/", params={"task_id": task_id}
        ).json()
        return found if found["state"] == "SUCCESS" else None

    assert eventually(end) == {"state": "SUCCESS"}
    calls = system.third_party.get("/calls").json()
    assert [(call["email"], call["status"]) for call in calls] == [(USER["email"], 201)]


def test_p41_a_failure_says_why_and_a_waiting_task_is_pending(system: System) -> None:
    system.behave(fail_next=1)
    task_id = submit(system)
    assert frames(system, task_id)[-1]["state"] == "FAILURE"
    answer = system.http.get("/users/task_status/", params={"task_id": task_id}).json()
    assert answer["state"] == "FAILURE"
    assert "the mailing list answered 503" in answer["error"]
    waiting = system.send("project.users.tasks.divide", 1, 2, countdown=3600)
    answer = system.http.get("/users/task_status/", params={"task_id": waiting})
    assert answer.json() == {"state": "PENDING"}


def test_p44_p46_p47_the_socket_shows_the_present_then_every_change_to_the_end(
    system: System,
) -> None:
    system.behave(delay=1)
    task_id = submit(system)
    with system.watch(task_id) as one:
        seen = [json.loads(one.recv(timeout=5))]
        with ExitStack() as stack:
            others = [stack.enter_context(system.watch(task_id)) for _ in range(20)]
            seen += [json.loads(frame) for frame in one]
            assert one.protocol.close_code == 1000
            lasts = [[json.loads(frame) for frame in other][-1] for other in others]
            assert lasts == [seen[-1]] * 20
    order = ["PENDING", "STARTED", "SUCCESS"]
    assert [frame["state"] for frame in seen] == order[order.index(seen[0]["state"]) :]
    assert all(frame["task_id"] == task_id for frame in seen)
    began = time.monotonic()
    assert frames(system, task_id) == [seen[-1]]
    assert time.monotonic() - began < 2  # measured 0.005 s; the machine of a test may be busy


def test_p50_tasks_that_ignore_their_result_are_reported_too(system: System) -> None:
    task_id = system.send("project.users.tasks.count_users")
    assert states(system, task_id)[-1] == "SUCCESS"


def test_a_revoked_task_ends_as_revoked(system: System) -> None:
    system.behave(delay=30)
    task_id = submit(system)
    with system.watch(task_id) as socket:
        while json.loads(socket.recv(timeout=10))["state"] != "STARTED":
            pass
        system.producer.control.terminate(task_id)
        last = [json.loads(frame) for frame in socket][-1]
    assert last["state"] == "REVOKED"
    assert last["error"]


def test_p01_p05_the_post_is_quick_while_tasks_are_slow_and_two_workers_share(
    system: System,
) -> None:
    system.behave(delay=3)
    with system.celery("worker", "--loglevel=info", "-n", "second@%h", "-c", "2") as second:
        second.wait_for(r"second@\S+ ready\.")
        submit(system)  # the first one opens the connections
        took = []
        ids = []
        for _ in range(3):
            began = time.perf_counter()
            ids.append(submit(system))
            took.append(time.perf_counter() - began)
        assert min(took) < 0.1
        assert system.http.get("/health-check").elapsed.total_seconds() < 0.5
        # Each takes what the other leaves; which one is quicker is a matter of luck.
        received = rf"Task project\.users\.tasks\.subscribe_to_list\[{UUID}\] received"
        while not re.search(received, second.output) and len(ids) < 30:
            ids.append(submit(system))
        second.wait_for(received)
        for task_id in ids:
            assert states(system, task_id)[-1] == "SUCCESS"
        second.stop()


def test_p43_the_webhook_blocks_or_is_a_task_that_tries_again_after_5_s(system: System) -> None:
    system.behave(delay=0.5)
    blocking = system.http.post("/users/webhook_test/")
    assert blocking.json() == "pong"
    assert blocking.elapsed.total_seconds() >= 0.5
    system.behave(fail_next=1)
    assert system.http.post("/users/webhook_test/").status_code == 502
    system.behave(fail_next=1, status=404)
    assert system.http.post("/users/webhook_test/").json() == {
        "detail": "the mailing list answered 404"
    }
    system.behave(fail_next=1)
    quick = system.http.post("/users/webhook_test_async/")
    assert quick.json() == "pong"
    assert quick.elapsed.total_seconds() < 0.5
    calls = eventually(
        lambda: found if len(found := system.third_party.get("/calls").json()) == 2 else None
    )
    assert [call["status"] for call in calls] == [503, 201]
    assert 4.9 < calls[1]["at"] - calls[0]["at"] < 9


@pytest.mark.parametrize(
    "name",
    [
        "project.users.tasks.subscribe_with_backoff",
        "high_priority:subscribe_now",
    ],
)
def test_e05_declared_retries_run_until_the_third_party_recovers(system: System, name: str) -> None:
    system.behave(fail_next=2)
    task_id = system.send(name, "a@example.com")
    seen = states(system, task_id)
    assert seen[-1] == "SUCCESS"
    assert [c["status"] for c in system.third_party.get("/calls").json()] == [503, 503, 201]


def test_e05_a_decorated_task_waits_for_its_next_try_in_sight(system: System) -> None:
    system.behave(fail_next=1)
    task_id = system.send("low_priority:subscribe_someday", "a@example.com")
    with system.watch(task_id) as socket:
        while (frame := json.loads(socket.recv(timeout=10)))["state"] != "RETRY":
            pass
    assert "the mailing list answered 503" in frame["error"]
    system.producer.control.terminate(task_id)


def test_e05_a_programming_error_and_a_final_answer_are_never_tried_again(system: System) -> None:
    system.behave(fail_next=1, status=404)
    task_id = system.send("project.users.tasks.subscribe_with_backoff", "a@example.com")
    assert states(system, task_id)[-1] == "FAILURE"
    assert len(system.third_party.get("/calls").json()) == 1
    wrong = system.send("high_priority:subscribe_now", "a@example.com", "too", "many")
    last = frames(system, wrong)[-1]
    assert last["state"] == "FAILURE"
    assert str(last["error"]).startswith("TypeError")


def test_p13_p15_p29_a_shell_sends_a_shared_task_and_reads_its_result(system: System) -> None:
    code = (
        "from project.users.tasks import divide\n"
        "good, bad = divide.delay(1, 2), divide.delay(1, 0)\n"
        "print('type', type(good), good.id)\n"
        "print('result', good.get(timeout=10), good.state)\n"
        "print('error', repr(bad.get(timeout=10, propagate=False)), bad.state)\n"
    )
    with system.shell("-c", code) as shell:
        task_id = shell.wait_for(r"type <class 'celery\.result\.AsyncResult'> (\S+)").group(1)
        shell.wait_for(r"result 0\.5 SUCCESS")
        shell.wait_for(r"error ZeroDivisionError\('division by zero'\) FAILURE")
        assert shell.wait() == 0
    system.runner.wait_for(rf"Task project\.users\.tasks\.divide\[{task_id}\] received")
    system.runner.wait_for(
        rf"Task project\.users\.tasks\.divide\[{task_id}\] succeeded in [\d.]+s: 0\.5"
    )


def test_p29_p31_the_worker_lists_the_tasks_and_the_queues(system: System) -> None:
    for name in ("project.users.tasks.divide", "high_priority:subscribe_now"):
        system.runner.wait_for(rf"\. {re.escape(name)}$")
    for queue in ("default", "high_priority", "low_priority"):
        exchange = r"celeriac\(topic\)" if system.on_rabbitmq else rf"{queue}\(direct\)"
        system.runner.wait_for(rf"\.> {queue} +exchange={exchange} key={queue}")


def test_p16_flower_lists_every_task_failed_ones_included(system: System) -> None:
    good = submit(system)
    bad = system.send("project.users.tasks.divide", 1, 0)
    frames(system, bad)
    for task_id, state in ((good, "SUCCESS"), (bad, "FAILURE")):

        def shown(task_id: str = task_id, state: str = state) -> bool:
            answer = httpx.get(f"{system.flower}/api/tasks")
            return bool(answer.json().get(task_id, {}).get("state") == state)

        eventually(shown, what=f"{state} of {task_id} in Flower")
    workers = httpx.get(f"{system.flower}/").text
    assert "worker1@" in workers
    name = re.search(r"worker1[\w.]*@[\w.-]+", workers)
    assert name is not None
    assert httpx.get(f"{system.flower}/worker/{name.group()}").status_code == 200


def test_p23_e02_celerys_own_commands_show_the_configuration_and_the_crontab(
    system: System,
) -> None:
    with system.celery("report") as report:
        assert report.wait() == 0
        report.wait_for(r"task_acks_late: True")
        report.wait_for(r"'schedule': <crontab: 0 3 \* \* \*")
    with system.celery("inspect", "conf") as conf:
        assert conf.wait() == 0
        conf.wait_for(r"task_default_queue")


def test_p22_p28_celeriac_settings_shows_values_sources_and_no_secret(system: System) -> None:
    env = system.env | {
        "CELERY_TASK_SOFT_TIME_LIMIT": "2",
        "WS_MESSAGE_QUEUE": "redis://:s3cret@127.0.0.1/1",
    }
    with python("-m", "celeriac.cli", "settings", cwd=REFERENCE, env=env) as shown:
        assert shown.wait() == 0
        shown.wait_for(r"^CELERY_TASK_SOFT_TIME_LIMIT +2\.0 +environment$")
        shown.wait_for(r"^WS_MESSAGE_QUEUE +redis://:\*+@127\.0\.0\.1/1 +environment$")
        shown.wait_for(r"^FASTAPI_CONFIG +development +default of Config$")
        shown.wait_for(r"^CELERY_TASK_ACKS_LATE +True +celeriac$")
        assert "s3cret" not in shown.output


def test_the_worker_runs_the_pool_for_async_tasks(system: System) -> None:
    system.behave(delay=2)
    (stats,) = system.producer.control.inspect(timeout=5).stats().values()
    assert stats["pool"]["implementation"] == "celeriac.pool:TaskPool"
    assert stats["pool"]["max-concurrency"] == 100
    began = time.monotonic()
    ids = [submit(system) for _ in range(30)]
    assert {tuple(states(system, task_id))[-1] for task_id in ids} == {"SUCCESS"}
    assert time.monotonic() - began < 20  # one after the other, they would take 60 s


@pytest.mark.parametrize(
    ("pool", "name"),
    [
        ("", "high_priority:subscribe_now"),
        ("prefork", "high_priority:subscribe_now"),
        ("prefork", "high_priority:block"),  # synchronous
    ],
)
def test_p28_a_soft_time_limit_from_the_environment_cuts_a_task(
    system: System, pool: str, name: str
) -> None:
    system.behave(delay=5)
    env = system.env | {"CELERY_TASK_SOFT_TIME_LIMIT": "2", "PYTHONPATH": str(APPS)}
    env |= {"CELERY_WORKER_POOL": pool} if pool else {}
    worker = ["-m", "celery", "-A", "main.celery", "worker", "-l", "info", "-Q", "high_priority"]
    worker += ["-c", "2", "-I", "block"]
    control = system.producer.control
    assert control.cancel_consumer("high_priority", reply=True)
    try:
        with python(*worker, "-n", "limited@%h", cwd=REFERENCE, env=env) as limited:
            node = limited.wait_for(r"(limited@\S+) ready\.").group(1)
            # It says that it is ready a moment before it listens.
            inspect = system.producer.control.inspect([node], timeout=3)
            (conf,) = eventually(inspect.conf, 30).values()
            assert conf["task_soft_time_limit"] == 2
            assert conf["worker_pool"] == (pool or "celeriac.pool:TaskPool")
            task_id = system.send(name, "a@example.com")
            last = frames(system, task_id)[-1]
            assert last["state"] == "FAILURE"
            assert str(last["error"]).startswith("SoftTimeLimitExceeded")
            limited.stop()
    finally:
        assert control.add_consumer("high_priority", reply=True)


def test_e02_beat_runs_the_interval(system: System) -> None:
    system.runner.wait_for(r"Sending due task count-users", count=2)
    system.runner.wait_for(r"project\.users\.tasks\.count_users\[.*succeeded", count=2)


@pytest.mark.parametrize("role", ["web", "worker", "beat"])
def test_each_process_is_ready(role: str, system: System) -> None:
    url = f"{system.base}/health-check"
    with system.shell("-m", "celeriac.cli", "health", role, "--ready", "--url", url) as probe:
        assert probe.wait() == 0, probe.output
        assert re.fullmatch(rf"{role} .*\n", probe.output)


def test_e03_e04_a_prefix_names_the_queue(system: System) -> None:
    code = (
        "from main import celery\n"
        "route = celery.amqp.router.route\n"
        "for name in ('high_priority:subscribe_now', 'project.users.tasks.divide'):\n"
        "    print('queue', route({}, name, task_type=celery.tasks[name])['queue'].name)\n"
        "try:\n"
        "    celery.send_task('nope:task')\n"
        "except Exception as error:\n"
        "    print('refused', error)\n"
    )
    with system.shell("-c", code) as shell:
        shell.wait_for(r"queue high_priority\nqueue default\n")
        shell.wait_for(r"refused .*'nope' is no queue; there are default, high_priority")
    with system.celery("worker", "-Q", "nope") as worker:
        assert worker.wait() != 0
        assert worker.output.strip().splitlines()[-1] == (
            "error: 'nope' is no queue; task_queues has default, high_priority, low_priority"
        )
        assert "Traceback" not in worker.output


def test_e06_a_user_and_its_task_come_together_or_not_at_all(system: System) -> None:
    system.behave()
    for number in range(20):
        name = f"e06-{number}"
        body = {"username": name, "email": f"{name}@example.com"}
        answer = system.http.post("/users/user_subscribe/", json=body)
        assert answer.status_code == 202
        last = frames(system, answer.json()["task_id"])[-1]
        assert last["state"] == "SUCCESS"
        assert last["result"] == f"{name}@example.com is on the list"
        assert system.http.post("/users/user_subscribe/", json=body).status_code == 409
    calls = system.third_party.get("/calls").json()
    assert [call["email"] for call in calls] == [
        f"e06-{number}@example.com" for number in range(20)
    ]


def test_e07_a_tasks_log_lines_carry_its_id_and_the_requests_id(system: System) -> None:
    request_id = "11111111-2222-4333-8444-555555555555"
    answer = system.http.post("/users/form/", json=USER, headers={"X-Request-ID": request_id})
    assert answer.headers["x-request-id"] == request_id
    task_id = answer.json()["task_id"]
    system.runner.wait_for(rf"\[task {task_id} request {request_id}\] .*succeeded in")
    forged = system.send("project.users.tasks.divide", "1\n[2026] FORGED", 1)
    assert frames(system, forged)[-1]["state"] == "FAILURE"
    system.runner.wait_for(r"dividing 1\\n\[2026\] FORGED by 1")


@pytest.fixture
def name() -> str:
    return f"user{datetime.now(UTC).timestamp()}"


def test_p27_users_are_unique_and_bad_ones_are_refused(system: System, name: str) -> None:
    user = {"username": name, "email": f"{name}@example.com"}
    created = system.http.post("/users/", json=user)
    assert created.status_code == 201
    assert created.json() == user | {"id": created.json()["id"]}
    assert created.json() in system.http.get("/users/").json()
    again = system.http.post("/users/", json=user)
    assert again.status_code == 409
    assert "exists already" in again.json()["detail"]
    other = system.http.post("/users/", json=user | {"username": f"{name}x"})
    assert other.status_code == 409


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{not json", "JSON decode error"),
        (b'{"username": "a", "email": "no address"}', "valid email address"),
        (b'{"username": "a"}', "Field required"),
        (b'{"username": "", "email": "a@example.com"}', "at least 1 character"),
        (b'{"username": "%s", "email": "a@example.com"}' % (b"a" * 129), "at most 128"),
        (b'{"username": "a", "email": "a@%s.com"}' % (b"b" * 130), ""),
        (b'{"username": "a\\u0000b", "email": "a@example.com"}', "pattern"),
        (b'{"username": "\\ud800", "email": "a@example.com"}', ""),
        (b'{"username": NaN, "email": "a@example.com"}', "valid string"),
        (b'{"username": "\xff\xfe", "email": "a@example.com"}', ""),
        (b"[" * 100_000, ""),
        (b"", "Field required"),
    ],
)
@pytest.mark.parametrize("path", ["/users/", "/users/form/"])
def test_bad_bodies_are_4xx_with_a_reason_and_write_nothing(
    system: System, path: str, body: bytes, says: str
) -> None:
    before = system.http.get("/users/").json()
    answer = system.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert says in json.dumps(answer.json()["detail"])
    assert system.http.get("/users/").json() == before
    assert system.third_party.get("/calls").json() == []


def test_requests_of_other_sites_are_refused(system: System) -> None:
    for headers, status in (
        ({}, 200),
        ({"Origin": system.base}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": system.base.upper().replace("HTTP", "http")}, 200),
        ({"Origin": "null"}, 403),
        ({"Origin": "null", "Host": ""}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Origin": system.base.replace("http", "file")}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "Cross-Site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
    ):
        answer = system.http.post("/users/form/", json=USER, headers=headers)
        assert answer.status_code == status, headers
    task_id = submit(system)
    address = f"{system.sockets}/ws/task_status/{task_id}"
    with system.watch(task_id, origin=system.base) as socket:
        assert json.loads(socket.recv(timeout=5))["task_id"] == task_id
    for task_id in ("x" * 256, "a%0d%0ab", "%00"):
        with pytest.raises(InvalidStatus, match="403"):
            system.watch(task_id)
        answer = system.http.get(f"/users/task_status/?task_id={task_id}")
        assert answer.status_code == 422
    assert system.http.get("/users/task_status/?task_id=").status_code == 422
    with pytest.raises(InvalidStatus, match="403"):
        connect(address, origin=Origin("https://evil.example"))


def test_p49_closed_sockets_leave_nothing_behind(system: System) -> None:
    frames(system, submit(system))  # whatever opens once is open
    process = system.web()
    before = process.num_fds()
    for _ in range(200):
        waits = system.send("project.users.tasks.divide", 1, 2, countdown=3600)
        with system.watch(waits) as socket:
            socket.recv(timeout=5)
    eventually(lambda: process.num_fds() <= before, what=f"{process.num_fds()} > {before}")


def test_a_socket_ends_when_its_client_goes_away_without_a_word(system: System) -> None:
    before = system.web().num_fds()
    waits = system.send("project.users.tasks.divide", 1, 2, countdown=3600)
    for _ in range(5):
        with system.watch(waits) as socket:
            socket.recv(timeout=5)
            socket.socket.shutdown(SHUT_RDWR)
    eventually(lambda: system.web().num_fds() <= before)
