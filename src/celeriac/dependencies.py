"""What a function asks for in the way of FastAPI: `Annotated[Session, Depends(get_session)]`.

FastAPI itself is not needed: a marker is what has a `dependency` and says whether to `use_cache`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic.fields import FieldInfo

from celeriac.errors import ConfigurationError
from celeriac.signatures import signature_of

Call = Callable[..., Any]

_OF_A_REQUEST = {
    "BackgroundTasks", "HTTPConnection", "Request", "Response", "SecurityScopes", "WebSocket",
}  # fmt: skip
_VARIADIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
_KINDS: dict[str, Callable[[object], bool]] = {
    "generator": inspect.isgeneratorfunction,
    "async generator": inspect.isasyncgenfunction,
    "async function": inspect.iscoroutinefunction,
}


class _Injected:
    def __repr__(self) -> str:
        return "injected"

    def __reduce__(self) -> str:
        return "injected"


injected: Any = _Injected()
"""The default of a task's parameter that its worker fills in: callers leave it out."""


@dataclass(frozen=True, slots=True)
class Dependency:
    """A callable whose value is asked for, and what it asks for itself."""

    call: Call
    kind: str
    use_cache: bool
    needs: dict[str, "Dependency"]
    fields: dict[str, FieldInfo]  # parameters that a request may fill in, and need not


def needs_of(where: str, function: Call) -> dict[str, Dependency]:
    """The parameters of a task's body that are dependencies.

    Raises ConfigurationError, which begins with `where`, for one that needs a request.
    """
    needs = {}
    for name, parameter in signature_of(function).parameters.items():
        here = f"{where}, parameter {name!r}"
        if (marker := _marker(parameter)) is not None:
            needs[name] = _asked(here, parameter, marker)
        elif parameter.default is injected:
            raise ConfigurationError(f"{here}: expected Annotated[…, Depends(…)] beside injected")
    return needs


def dependency(where: str, call: Call, *, use_cache: bool = True) -> Dependency:
    """What `call` is, and asks for."""
    needs: dict[str, Dependency] = {}
    fields: dict[str, FieldInfo] = {}
    for name, parameter in signature_of(call).parameters.items():
        if (marker := _marker(parameter)) is not None:
            needs[name] = _asked(where, parameter, marker)
        elif parameter.kind not in _VARIADIC:
            if _needs_request(parameter):
                raise ConfigurationError(
                    f"{where}: its dependency {_name(call)} has a parameter {name!r} that comes "
                    "from a request, and a task has none"
                )
            if isinstance(parameter.default, FieldInfo):
                fields[name] = parameter.default
    return Dependency(call, _kind(call), use_cache, needs, fields)


def _marker(parameter: inspect.Parameter) -> Any:
    """FastAPI's `Depends` of a parameter; in `Annotated` the last one counts."""
    metadata = getattr(_unaliased(parameter.annotation), "__metadata__", ())
    for each in (parameter.default, *reversed(metadata)):
        if hasattr(each, "dependency") and hasattr(each, "use_cache"):
            return each
    return None


def _asked(where: str, parameter: inspect.Parameter, marker: Any) -> Dependency:
    if getattr(marker, "max_concurrency", None) is not None:
        raise ConfigurationError(f"{where}: tasks do not keep the max_concurrency of a dependency")
    call = marker.dependency or _type_of(parameter)
    return dependency(where, call, use_cache=marker.use_cache)


def _unaliased(annotation: Any) -> Any:
    return getattr(annotation, "__value__", annotation)  # of `type SessionDep = Annotated[…]`


def _type_of(parameter: inspect.Parameter) -> Any:
    annotation = _unaliased(parameter.annotation)
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def _needs_request(parameter: inspect.Parameter) -> bool:
    if any(
        base.__name__ in _OF_A_REQUEST and base.__module__.startswith(("fastapi.", "starlette."))
        for base in getattr(_type_of(parameter), "__mro__", ())
    ):
        return True
    if isinstance(parameter.default, FieldInfo):  # Query(), Header() and the like
        return parameter.default.is_required()
    return parameter.default is parameter.empty


def _name(call: Call) -> str:
    return f"{call.__module__}.{call.__qualname__}" if hasattr(call, "__qualname__") else repr(call)


def _kind(call: Call) -> str:
    while isinstance(call, partial):
        call = call.func
    looked_at: list[Any] = [call, inspect.unwrap(call)]
    if not inspect.isclass(looked_at[-1]):
        looked_at.append(looked_at[-1].__call__)
    return next((kind for kind, fits in _KINDS.items() if any(map(fits, looked_at))), "function")
