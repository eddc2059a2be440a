import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
from celery.schedules import crontab

from celeriac import ConfigurationError, Settings
from celeriac.settings import is_local, mask


class App(Settings):
    database_url: str = "sqlite:///app.db"
    database_connect_dict: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it
    api_token: str = "t0p"
    celery_task_default_queue: str = "default"
    celery_beat_schedule: dict[str, Any] = {  # noqa: RUF012
        "nightly": {"task": "t", "schedule": crontab(hour=3)}
    }


class LocalApp(App):
    local_only: ClassVar[bool] = True


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_arguments_win_over_environment_over_env_file_over_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text("CELERY_BROKER_URL=redis://file/1\nDATABASE_URL=sqlite:///file.db\n")
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://environment/1")
    assert App().celery_broker_url == "redis://environment/1"
    assert App(celery_broker_url="redis://argument/1").celery_broker_url == "redis://argument/1"
    assert App().database_url == "sqlite:///file.db"
    assert App().celery_result_backend == "redis://127.0.0.1:6379/0"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("CELERY_TASK_SOFT_TIME_LIMIT", "2", 2.0),
        ("CELERY_TASK_ALWAYS_EAGER", "true", True),
        ("CELERY_WORKER_PREFETCH_MULTIPLIER", "7", 7),
        ("CELERY_WORKER_CONCURRENCY", "3", 3),
        ("CELERY_TIMEZONE", "Europe/Zurich", "Europe/Zurich"),
        ("CELERY_ACCEPT_CONTENT", "json,yaml", ["json", "yaml"]),
        ("CELERY_TASK_ANNOTATIONS", '{"t": {"rate_limit": "1/s"}}', {"t": {"rate_limit": "1/s"}}),
        ("CELERY_TASK_DEFAULT_QUEUE", "other", "other"),
    ],
)
def test_any_celery_option_comes_from_the_environment_and_from_the_env_file(
    name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = name.removeprefix("CELERY_").lower()
    Path(".env").write_text(f"{name}='{text}'\n")
    assert App().celery_config()[option] == value
    Path(".env").unlink()
    monkeypatch.setenv(name, text)
    assert App().celery_config()[option] == value


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("CELERY_TASK_SOFT_TIMELIMIT", "2", "did you mean CELERY_TASK_SOFT_TIME_LIMIT?"),
        ("CELERY_TASK_SOFT_TIME_LIMIT", "soon", "CELERY_TASK_SOFT_TIME_LIMIT='soon' is no float"),
        ("CELERY_BEAT_SCHEDULE", "[1]", "CELERY_BEAT_SCHEDULE"),
        ("CELERY_TASK_ANNOTATIONS", "{oops", "CELERY_TASK_ANNOTATIONS is no any: "),
        ("DATABASE_CONNECT_DICT", "{oops", "database_connect_dict"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(
    name: str, text: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigurationError) as raised:
        App()
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_variables_of_celerys_command_line_are_not_taken_for_misspelt_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CELERY_WORKER_LOGLEVEL", "info")
    monkeypatch.setenv("CELERY_LOADER", "default")
    assert "worker_loglevel" not in App().celery_config()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("CELERY_BROKER_URL", "redis://production:6379/0"),
        ("CELERY_BROKER_URL", "redis://127.0.0.1:6379/0;redis://production:6379/0"),
        ("CELERY_BROKER_READ_URL", "amqp://guest@127.0.0.1:x@production//"),
        ("CELERY_RESULT_BACKEND", "db+postgresql://production/results"),
        ("WS_MESSAGE_QUEUE", "redis://10.0.0.1/0"),
        ("DATABASE_URL", "postgresql://u:secret@production/app"),
        ("DATABASE_URL", "postgresql:///app?host=production"),
        ("DATABASE_CONNECT_DICT", '{"host": "production"}'),
        ("DATABASE_CONNECT_DICT", '{"conninfo": "host=production"}'),
        ("CELERY_BROKER_URL", "sqs://KEY:SECRET@"),
        ("CELERY_RESULT_BACKEND", "redis:///0"),  # its host is an option of its own
        ("DATABASE_URL", "postgresql://localhost?@production/db"),
        ("DATABASE_URL", "postgresql://localhost/x@production/db"),
        ("DATABASE_URL", "postgresql://localhost/x?service=production"),
        ("DATABASE_URL", "postgresql://localhost/x?dbname=host%3Dproduction"),
        ("DATABASE_URL", "postgresql:///app"),
    ],
)
def test_a_local_configuration_refuses_every_distant_address(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    App()
    with pytest.raises(ConfigurationError, match=f"{name}=.*not on this machine") as raised:
        LocalApp()
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://:password@127.0.0.1:6379/0",
        "redis://[::1]:6379/0",
        "redis+socket:///tmp/s?virtual_host=0",
        "memory://",
        "cache+memory://",
        "sqlite:////tmp/a.db",
        "postgresql:///app?host=/run/postgresql",
        "postgresql+psycopg://u:p%40x@localhost:5432/app",
    ],
)
def test_local_addresses_are_recognised(url: str) -> None:
    assert is_local(url)


