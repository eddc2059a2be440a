"""Configurations: FASTAPI_CONFIG names one; the environment and `.env` change its values."""

import secrets
from pathlib import Path
from typing import Any, ClassVar, Literal

from celery.schedules import crontab
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from celeriac import ConfigurationError, Settings, settings_of

BASE_DIR = Path(__file__).resolve().parent.parent


class Config(Settings):
    """What every configuration has. A field `celery_<option>` is an option of Celery."""

    fastapi_config: str = "development"
    database_url: str = f"sqlite:///{BASE_DIR / 'db.sqlite3'}"
    database_connect_dict: dict[str, Any] = {}
    mailing_list_url: str = "http://127.0.0.1:9010"
    flower_url: str = "http://127.0.0.1:5557"
    log_format: Literal["text", "json"] = "text"
    secret_key: SecretStr = SecretStr("for development only")  # signs cookies
    shows_errors: bool = True  # of tasks, to those who sent them
    shows_unowned: bool = True  # tasks that were sent from a shell, to all

    # Tasks that wait share one process; CELERY_WORKER_POOL=prefork has Celery's own pool instead.
    celery_worker_pool: str = "celeriac.pool:TaskPool"
    celery_task_default_queue: str = "default"
    celery_task_queues: list[str] = ["default", "high_priority", "low_priority"]
    # A misspelt queue is an error at once, not a queue that no worker listens on.
    celery_task_create_missing_queues: bool = False
    celery_beat_schedule: dict[str, Any] = {
        "count-users": {
            "task": "project.users.tasks.count_users",
            "schedule": 5.0,
            "options": {"expires": 5.0},  # without a worker they do not pile up
        },
        "nightly-report": {
            "task": "low_priority:nightly_report",
            "schedule": crontab(hour=3, minute=0),
        },
    }


class DevelopmentConfig(Config):
    pass


class ProductionConfig(Config):
    # Without one of its own every process forgets the others' visitors.
    secret_key: SecretStr = Field(default_factory=lambda: SecretStr(secrets.token_urlsafe()))
    shows_errors: bool = False
    shows_unowned: bool = False
    log_format: Literal["text", "json"] = "json"


class TestingConfig(Config):
    """Tasks run in the calling process, without a broker; nothing beyond this machine is used."""

    __test__ = False  # no test case, whatever pytest thinks of the name
    local_only: ClassVar[bool] = True

    database_url: str = f"sqlite:///{BASE_DIR / 'test.sqlite3'}"
    celery_broker_url: str = "memory://"
    celery_result_backend: str = "cache+memory://"
    celery_task_always_eager: bool = True


CONFIGS: dict[str, type[Config]] = {
    "development": DevelopmentConfig,
    "production": ProductionConfig,
    "testing": TestingConfig,
}


class _Choice(BaseSettings):
    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")
    fastapi_config: str = "development"


def load_config() -> Config:
    """The configuration that FASTAPI_CONFIG names. Raises ConfigurationError, one line."""
    name = _Choice().fastapi_config
    if name not in CONFIGS:
        raise ConfigurationError(f"FASTAPI_CONFIG={name!r}: expected one of {', '.join(CONFIGS)}")
    return CONFIGS[name]()


def get_config() -> Config:
    """The configuration of the current app: of the request, or of the worker."""
    config = settings_of()
    assert isinstance(config, Config)
    return config
