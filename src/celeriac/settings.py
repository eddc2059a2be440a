"""Typed settings of an application, and the plain, validated dict that Celery gets from them."""

import difflib
import inspect
import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, PrivateAttr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from celeriac.errors import ConfigurationError

_PREFIX = "celery_"
# Read by Celery from the environment, and no options of its configuration.
_NOT_OPTIONS = {
    "celery_app",
    "celery_config_module",
    "celery_custom_worker_pool",
    "celery_loader",
    "celery_log_file",
    "celery_log_level",
    "celery_log_redirect",
    "celery_log_redirect_level",
    "celery_rdb_host",
    "celery_rdb_port",
    "celery_rdbsig",
    "celery_trace_app",
}
_NAMES = r"secret|passw|token|credential|(?:api|access|account|private|shared)_?-?key|signature"
_SECRET_NAME = re.compile(_NAMES, re.IGNORECASE)
_SECRET_IN_URL = re.compile(rf"((?:^|[?&;/])[^=&;/?]*(?:{_NAMES})[^=&;/?]*=)[^&;]*", re.IGNORECASE)
_URL = re.compile(r"^[a-z][a-z0-9+.:_-]*://", re.IGNORECASE)
_NEXT_URL = re.compile(r";(?=[a-z][a-z0-9+.:_-]*://)", re.IGNORECASE)  # several, joined by ;
_LOCAL_SCHEMES = {"memory", "cache+memory", "filesystem", "file", "sqlite", "unix", "redis+socket"}
# What leads PostgreSQL's library to a server past the host in a URL.
_INDIRECT = {"service", "servicefile", "conninfo", "dsn"}
_NO_SERVER = {"rpc", "disabled"}  # result backends that go where the broker is, or nowhere


class Settings(BaseSettings):
    """Base of an application's settings: arguments, then the environment, then `.env`.

    A field named `celery_<option>`, and any `CELERY_<OPTION>` in the environment or `.env`, is an
    option of Celery; an option that Celery does not have is refused, by its name. `celery_config`
    gives them all as the plain dict that Celery takes.

    A subclass sets `local_only = True` to refuse every address that is not on this machine: a test
    configuration then cannot reach a production broker, whatever the environment says.

    Raises ConfigurationError, one line, where pydantic would raise ValidationError.
    """

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")
    local_only: ClassVar[bool] = False

    celery_broker_url: str = "redis://127.0.0.1:6379/0"
    celery_result_backend: str = "redis://127.0.0.1:6379/0"
    ws_message_queue: str | None = None
    publish_timeout: float = Field(default=2.0, gt=0)  # seconds
    worker_lease: float = Field(default=30.0, ge=1)  # seconds
    max_deliveries: int = Field(default=3, ge=1)
    beat_lease: float = Field(default=30.0, gt=0)  # seconds
    max_message_size: int = Field(default=16 * 2**20, gt=0)  # bytes; a worker refuses more

    _given: frozenset[str] = PrivateAttr(default=frozenset())
    _undeclared: dict[str, tuple[Any, str]] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(_one_line(error, type(self).__name__)) from None
        except UnicodeDecodeError:
            raise ConfigurationError(".env is not UTF-8") from None
        except SettingsError as error:  # a field that takes JSON was given something else
            raise ConfigurationError(f"{error}: JSON expected") from None
        self._given = frozenset(values)

    @model_validator(mode="after")
    def _check(self) -> Self:
        declared = type(self).model_fields
        for name in declared:
            if name.startswith(_PREFIX):
                check_option(name.removeprefix(_PREFIX), name.upper())
        for source, variables in (("environment", os.environ), (".env", self._env_file())):
            for variable, text in variables.items():
                name = variable.lower()
                if not name.startswith(_PREFIX) or name in declared or name in self._undeclared:
                    continue
                option = name.removeprefix(_PREFIX)
                if not text or name in _NOT_OPTIONS or not check_option(option, variable):
                    continue
                self._undeclared[name] = (_parse(option, variable, text), source)
        check_broker(self.celery_broker_url)
        for name, value in self._every_value():
            if self.local_only:
                _refuse_distant(name, value, type(self).__name__)
        return self

    @classmethod
    def _env_file(cls) -> Mapping[str, str | None]:
        return DotEnvSettingsSource(cls).env_vars

    def _every_value(self) -> Iterator[tuple[str, Any]]:
        for name in type(self).model_fields:
            yield name, getattr(self, name)
        for name, (value, _) in self._undeclared.items():
            yield name, value

    def celery_config(self) -> dict[str, Any]:
        """The options of Celery: lower-case names without prefix, unset (None) ones left out."""
        return {
            name.removeprefix(_PREFIX): value
            for name, value in self._every_value()
            if name.startswith(_PREFIX) and value is not None
        }

    def explain(self) -> list[tuple[str, str, str]]:
        """Every setting as (NAME, effective value with secrets masked, where it comes from)."""
        origins = {name: self._origin(name) for name in type(self).model_fields}
        origins |= {name: source for name, (_, source) in self._undeclared.items()}
        return sorted(
            (name.upper(), mask(name, value), origins[name]) for name, value in self._every_value()
        )

    def _origin(self, name: str) -> str:
        if name in self._given:
            return "argument"
        if name in self.model_fields_set:
            environment = {variable.lower() for variable, value in os.environ.items() if value}
            return "environment" if name in environment else ".env"
        for owner in type(self).__mro__:
            if name in inspect.get_annotations(owner):
                return f"default of {owner.__name__}"
        return "default"


