"""Typed arguments and results, for tasks that are made with Celery's own option `pydantic=True`.

Celery validates and dumps parameters that are models. Here whatever is annotated is: a wrong
argument is an error of the caller, the body has real types, and so has who awaits its result.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from functools import cached_property
from types import MethodType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from uuid import UUID

import celery
from celery import Celery
from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import to_json

from celeriac.errors import ArgumentError
from celeriac.signatures import set_header, signature_of

# What kombu's JSON carries by itself, and every worker and reader understands.
_NATIVE = (
    Any, bool, bytes, date, datetime, Decimal, dict, float, int, list, None, object, str, time,
    type(None), UUID,
)  # fmt: skip
_UNTYPED = (None, type(None), inspect.Parameter.empty, Any, object)


def arguments_of(task: celery.Task, run: Callable[..., Any]) -> "Arguments | None":
    """The types of `task`, whose body Celery has as `run`; None without `pydantic=True`."""
    return Arguments(task, run) if hasattr(run, "dump_arguments") else None


def typed_result(app: Celery | None, name: str | None, result: Any) -> Any:
    """The `result` of a task as its annotation says, if the task is known here and typed."""
    task = None if app is None else app.tasks.get(name)
    arguments: Arguments | None = getattr(task, "celeriac_arguments", None)
    return result if arguments is None else arguments.load_result(result)


class Arguments:
    """The types of one task's arguments and of its result."""

    left_out: Collection[str] = ()  # parameters that no caller gives

    def __init__(self, task: celery.Task, run: Callable[..., Any]) -> None:
        wrapper: Any = getattr(run, "__func__", run)  # Celery's, around the function
        self._function: Callable[..., Any] = wrapper.__wrapped__
        self.body = MethodType(self._function, task) if inspect.ismethod(run) else self._function
        self._name = task.name
        set_header(task, signature_of(self.body))  # Celery's is that of its wrapper, of anything
        # Celery's further options, which it keeps to its wrapper.
        given = dict(inspect.getclosurevars(wrapper).nonlocals)
        given |= inspect.getclosurevars(given["validate_argument"]).nonlocals
        self._dump_options: dict[str, Any] = given["dump_kwargs"]
        self._strict: bool = given["strict"]
        self._context = {**given["context"], "celery_app": task.app, "celery_task_name": task.name}

    @cached_property
    def _annotations(self) -> Mapping[str, Any]:
        with suppress(Exception):  # as of a name that only type checkers import
            return get_type_hints(self._function, include_extras=True)
        signature = signature_of(self._function)
        found = {name: each.annotation for name, each in signature.parameters.items()}
        return {**found, "return": signature.return_annotation}

    @cached_property
    def _positions(self) -> list[str]:
        parameters = signature_of(self.body).parameters.values()
        return [
            each.name
            for each in parameters
            if each.kind < each.VAR_POSITIONAL
            and not (each.name in self.left_out and each.default is each.empty)
        ]

    @cached_property
    def _types(self) -> dict[str, TypeAdapter[Any]]:
        """Of the arguments, where pydantic knows them."""
        found = {
            name: _adapter(self._annotations.get(name))
            for name, each in signature_of(self.body).parameters.items()
            if name not in self.left_out
            and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        }
        return {name: adapter for name, adapter in found.items() if adapter is not None}

    @cached_property
    def _result(self) -> TypeAdapter[Any] | None:
        return _adapter(self._annotations.get("return"))

    def load(
        self, args: Iterable[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a body is called with, from what a message has. Raises ArgumentError."""
        return self._replaced(args, kwargs, self._validated(args, kwargs, received=True))

    def dump(self, args: Any, kwargs: Any, *, passed_on: bool = False) -> tuple[Any, Any]:
        """What a message has, from what a caller gives. Raises ArgumentError.

        What a worker passes on, such as a result in a chain, is for the next one to refuse.
        """
        if not isinstance(args or (), list | tuple) or not isinstance(kwargs or {}, Mapping):
            return args, kwargs  # for Celery to refuse
        args, kwargs = args or (), kwargs or {}
        try:
            values = self._validated(args, kwargs, received=False)
        except ArgumentError:
            if passed_on:
                return args, kwargs
            raise
        return self._replaced(
            args, kwargs, {name: self._dumped(name, value) for name, value in values.items()}
        )

    def _dumped(self, name: str, value: Any) -> Any:
        if _is_native(self._annotations[name]):
            return value
        adapter = self._types[name]
        # As Celery with models: what would not arrive as it is is left to the serializer, which
        # has a way for it or refuses it.
        with suppress(Exception):
            dumped = adapter.dump_python(value, **self._dump_options)
            if self._valid(adapter, dumped, received=True) == value:
                return dumped
        return value

    def dump_result(self, result: Any) -> Any:
        """What is stored of a body's `result`."""
        if isinstance(result, BaseModel):
            return result.model_dump(**self._dump_options)
        if self._result is None or _is_native(self._annotations["return"]):
            return result
        with suppress(ValueError):  # as of bytes that are no text
            return self._result.dump_python(result, **{"warnings": False, **self._dump_options})
        return result

    def load_result(self, result: Any) -> Any:
        """The result from what is stored; None is what ignores it. Raises ValidationError."""
        if self._result is None or result is None:
            return result
        return self._valid(self._result, result, received=True)

    def _validated(
        self, args: Iterable[Any], kwargs: Mapping[str, Any], *, received: bool
    ) -> dict[str, Any]:
        validated: dict[str, Any] = {}
        wrong: list[str] = []
        for name, value in {**dict(zip(self._positions, args, strict=False)), **kwargs}.items():
            if (adapter := self._types.get(name)) is not None:
                try:
                    validated[name] = self._valid(adapter, value, received=received)
                except ValidationError as error:
                    wrong += _told(name, error)
        if wrong:
            raise ArgumentError(f"task {self._name}: {'; '.join(wrong)}")
        return validated

    def _replaced(
        self, args: Iterable[Any], kwargs: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(args)
        names = [*self._positions[: len(args)], *[""] * (len(args) - len(self._positions))]
        return (
            tuple(values.get(name, value) for name, value in zip(names, args, strict=True)),
            {name: values.get(name, value) for name, value in kwargs.items()},
        )

    def _valid(self, adapter: TypeAdapter[Any], value: Any, *, received: bool) -> Any:
        # Types may be strict by themselves, with a caller and not with what was JSON.
        strict = self._strict or (False if received else None)
        try:
            return adapter.validate_python(value, strict=strict, context=self._context)
        except ValidationError:
            if not (received and strict):
                raise
        return adapter.validate_json(to_json(value), strict=strict, context=self._context)


def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    if annotation in _UNTYPED or isinstance(annotation, str):
        return None
    with suppress(PydanticUserError, NameError, TypeError):  # somebody's class, as of a Session
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        return adapter if adapter.pydantic_complete else None
    return None


def _is_native(annotation: Any) -> bool:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType, list):
        return all(map(_is_native, parts))
    if origin is dict:
        return parts[0] in (str, Any) and _is_native(parts[1])
    return any(annotation is each for each in _NATIVE)


def _told(name: str, error: ValidationError) -> list[str]:
    """What is wrong, and where; not the values, which nobody else need see.

    In plain text, which a result backend can keep, other than pydantic's error.
    """
    return [
        f"{'.'.join(map(str, (name, *each['loc'])))}: {each['msg']}"
        for each in error.errors(include_url=False, include_context=False, include_input=False)
    ]
