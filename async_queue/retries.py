"""Whether and when a job that failed is tried again: a policy, and pure arithmetic.

A backoff is a function (failures so far, at least 1) -> timedelta, or its name. The
policy of a job comes from the settings, its ``@job`` and its meta, in that order.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import NoneType
from typing import Any

from async_queue import conf
from async_queue.callables import find_class, path_of, resolve
from async_queue.exceptions import (
    CorruptArguments,
    FunctionUnavailable,
    InvalidFunction,
    InvalidOption,
)

Backoff = Callable[[int], timedelta]


@dataclass(frozen=True, slots=True)
class Policy:
    """How a job is tried; each field is a key of meta and of ``@job``."""

    # Runs, the first included; None is without end.
    max_attempts: int | None
    # A name of NAMED or the dotted path of a backoff.
    backoff: str
    # Classes of errors that cancel the job at once, as dotted paths.
    discard_on: tuple[str, ...] = ()
    # If given, other errors than these fail the job at once.
    retry_on: tuple[str, ...] = ()
    # A job that was not started within this time of its run_after is cancelled.
    expires_after: timedelta | None = None
    # A run that takes longer is ended and counts as failed; None is without end.
    timeout: timedelta | None = None
    # Whether the function runs in one transaction with the record that it ran. False
    # is for what should hold none: it may then be done more than once.
    atomic: bool = True


def policy(*metas: Mapping[str, Any]) -> Policy:
    """Return the policy of a job with these metas; later ones override.

    A key that only a newer version knows is left to it. Raises CorruptArguments for
    values that no version wrote.
    """
    settings = conf.settings()
    if not any(metas):
        return _usual.of(settings)
    merged: dict[str, Any] = {
        "max_attempts": settings.max_attempts,
        "backoff": settings.backoff,
        "timeout": settings.timeout,
    }
    for meta in metas:
        merged |= {key: meta[key] for key in meta.keys() & _CHECKS.keys()}
    for key, value in merged.items():
        if not isinstance(value, _KINDS[key]):
            raise CorruptArguments(f"meta[{key!r}] cannot be {value!r}")
    return Policy(**merged)


class _Usual:
    """The policy of a job without metas; made anew when the settings change."""

    settings: conf.Settings | None = None
    policy: Policy

    def of(self, settings: conf.Settings) -> Policy:
        if self.settings is not settings:
            self.policy = Policy(
                settings.max_attempts, settings.backoff, timeout=settings.timeout
            )
            self.settings = settings
        return self.policy


_usual = _Usual()


def checked_meta(meta: Mapping[str, Any], name: str = "meta") -> dict[str, Any]:
    """Return ``meta`` as it is stored; raise InvalidOption naming what is wrong."""
    checked = {}
    for key, value in meta.items():
        if key not in _CHECKS:
            known = ", ".join(_CHECKS)
            raise InvalidOption(f"{name} has no key {key!r}; its keys are {known}.")
        try:
            checked[key] = _CHECKS[key](value)
        except ValueError as error:
            raise InvalidOption(f"{name}[{key!r}] {error}; it is {value!r}.") from error
    return checked


def check_classes(meta: Mapping[str, Any]) -> None:
    """Return if the exceptions that ``meta`` names exist; raise InvalidOption if not.

    For whoever writes a meta: a worker imports nothing because a row names it.
    """
    for key in ("discard_on", "retry_on"):
        for path in meta.get(key, ()):
            kind = find_class(path)
            if kind is None or not issubclass(kind, BaseException):
                raise InvalidOption(
                    f"meta[{key!r}] names {path!r}, which is no exception."
                )


def _attempts(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError("must be a whole number of at least 1, or None for no end")
    return value


def _backoff_name(value: Any) -> str:
    if isinstance(value, str) and value in NAMED:
        return value
    try:
        return path_of(value)
    except (InvalidFunction, TypeError) as error:
        names = ", ".join(NAMED)
        reason = str(error).rstrip(".")
        raise ValueError(f"is none of {names}, nor a function: {reason}") from error


def _class_paths(value: Any) -> list[str]:
    kinds = [value] if isinstance(value, (str, type)) else value
    try:
        return [kind if isinstance(kind, str) else class_path(kind) for kind in kinds]
    except (TypeError, AttributeError) as error:
        raise ValueError("must be exception classes or their dotted paths") from error


def _duration(value: Any) -> timedelta | None:
    return None if value is None else conf.parse_duration(value)


def _timeout(value: Any) -> timedelta | None:
    duration = _duration(value)
    if duration is not None and not duration:
        raise ValueError("must be longer than nothing, or None for no end")
    return duration


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be True or False")
    return value


_CAP = timedelta(hours=1)
# Beyond this doubling would only meet the cap, or overflow.
_MAX_DOUBLINGS = 32


def exponential(failures: int) -> timedelta:
    """Return a random wait of up to 5, 10, 20 ... seconds, at most an hour.

    The full jitter spreads jobs that failed together. Source: M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    longest = min(timedelta(seconds=5 * 2 ** min(failures - 1, _MAX_DOUBLINGS)), _CAP)
    return max(longest * random.random(), timedelta(seconds=1))


