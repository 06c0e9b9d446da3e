"""What the commands that run jobs share: their options, signals and log."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Protocol, TextIO

from django.core.management.base import CommandError, OutputWrapper
from django.db import connections

from async_queue import conf

logger = logging.getLogger("async_queue")

# Seconds to give back what runs, after a second signal, before the process ends.
GRACE = 2.0


def checked_alias(given: str | None) -> str:
    """Return the alias of the database that holds the queue."""
    alias = given or conf.settings().database
    if alias not in connections:
        known = ", ".join(connections)
        raise CommandError(f"--database is {alias!r}: the databases are {known}")
    return str(alias)


def check_counts(options: dict[str, Any], *names: str) -> None:
    """Refuse an option that is given and less than 1."""
    for name in names:
        if (count := options[name]) is not None and count < 1:
            option = name.replace("_", "-")
            raise CommandError(f"--{option} is {count}: it must be at least 1")


def queue_names(given: str | list[str] | None, option: str) -> tuple[str, ...]:
    """Return the names, each once, of lists that are separated by commas."""
    lists = [given] if isinstance(given, str) else given or []
    names = [name.strip() for names in lists for name in names.split(",")]
    if "" in names:
        raise CommandError(f"{option} is {','.join(lists)!r}: a name is empty")
    return tuple(dict.fromkeys(names))


def duration(given: Any, option: str) -> timedelta | None:
    """Return seconds, or text such as "50s" or "5m", as a timedelta."""
    if given is None:
        return None
    try:
        seconds = float(given)
    except (TypeError, ValueError):
        seconds = given
    try:
        return conf.parse_duration(seconds)
    except (ValueError, OverflowError) as error:
        raise CommandError(f"{option} is {given!r}: it {error}") from error


@contextmanager
def logged(
    stream: OutputWrapper | TextIO,
    level: int = logging.WARNING,
    *,
    with_jobs: bool = False,
) -> Iterator[None]:
    """Write the queue's log to the stream, unless the project has arranged for it.

    The lines about single jobs are written only ``with_jobs``, and all then begin with
    the time.
    """
    # Without handlers, `logging` itself would print warnings and tracebacks.
    if logger.hasHandlers():
        yield
        return
    handler = logging.StreamHandler(stream)
    handler.setLevel(level)
    if with_jobs:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    else:
        handler.addFilter(lambda record: not hasattr(record, "job"))
    former = logger.level
    # A project that wants less has said so.
    if former == logging.NOTSET and level < logger.getEffectiveLevel():
        logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(former)


def log_shown(
    stream: OutputWrapper | TextIO, verbosity: int
) -> AbstractContextManager[None]:
    """Write the queue's log to the stream, with the lines of single jobs."""
    level = {0: logging.ERROR, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    return logged(stream, level, with_jobs=True)


class Stoppable(Protocol):
    """What runs jobs until it is stopped, from any thread or a signal's handler."""

    def stop(self, *, at_once: bool = False) -> None: ...


@contextmanager
def stopped_by_signals(
    running: Stoppable, grace: float = GRACE, patience: float | None = None
) -> Iterator[list[int]]:
    """Let SIGINT and SIGTERM stop what runs and a second one end it; yield which came.

    The process ends ``patience`` seconds after the first at the latest, and ``grace``
    seconds after the second. Only the main thread can be told of signals.
    """
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        running.stop(at_once=len(received) > 1)
        if len(received) > 1:
            _end_soon(128 + received[0], grace)
        else:
            if patience is not None:
                _end_soon(128 + number, patience)
            said = f"{signal.Signals(number).name}: what runs will finish; the next "
            # Not through a stream, which may be in the middle of a line of ours.
            os.write(2, f"{said}signal ends it\n".encode())

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    former = {sig: signal.signal(sig, stop) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def end_if_forced(signals: list[int], stderr: OutputWrapper) -> None:
    """End the process if two signals came: Python would wait for its threads."""
    if len(signals) > 1:
        stderr.write(f"ended by {signal.Signals(signals[0]).name}")
        stderr.flush()
        os._exit(128 + signals[0])


def _end_soon(code: int, seconds: float) -> None:
    """End the process even if nothing can be given back, as behind SQLite's writer."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(code))
        signal.setitimer(signal.ITIMER_REAL, seconds)


def end_later(code: int, seconds: float) -> None:
    """End the process in so many seconds, whatever its threads then do."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
