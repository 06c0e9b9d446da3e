"""Threads that close the database connections they open.

`Thread` and `ThreadPoolExecutor` are the standard library's, with its parameters and
behaviour, for code that uses Django's connections. Each thread looks after its own
connections and no other; the caller's context variables go along. Job workers use them.
"""

import logging
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import thread as standard
from contextvars import Context, copy_context
from functools import partial
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

__all__ = ["Thread", "ThreadPoolExecutor"]

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Thread(threading.Thread):
    """A `threading.Thread` that closes its connections when `run()` is over.

    However it is over, in the thread itself, whatever CONN_MAX_AGE says. Calling
    `run()` directly is, as ever, a plain call in the caller's thread.
    """

    def start(self) -> None:
        """Start the thread in a copy of the caller's context."""
        if self in threading.enumerate():
            return super().start()  # which refuses; the run() under way stays wrapped

        own_run = vars(self).get("run")
        vars(self)["run"] = partial(_run_and_close, self, _in_context(self), own_run)
        try:
            super().start()
        except RuntimeError:
            _restore_run(self, own_run)
            raise


def _in_context(thread: threading.Thread) -> Callable[[], object]:
    # A context chosen with Python 3.14's argument is entered by Python itself.
    if getattr(thread, "_context", None) is not None:
        return thread.run
    return partial(copy_context().run, thread.run)


def _run_and_close(
    thread: threading.Thread,
    run: Callable[[], object],
    own_run: Callable[[], object] | None,
) -> None:
    _restore_run(thread, own_run)
    try:
        run()
    finally:
        _for_each_connection(_close)


def _restore_run(
    thread: threading.Thread, own_run: Callable[[], object] | None
) -> None:
    # At once, because a bound method on its own instance is a reference cycle.
    del vars(thread)["run"]
    if own_run is not None:
        vars(thread)["run"] = own_run


class ThreadPoolExecutor(futures.ThreadPoolExecutor):
    """A `concurrent.futures.ThreadPoolExecutor` for calls that use the database.

    Before and after each call its thread drops stale connections and empties the query
    log; a thread that ends closes what it has, the initializer's connections included.
    """

    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> futures.Future[T]:
        """Schedule the call in a copy of the caller's context."""
        return super().submit(_call, copy_context(), fn, *args, **kwargs)

    def _adjust_thread_count(self) -> None:
        _adjust_thread_count(self)


def _call(
    context: Context, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    refresh_connections()
    try:
        return context.run(fn, *args, **kwargs)
    finally:
        refresh_connections()


def refresh_connections() -> None:
    """Drop the thread's stale connections and its query log."""
    _for_each_connection(_refresh)


def _work_and_close(*args: Any) -> None:
    try:
        standard._worker(*args)
    finally:
        _for_each_connection(_close)


# A pool has no hook for the end of its threads. This is Python's own method, seeing our
# function where it names its `_worker`: copying its text would tie us to one version.
_adjust_thread_count = FunctionType(
    futures.ThreadPoolExecutor._adjust_thread_count.__code__,
    {**vars(standard), "_worker": _work_and_close},
)


def _for_each_connection(act: Callable[[BaseDatabaseWrapper], None]) -> None:
    for connection in connections.all(initialized_only=True):
        # A shared one was lent to this thread, as Django's tests do: not ours to close.
        if connection.allow_thread_sharing:
            continue
        try:
            act(connection)
        except Exception:  # what the call returned or raised must come through
            logger.exception("cannot tidy the connection %r", connection.alias)


def _refresh(connection: BaseDatabaseWrapper) -> None:
    connection.queries_log.clear()
    if connection.in_atomic_block:  # left open: the next call must not run inside it
        _close(connection)
    else:
        connection.close_if_unusable_or_obsolete()


def _close(connection: BaseDatabaseWrapper) -> None:
    try:
        connection.close()
    finally:
        if connection.in_atomic_block:  # Django would refuse to reconnect it
            del connections[connection.alias]