def linear(failures: int) -> timedelta:
    """Return one minute more for each failure, at most an hour."""
    return min(timedelta(minutes=failures), _CAP)


def constant(failures: int) -> timedelta:
    """Return one minute."""
    return timedelta(minutes=1)


def ancestor(failures: int) -> timedelta:
    """Return 60 x failures ** 1.6 seconds, as django-async did."""
    return timedelta(seconds=60 * min(failures, 10_000) ** 1.6)


# The ancestor also lets a job fall back behind others each time it fails.
FALLING_PRIORITY = "ancestor"

DEFAULT = "exponential"
NAMED: dict[str, Backoff] = {
    "exponential": exponential,
    "linear": linear,
    "constant": constant,
    "ancestor": ancestor,
}


def backoff(name: str) -> Backoff:
    """Return the backoff called ``name``, or the function of that dotted path.

    Raises InvalidOption for a name that is neither; so does a function that returns
    no timedelta.
    """
    if name in NAMED:
        return NAMED[name]
    try:
        function = resolve(name)
    except FunctionUnavailable as error:
        raise InvalidOption(
            f"backoff {name!r} is none of {', '.join(NAMED)}, nor a function: {error}"
        ) from error
    return partial(_checked_wait, name, function)


def _checked_wait(name: str, function: Backoff, failures: int) -> timedelta:
    wait: object = function(failures)
    if not isinstance(wait, timedelta):
        raise InvalidOption(f"backoff {name!r} returned {wait!r}: return a timedelta.")
    return wait


_KINDS: dict[str, tuple[type, ...]] = {
    "max_attempts": (int, NoneType),
    "backoff": (str,),
    "discard_on": (list, tuple),
    "retry_on": (list, tuple),
    "expires_after": (timedelta, NoneType),
    "timeout": (timedelta, NoneType),
    "atomic": (bool,),
}
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "max_attempts": _attempts,
    "backoff": _backoff_name,
    "discard_on": _class_paths,
    "retry_on": _class_paths,
    "expires_after": _duration,
    "timeout": _timeout,
    "atomic": _flag,
}
KEYS = tuple(_CHECKS)


def deferral(deferrals: int) -> timedelta:
    """Return how long a job that this process cannot run (yet) is put aside."""
    return min(timedelta(seconds=5 * 2 ** min(deferrals, 10)), timedelta(minutes=15))


def is_named(error: BaseException, names: Iterable[str]) -> bool:
    """Tell whether ``error`` is of a class with one of the dotted ``names``.

    Compares text: nothing is imported because a row names it. A class counts by the
    path of its definition, or bare if it is a builtin.
    """
    wanted = set(names)
    return any(
        class_path(kind) in wanted or f"{kind.__module__}.{kind.__qualname__}" in wanted
        for kind in type(error).__mro__
    )


def class_path(kind: type) -> str:
    """Return the dotted path of a class; builtins are bare."""
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"
