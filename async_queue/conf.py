"""The one setting, ``ASYNC_QUEUE``: a dict, read once into a frozen dataclass.

Everybody may read it. An unknown key or a wrong value is an error with the remedy,
raised where the settings are first needed and listed whole by the system checks.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Problem(NamedTuple):
    """What is wrong with the setting, and the remedy."""

    key: str | None
    message: str
    hint: str


def parse_duration(value: Any) -> timedelta:
    """Return seconds, a timedelta or text such as ``"90s"`` or ``"7d"`` as a timedelta.

    Raises ValueError for anything else and for negative durations.
    """
    try:
        duration = _as_timedelta(value)
    except OverflowError:
        raise ValueError("must not be longer than a timedelta can be") from None
    if duration < timedelta(0):
        raise ValueError("must not be negative")
    return duration


def _as_timedelta(value: Any) -> timedelta:
    if isinstance(value, timedelta):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return timedelta(seconds=value)
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)([smhdw])", value)):
        return timedelta(**{_UNITS[match[2]]: int(match[1])})
    raise ValueError('must be seconds, a timedelta or text such as "7d"')


def _optional_duration(value: Any) -> timedelta | None:
    return None if value is None else parse_duration(value)


def _positive_duration(value: Any) -> timedelta:
    if not (duration := parse_duration(value)):
        raise ValueError("must not be 0")
    return duration


def _timeout(value: Any) -> timedelta | None:
    return None if value is None else _positive_duration(value)


def _positive(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("must be a whole number of at least 1")
    return value


def _optional_positive(value: Any) -> int | None:
    return None if value is None else _positive(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be True or False")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a string that is not empty")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise ValueError("must be a list of strings")
    return tuple(_text(item) for item in value)


def _keys(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, (set, frozenset)):
        raise ValueError("must be a string or a list of them, the first of which seals")
    return (_text(value),) if isinstance(value, str) else _texts(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("must be a dict")
    return dict(value)


def _merged(defaults: dict[str, Any], parse: Callable[[str, Any], Any]) -> Any:
    """Return a parser of dicts that may override some of the ``defaults``."""

    def merge(value: Any) -> Mapping[str, Any]:
        given = _mapping(value)
        if unknown := [key for key in given if key not in defaults]:
            raise ValueError(
                f"has no key {unknown[0]!r}; its keys are {', '.join(defaults)}"
            )
        return defaults | {key: parse(key, item) for key, item in given.items()}

    return merge


def _retention(key: str, value: Any) -> timedelta | None:
    return _optional_duration(value)


def _health(key: str, value: Any) -> Any:
    if key == "MAX_LATENCY":
        return parse_duration(value)
    return None if value is None else _text(value)


_RETENTION = {
    "successful": timedelta(days=7),
    "cancelled": timedelta(days=7),
    "failed": timedelta(days=30),
}
_HEALTH = {"MAX_LATENCY": timedelta(seconds=300), "TOKEN": None}


def _setting(default: Any, parse: Callable[[Any], Any]) -> Any:
    return dataclasses.field(
        default_factory=lambda: default, metadata={"parse": parse, "default": default}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings with their defaults; each key is the field's name in capitals."""

    # The alias of the database that holds the jobs: the one with the project's data.
    database: str = _setting("default", _text)
    # Jobs that one process runs at a time.
    threads: int = _setting(4, _positive)
    # Worker processes under one `run_workers`.
    processes: int = _setting(1, _positive)
    # The longest pause between two looks for work.
    poll_interval: timedelta = _setting(timedelta(seconds=1), _positive_duration)
    # Wake idle workers by LISTEN and NOTIFY on PostgreSQL.
    notify: bool = _setting(True, _flag)
    # A worker whose heart has stood still for this long has stalled.
    stall_after: timedelta = _setting(timedelta(seconds=30), _positive_duration)
    # How long running jobs may go on after the process was asked to stop.
    shutdown_timeout: timedelta = _setting(timedelta(seconds=25), parse_duration)
    # Runs of a job, the first included, before it is FAILED; None is without end.
    max_attempts: int | None = _setting(5, _optional_positive)
    # Processes that a job may take down with it before it is FAILED.
    max_crashes: int = _setting(3, _positive)
    # A named backoff, or the dotted path of a function (failures) -> timedelta.
    backoff: str = _setting("exponential", _text)
    # How long a job may run; None is without end.
    timeout: timedelta | None = _setting(None, _timeout)
    # How long finished jobs are kept; None is for ever.
    retention: Mapping[str, timedelta | None] = _setting(
        _RETENTION, _merged(_RETENTION, _retention)
    )
    # Periodic jobs by name.
    schedules: Mapping[str, Any] = _setting({}, _mapping)
    # The key, or keys (the first one seals), instead of SECRET_KEY and its fallbacks.
    seal_key: tuple[str, ...] = _setting((), _keys)
    # Paths of @job functions whose rows other programs may insert without a seal.
    unsealed: tuple[str, ...] = _setting((), _texts)
    # Arguments whose names contain one of these are never shown.
    redact: tuple[str, ...] = _setting(
        ("password", "token", "secret", "authorization"), _texts
    )
    # Write the arguments of jobs to the log.
    log_args: bool = _setting(False, _flag)
    # Oldest ready job that still passes, and the bearer token of the health page.
    health: Mapping[str, Any] = _setting(_HEALTH, _merged(_HEALTH, _health))
    # Options of the queued mail backend.
    email: Mapping[str, Any] = _setting({}, _mapping)
    # Run a worker inside the web server's process.
    in_process: bool = _setting(False, _flag)


