"""Functions and their dotted paths, there and back, and the registry of ``@job``.

Knows nothing of rows: whoever calls `resolve` has made sure that the path is
trusted.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import MethodType
from typing import Any

from async_queue.exceptions import (
    FunctionUnavailable,
    InvalidArguments,
    InvalidFunction,
)

MAX_PATH = 255


@dataclass(frozen=True, slots=True)
class Registration:
    """What ``@job`` says of a function: where its jobs go and how they are run."""

    function: Callable[..., Any]
    queue: str
    priority: int
    meta: Mapping[str, Any]


registry: dict[str, Registration] = {}


def path_of(function: Callable[..., Any] | str) -> str:
    """Return the dotted path by which a worker finds ``function`` again.

    A path is checked by importing it. Raises InvalidFunction with the reason.
    """
    # Of a member of an enumeration, its value.
    path = (
        str.__str__(function) if isinstance(function, str) else written_path(function)
    )
    if len(path) > MAX_PATH:
        raise InvalidFunction(f"function {path!r} has more than {MAX_PATH} characters.")
    try:
        found = resolve(path)
    except FunctionUnavailable as error:
        raise InvalidFunction(f"function {error}") from error
    if not isinstance(function, str) and _plain(found) != _plain(function):
        raise InvalidFunction(
            f"function {path!r} names something else now: {found!r}. Schedule it by "
            "the path under which it can be imported."
        )
    return path


@lru_cache(maxsize=4096)
def resolve(path: str) -> Callable[..., Any]:
    """Return the function, or static or class method, that ``path`` names.

    Raises FunctionUnavailable if it cannot be imported or is something else.
    """
    names = path.split(".")
    if not all(name.isidentifier() for name in names) or len(names) < 2:
        raise FunctionUnavailable(
            f"{path!r} is not a dotted path such as 'shop.tasks.send_receipt'."
        )
    if any(name.startswith("__") for name in names):
        raise FunctionUnavailable(f"{path!r} names something private to Python.")
    found = _walk(path, names)
    target = _plain(found)
    if inspect.isclass(target) or not inspect.isroutine(target):
        raise FunctionUnavailable(
            f"{path!r} is {_article(target)}: schedule a module's function, or a "
            "static or class method."
        )
    return target


def find_class(path: str) -> type | None:
    """Return the class of this dotted path, or this bare builtin; None without one."""
    names = path.split(".") if "." in path else ["builtins", path]
    try:
        found = _walk(path, names)
    except FunctionUnavailable:
        return None
    return found if inspect.isclass(found) else None


def check_arguments(path: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Return if the function takes these arguments; raise InvalidArguments if not."""
    signature = _signature(path)
    if signature is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InvalidArguments(
            f"{path}{signature} does not take these arguments: {error}."
        ) from None


@lru_cache(maxsize=4096)
def _signature(path: str) -> inspect.Signature | None:
    try:
        return inspect.signature(resolve(path))
    except (ValueError, TypeError):  # some functions written in C do not tell
        return None


def written_path(function: Callable[..., Any]) -> str:
    """Return where ``function`` was defined; raise InvalidFunction if in no module."""
    function = _plain(function)
    name = getattr(function, "__qualname__", "")
    if not inspect.isroutine(function):
        raise InvalidFunction(
            f"function is {function!r}, {_article(function)}: pass a module's "
            "function, a static or class method, or a dotted path."
        )
    if "<lambda>" in name or "<locals>" in name:
        raise InvalidFunction(
            f"function {name!r} lives inside another function or is a lambda, so no "
            "worker can import it: define it at the top of a module."
        )
    module: str | None = function.__module__
    if isinstance(function, MethodType):
        owner = function.__self__
        if not inspect.isclass(owner):
            raise InvalidFunction(
                f"function {name!r} is bound to an instance: schedule a function and "
                "pass it the instance's primary key."
            )
        module, name = owner.__module__, f"{owner.__qualname__}.{function.__name__}"
    if module == "__main__":
        raise InvalidFunction(
            f"function {name!r} is defined in __main__, which no worker can import: "
            "move it to a module."
        )
    return f"{module}.{name}"


def _walk(path: str, names: list[str]) -> Any:
    """Import as many of ``names`` as are modules, then follow the attributes."""
    found: Any = _import(path, names[0])
    for position, name in enumerate(names[1:], start=2):
        if _is_package(found) and not hasattr(found, name):
            found = _import(path, ".".join(names[:position]))
            continue
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise FunctionUnavailable(f"{path!r} does not exist: {error}.") from error
    return found


def _is_package(found: Any) -> bool:
    return inspect.ismodule(found) and hasattr(found, "__path__")


def _import(path: str, module: str) -> Any:
    try:
        return import_module(module)
    # A module may raise anything while it is imported, also SyntaxError.
    except Exception as error:
        raise FunctionUnavailable(
            f"{path!r} cannot be imported: {type(error).__name__}: {error}."
        ) from error


def _plain(function: Any) -> Any:
    """Return the function of a ``@job``, and anything else as it is."""
    registration = getattr(function, "registration", None)
    return registration.function if isinstance(registration, Registration) else function


def _article(thing: Any) -> str:
    return "a class" if inspect.isclass(thing) else f"a {type(thing).__name__}"
