"""What is written in a callable's signature, as far as it can be read."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import celery
from celery.utils.functional import head_from_fun


def signature_of(call: Callable[..., Any], *, follow_wrapped: bool = True) -> inspect.Signature:
    """Of `call`, with the annotations that are text evaluated, but for names that are not there.

    Those are imported for type checkers only, or defined later. Empty for what has none, as some
    builtins.
    """
    try:
        signature = _unevaluated(call, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):
        return inspect.Signature()
    names = _names_around(call)
    return signature.replace(
        parameters=[
            each.replace(annotation=_evaluated(each.annotation, names))
            for each in signature.parameters.values()
        ],
        return_annotation=_evaluated(signature.return_annotation, names),
    )


def set_header(task: celery.Task, signature: inspect.Signature) -> None:
    """Have Celery check the arguments of calls against `signature`."""

    def head() -> None: ...

    head.__name__, vars(head)["__signature__"] = type(task).__name__, signature
    if hasattr(task, "__header__"):  # or it is made of a class, whose calls are not checked
        task.__header__ = head_from_fun(head)


def _unevaluated(call: Callable[..., Any], **options: Any) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        options["annotation_format"] = Format.FORWARDREF
    return inspect.signature(call, **options)


def _names_around(call: Any) -> dict[str, Any]:
    """What the text of an annotation of `call` may name."""
    while isinstance(call, partial):
        call = call.func
    call = inspect.unwrap(call)
    if inspect.isclass(call):
        call = call.__init__
    elif not inspect.isroutine(call):
        call = type(call).__call__
    names: dict[str, Any] = getattr(call, "__globals__", {})
    return names


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    if isinstance(annotation, str):
        try:
            return eval(annotation, names)  # noqa: S307 (the module's own, as Python would)
        except Exception:
            return annotation
    return annotation
