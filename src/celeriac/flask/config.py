"""Configuration: from `app.config`, or from one file that has all of it."""

import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from celeriac.errors import ConfigurationError
from celeriac.settings import Settings, celery_options, check_option

VARIABLE = "FLASK_CONFIG"
DEFAULT = Path("secrets/api-config.yaml")

_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float, timedelta),
    "string": (str,),
    "dict": (Mapping,),
}


class _CelerySection(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)  # more of Celery's options

    broker_url: str
    result_backend: str


class FileConfig(BaseModel):
    """What the file holds. `celery` takes every option of Celery's, by its lower-case name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    port: int = Field(ge=1, le=65535)
    secret_key: str = Field(min_length=1)
    celery: _CelerySection

    def as_flask(self) -> dict[str, Any]:
        """The same for `app.config.from_mapping`."""
        return {
            "PORT": self.port,
            "SECRET_KEY": self.secret_key,
            "CELERY": self.celery.model_dump(),
        }


def read_config(path: str | Path | None = None) -> FileConfig:
    """The YAML or JSON file at `path`, else at FLASK_CONFIG, else `./secrets/api-config.yaml`.

    Where the environment has CELERY_BROKER_URL or CELERY_RESULT_BACKEND, they win over the file's.
    Raises ConfigurationError, one line.
    """
    file = Path(path or os.environ.get(VARIABLE) or DEFAULT)
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML too
    except FileNotFoundError:
        raise ConfigurationError(
            f"there is no {file}: make it, or say where it is with {VARIABLE}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        # Not its text, which shows the lines around, and a secret that is in them.
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        said = getattr(error, "problem", None) or "it cannot be read"
        raise ConfigurationError(f"{file} is no YAML{where}: {said}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{file}: expected port, secret_key and celery")
    try:
        config = FileConfig.model_validate(found)
    except ValidationError as error:
        raise ConfigurationError(f"{file}: {_reasons(error)}") from None
    for name in _CelerySection.model_fields:
        if given := os.environ.get(f"CELERY_{name.upper()}"):
            setattr(config.celery, name, given)
    for option, value in config.celery.model_dump().items():
        check_value(option, value, f"celery.{option} in {file}")
    return config


def _reasons(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, item['loc']))}: {_reason(item['type'], item['msg'])}"
        for item in error.errors(include_input=False, include_url=False)
    )


def _reason(kind: str, message: str) -> str:
    return {"extra_forbidden": "unknown key", "missing": "missing"}.get(kind, message)


def check_value(option: str, value: Any, given_as: str) -> None:
    """Raise ConfigurationError for what is no option of Celery's, or has another type."""
    if option in _own_settings():
        return  # pydantic's work
    check_option(option, given_as)
    definition = celery_options().get(option)
    if definition is None or value is None or definition.type not in _KINDS:
        return
    kinds = _KINDS[definition.type]
    mistaken = isinstance(value, bool) and bool not in kinds
    if mistaken or not isinstance(value, kinds):
        raise ConfigurationError(
            f"{given_as}: {definition.type} expected, got {type(value).__name__}"
        )


def _own_settings() -> set[str]:
    return {name for name in Settings.model_fields if not name.startswith("celery_")}


def settings_from(config: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """celeriac's settings, and more options of Celery's, of a Flask application's configuration.

    From `CELERY`, a mapping of options by their lower-case names, and from `CELERY_<OPTION>`.
    Raises ConfigurationError.
    """
    own: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for option, value, given_as in _given(config):
        check_value(option, value, given_as)
        if value is None:
            continue
        field = option if option in _own_settings() else f"celery_{option}"
        place, name = (own, field) if field in Settings.model_fields else (options, option)
        if place.setdefault(name, value) != value:
            raise ConfigurationError(f"{given_as} contradicts app.config['CELERY']")
    return Settings(**own), options


def _given(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    mapping = config.get("CELERY") or {}
    if not isinstance(mapping, Mapping):
        raise ConfigurationError(
            f"app.config['CELERY']: a mapping expected, got {type(mapping).__name__}"
        )
    for name, value in mapping.items():
        yield str(name), value, f"CELERY[{str(name)!r}]"
    for name, value in config.items():
        if name.startswith("CELERY_"):
            yield name.removeprefix("CELERY_").lower(), value, name