# A worker may miss a beat without being taken for one that has stalled.
_BEATS = 3
_FIELDS = {field.name.upper(): field for field in dataclasses.fields(Settings)}
# Their values hold keys and tokens, so no message repeats them.
_SECRET = ("SEAL_KEY", "HEALTH", "EMAIL")
KEYS = tuple(_FIELDS)


@lru_cache(maxsize=1)
def settings() -> Settings:
    """Return the project's settings.

    Raises ImproperlyConfigured with the first problem that `problems` would list.
    """
    raw = getattr(django_settings, "ASYNC_QUEUE", {})
    for problem in problems(raw):
        raise ImproperlyConfigured(f"{problem.message} {problem.hint}")
    return Settings(**{key.lower(): _parse(key, value) for key, value in raw.items()})


def problems(raw: Any) -> Iterator[Problem]:
    """Yield everything that is wrong with ``raw``, the value of ``ASYNC_QUEUE``."""
    if not isinstance(raw, dict):
        yield Problem(None, "ASYNC_QUEUE is not a dict.", "Write ASYNC_QUEUE = {...}.")
        return
    parsed = {key: field.metadata["default"] for key, field in _FIELDS.items()}
    for key, value in raw.items():
        if key not in _FIELDS:
            yield Problem(key, f"ASYNC_QUEUE has no setting {key!r}.", _suggest(key))
            continue
        try:
            parsed[key] = _parse(key, value)
        except ValueError as error:
            default = _FIELDS[key].metadata["default"]
            yield Problem(
                key,
                f"ASYNC_QUEUE[{key!r}] {error}; it is {_shown(key, value)}.",
                f"The default is {default!r}.",
            )
    yield from _unfit_together(parsed)


def _unfit_together(parsed: Mapping[str, Any]) -> Iterator[Problem]:
    interval, limit = parsed["POLL_INTERVAL"], parsed["STALL_AFTER"]
    if _BEATS * interval > limit:
        yield Problem(
            "STALL_AFTER",
            f"ASYNC_QUEUE['STALL_AFTER'] is {limit.total_seconds():g} s and "
            f"ASYNC_QUEUE['POLL_INTERVAL'], after which a worker's heart beats again, "
            f"is {interval.total_seconds():g} s: a worker that is well might be taken "
            "for one that has stalled.",
            f"Let STALL_AFTER be at least {_BEATS} times as long.",
        )


def changed_settings() -> set[str]:
    """Return the names of the settings that the project gives itself."""
    return set(getattr(django_settings, "ASYNC_QUEUE", {}))


def _parse(key: str, value: Any) -> Any:
    return _FIELDS[key].metadata["parse"](value)


def _shown(key: str, value: Any) -> str:
    return f"a {type(value).__name__}" if key in _SECRET else repr(value)


def _suggest(key: Any) -> str:
    close = difflib.get_close_matches(str(key).upper(), _FIELDS, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"The settings are {', '.join(_FIELDS)}."


def _forget(*, setting: str, **kwargs: Any) -> None:
    if setting == "ASYNC_QUEUE":
        settings.cache_clear()


setting_changed.connect(_forget)
