"""A call as people read it: on one line, with its secrets hidden.

For logs, commands and the admin, also of rows that nobody has verified: it imports
nothing.
"""

import inspect
from typing import Any

from async_queue import callables, codec, conf
from async_queue.exceptions import CorruptArguments


def call_form(function: str, args: str, kwargs: str) -> str:
    """Return the call as it would be written: ``shop.pay(3, to=4)``.

    What stands under a name that ASYNC_QUEUE["REDACT"] hides is left out: the name of a
    keyword, of a key inside of an argument or, of functions with ``@job`` that this
    process has imported, of a parameter.
    """
    name = printable(function)
    try:
        shown = _positional(function, codec.decode(args))
        named = _redacted(codec.decode(kwargs))
        shown += [f"{printable(key)}={value!r}" for key, value in named.items()]
    except (CorruptArguments, AttributeError, TypeError):
        return f"{name}(?)"
    return f"{name}({', '.join(shown)})"


def printable(text: Any) -> str:
    """Return ``text`` with what would break a line or command a terminal escaped."""
    shown = str(text)
    return shown if shown.isprintable() else ascii(shown)[1:-1]


def _positional(function: str, values: list[Any]) -> list[str]:
    names = _parameters(function) + [""] * len(values)
    return [
        repr(_HIDDEN if _is_secret(name) else _redacted(value))
        for name, value in zip(names, values, strict=False)
    ]


def _parameters(function: str) -> list[str]:
    registration = callables.registry.get(function)
    if registration is None:
        return []
    return list(inspect.signature(registration.function).parameters)


def _redacted(value: Any) -> Any:
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _HIDDEN if _is_secret(key) else _redacted(item)
        for key, item in value.items()
    }


def _is_secret(name: str) -> bool:
    return any(word.lower() in name.lower() for word in conf.settings().redact)


class _Hidden:
    def __repr__(self) -> str:
        return "***"


_HIDDEN = _Hidden()