def celery_options() -> Mapping[str, Any]:
    """Celery's options: name -> `celery.app.defaults.Option` (its type and default)."""
    from celery.app.defaults import NAMESPACES, flatten

    return dict(flatten(NAMESPACES))


def check_option(option: str, given_as: str) -> bool:
    """Whether Celery's configuration has `option`. False where only its command line has it.

    Raises ConfigurationError, with the nearest name, where neither has it.
    """
    known = celery_options()
    if option in known:
        return True
    if option == "broker":  # Celery's command line reads it, nothing else does
        raise ConfigurationError(f"{given_as} is only half an option: set {given_as}_URL instead")
    if f"{_PREFIX}{option}" in _command_line_variables():
        return False
    near = difflib.get_close_matches(option, known, n=1)
    shown = given_as.removesuffix(option.upper()) if given_as.isupper() else ""
    name = f"{shown}{near[0].upper()}" if near and shown else near[0] if near else ""
    hint = f"; did you mean {name}?" if name else ""
    raise ConfigurationError(f"{given_as} is not an option of Celery{hint}")


def _command_line_variables() -> set[str]:
    """The variables that `celery`, `celery worker` and so on read for their own options."""
    from celery.bin.celery import celery

    def walk(command: Any, prefix: str) -> Iterator[str]:
        for parameter in command.params:
            yield f"{prefix}_{parameter.name}"
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, f"{prefix}_{name}".replace("-", "_"))

    return set(walk(celery, "celery"))


def _parse(option: str, variable: str, text: str) -> Any:
    """A variable's text as the type that Celery's option has; lists and dicts are JSON."""
    definition = celery_options()[option]
    kind = definition.type
    try:
        if kind in ("dict", "tuple", "list"):
            value: Any = json.loads(text) if text[:1] in "[{" else text.split(",")
            if not isinstance(value, dict if kind == "dict" else list):
                raise ValueError(f"{kind} expected, as JSON")
            return tuple(value) if kind == "tuple" else value
        if kind == "any":
            return _json_or_text(text)
        return definition.to_python(text)
    except (ValueError, TypeError) as error:
        # The text of a list or a dict may hold a password; that of a number does not.
        shown = "" if kind in ("dict", "tuple", "list", "any") else f"={text!r}"
        raise ConfigurationError(f"{variable}{shown} is no {kind}: {error}") from None


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        if text[0] in "[{":
            raise
        return text