def test_a_local_configuration_refuses_the_variables_of_postgresqls_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u@127.0.0.1/app")
    monkeypatch.setenv("PGHOSTADDR", "127.0.0.1")
    LocalApp()
    monkeypatch.setenv("PGHOSTADDR", "10.0.0.1")
    with pytest.raises(ConfigurationError, match=r"PGHOSTADDR=10\.0\.0\.1"):
        LocalApp()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("foo", "no broker's URL"),
        ("htp://x", "no broker's URL"),
        ("redis://h:abc/0", "the port is no number"),
        ("redis://h:99999/0", "the port is no number"),
    ],
)
def test_a_brokers_url_that_nothing_could_use_is_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        App(celery_broker_url=url)


def test_half_an_option_is_refused_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER", "redis://h/9")
    with pytest.raises(ConfigurationError, match="set CELERY_BROKER_URL instead"):
        App()


def test_an_env_file_that_is_no_text_is_one_line() -> None:
    Path(".env").write_bytes(b"A=\xff\xfe\n")
    with pytest.raises(ConfigurationError, match=r"\.env is not UTF-8"):
        App()


def test_a_broken_option_does_not_show_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_TRANSPORT_OPTIONS", '{"password": "hunter2"')
    with pytest.raises(ConfigurationError) as raised:
        App()
    assert "hunter2" not in str(raised.value)


def test_explain_names_value_and_source_and_hides_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("CELERY_TASK_SOFT_TIME_LIMIT=2\nDATABASE_URL=postgresql://u:pw@h/d\n")
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://:hunter2@h/0")
    rows = {
        name: (value, source)
        for name, value, source in App(celery_result_backend="redis://b").explain()
    }
    assert rows["CELERY_BROKER_URL"] == ("redis://:********@h/0", "environment")
    assert rows["DATABASE_URL"] == ("postgresql://u:********@h/d", ".env")
    assert rows["CELERY_TASK_SOFT_TIME_LIMIT"] == ("2.0", ".env")
    assert rows["CELERY_RESULT_BACKEND"] == ("redis://b", "argument")
    assert rows["CELERY_TASK_DEFAULT_QUEUE"] == ("default", "default of App")
    assert rows["API_TOKEN"][0] == "********"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("redis://:a@b@host/0", "redis://:********@host/0"),
        ("amqp://u:p@a//;amqp://u:p@b//", "amqp://u:********@a//;amqp://u:********@b//"),
        ("redis://h/0?password=x&db=1", "redis://h/0?password=********&db=1"),
        ("redis://:p;w@h/0", "redis://:********@h/0"),
        ("postgresql://u:p/a?s#s@h/d", "postgresql://u:********@h/d"),
        (["redis://:p@a/0", "redis://b/0"], "[redis://:********@a/0, redis://b/0]"),
        ({"urls": ["redis://:p@a/0"]}, "{'urls': [redis://:********@a/0]}"),
        ("s3://bucket?api_key=x", "s3://bucket?api_key=********"),
        ("azure://Name=n;AccountKey=k==;End=e", "azure://Name=n;AccountKey=********;End=e"),
        ({"password": "x", "user": "u"}, "{'password': ********, 'user': u}"),
    ],
)
def test_no_password_can_be_read_in_a_masked_value(value: object, shown: str) -> None:
    assert mask("url", value) == shown


def test_empty_variables_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "")
    monkeypatch.setenv("CELERY_TASK_TIME_LIMIT", "")
    assert App().celery_broker_url == "redis://127.0.0.1:6379/0"
    assert "task_time_limit" not in App().celery_config()
    assert os.environ["CELERY_BROKER_URL"] == ""