def _one_line(error: ValidationError, configuration: str) -> str:
    reasons = "; ".join(
        f"{'.'.join(map(str, item['loc'])).upper() or configuration}: {item['msg']}"
        for item in error.errors(include_input=False, include_url=False)
    )
    return f"settings of {configuration}: {reasons}"


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds what others must not read."""
    return _SECRET_NAME.search(name) is not None


def mask(name: str, value: Any) -> str:
    """`value` as text in which no password can be read."""
    if value is not None and is_secret(name):
        return "********"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {mask(str(key), v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple)) and any(_addresses(value)):
        return "[" + ", ".join(mask(name, item) for item in value) + "]"
    if isinstance(value, str) and "://" in value:
        return ";".join(_mask_url(url) for url in _NEXT_URL.split(value))
    return value if isinstance(value, str) else repr(value)


def _mask_url(url: str) -> str:
    # To the last @: a password may hold what should have been escaped in it.
    url = re.sub(r"(://[^:@/?#]*:).*(@)", r"\1********\2", url)
    return _SECRET_IN_URL.sub(r"\1********", url)


def is_local(url: str) -> bool:
    """Whether every server that `url` names (several may be joined by ;) is on this machine.

    A host has to be named, or a socket's path: who leaves it out gets what some other option or
    variable says. So does a URL that can be read in two ways.
    """
    return all(_is_local(part) for part in _NEXT_URL.split(url))


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    if parts.scheme in _LOCAL_SCHEMES or url.rstrip(":/") in _NO_SERVER:
        return True
    if re.search(r"[/?#].*@", url.partition("://")[2]):
        return False
    query = parse_qs(parts.query)
    if _INDIRECT & query.keys() or any("=" in name for name in query.get("dbname", [])):
        return False
    hosts = [name for key in ("host", "hostaddr") for name in query.get(key, [])]
    address = re.sub(r".*@", "", parts.netloc)
    if address or not hosts:
        hosts.append(address)
    # PostgreSQL takes several hosts, joined by commas, in either place.
    return all(_is_local_host(name) for host in hosts for name in host.split(","))


def _is_local_host(host: str) -> bool:
    host = re.sub(r":\d*$", "", host) if host.count(":") < 2 or "]" in host else host
    host = host.strip("[]").lower()
    if host == "localhost" or host.startswith("/"):  # a path is a unix socket
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse_distant(name: str, value: Any, configuration: str) -> None:
    for url in _addresses(value):
        if not is_local(url):
            raise ConfigurationError(
                f"{name.upper()}={_mask_url(url)} is not on this machine, or not surely, and "
                f"{configuration} uses nothing else; unset it, or choose another configuration"
            )
        if url.startswith("postgres"):
            _refuse_distant_variables(configuration)


def _refuse_distant_variables(configuration: str) -> None:
    """PostgreSQL's library reads these itself, and some of them win over the URL."""
    for variable in ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGSERVICEFILE"):
        value = os.environ.get(variable)
        if value and not (variable.startswith("PGHOST") and _is_local_host(value)):
            raise ConfigurationError(
                f"{variable}={value} may lead to another machine, and {configuration} uses "
                "nothing but this one; unset it"
            )


def _addresses(value: Any) -> Iterator[str]:
    if isinstance(value, str) and _URL.match(value):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key in ("host", "hostaddr", "hostname") and isinstance(item, str):
                yield f"host://{item}" if not item.startswith("/") else f"unix://{item}"
            elif key in _INDIRECT:
                yield f"{key}://"
            else:
                yield from _addresses(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _addresses(item)


def check_broker(url: str) -> None:
    """Raise ConfigurationError for a broker's URL that kombu could not use, or would misread."""
    from kombu.transport import TRANSPORT_ALIASES

    for part in _NEXT_URL.split(url):
        scheme, separator, _ = part.partition("://")
        if not separator or (scheme.split("+")[0] not in TRANSPORT_ALIASES and ":" not in scheme):
            raise ConfigurationError(
                f"CELERY_BROKER_URL={_mask_url(part)} is no broker's URL: "
                "expected e.g. redis://127.0.0.1:6379/0 or amqp://user:password@host//"
            )
        try:
            _ = urlsplit(part).port
        except ValueError:
            raise ConfigurationError(
                f"CELERY_BROKER_URL={_mask_url(part)}: the port is no number from 0 to 65535"
            ) from None
