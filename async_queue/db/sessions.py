"""The two kinds of connection that a worker uses: its own, and its jobs'."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from async_queue.db.block import end_ahead, is_begun_ahead
from async_queue.db.forks import watch
from async_queue.db.vendors import vendor
from async_queue.exceptions import InsideTransaction

T = TypeVar("T")

# Reconnecting for each job would cost seven eighths of the speed.
_MAX_AGE = 600
# Seconds for which a connection that has just been used is trusted.
_TRUST = 1.0
# Seconds, at most, before what the database rolled back is done again.
_PAUSES = (0.01, 0.05, 0.2)

# The queue's own connections, and their patience.
_private: WeakKeyDictionary[BaseDatabaseWrapper, float | None] = WeakKeyDictionary()


class _Here(threading.local):
    """What this thread knows of its connection to each alias."""

    def __init__(self) -> None:
        # The moment by the monotonic clock.
        self.used_at: dict[str, float] = {}
        # The worker, and the thread's number there, whose jobs it runs now.
        self.seats: dict[str, tuple[int, int] | None] = {}
        # The driver's connection that was marked last, and for which worker.
        self.marked: dict[str, tuple[Any, int]] = {}


_here = _Here()


@contextmanager
def private(alias: str, patience: float | None = None) -> Iterator[BaseDatabaseWrapper]:
    """Give the calling thread a connection of the queue's own as ``alias``.

    It is READ COMMITTED whatever the project says, never pooled, waits for locks
    ``patience`` seconds at most, also when it was opened anew, and is closed at the
    end; the thread's former connection is untouched and then back in its place.
    An in-memory database has only the one connection, so there it stays. Raises
    InsideTransaction in a transaction of the caller's.
    """
    shared = connections[alias]
    facts = vendor(shared)
    if facts.is_single_connection(shared):
        yield shared
        return
    if shared.in_atomic_block:
        raise InsideTransaction(
            "jobs cannot be run from inside a transaction: their own connections would "
            "not see what it holds. In tests take a TransactionTestCase, or call "
            "job.execute() in a TestCase"
        )
    own = type(shared)(facts.private_settings(shared.settings_dict), alias)
    _private[own] = patience
    connections[alias] = own
    try:
        own.ensure_connection()
        yield own
    finally:
        connections[alias] = shared
        own.close()


def keep_connection(alias: str) -> None:
    """Keep the calling thread's connection for ten minutes, whatever CONN_MAX_AGE.

    Called once in each job thread. `awake` tests it, so Django need not do
    so before each job. Connections of a pool stay as they are: borrowing one is
    cheap, and the pool tests them.
    """
    connection = connections[alias]
    if not connection.settings_dict["OPTIONS"].get("pool"):
        connection.settings_dict = {
            **connection.settings_dict,
            "AUTOCOMMIT": True,
            "CONN_MAX_AGE": _MAX_AGE,
            "CONN_HEALTH_CHECKS": False,
        }


def awake(
    alias: str, worker: int | None = None, slot: int = 0
) -> AbstractContextManager[BaseDatabaseWrapper]:
    """Return a block with the thread's connection, a new one if it died while it idled.

    It is tested only after more than a second since the last such block. Inside the
    block every session that it has, or opens, is marked as the ``worker``'s if there is
    one; ``slot`` is the thread's own among the worker's. Raises Error where it cannot
    be marked.
    """
    return _Awake(alias, None if worker is None else (worker, slot))


# A class, as a generator takes twice the time, and each job pays for it.
class _Awake(AbstractContextManager[BaseDatabaseWrapper]):
    def __init__(self, alias: str, seat: tuple[int, int] | None) -> None:
        self._alias = alias
        self._seat = seat

    def __enter__(self) -> BaseDatabaseWrapper:
        alias, connection = self._alias, connections[self._alias]
        idled = time.monotonic() - _here.used_at.get(alias, 0.0)
        is_doubtful = connection.connection is not None and idled > _TRUST
        if is_doubtful and not connection.is_usable():
            connection.close()
        self._former = _here.seats.get(alias)
        _here.seats[alias] = self._seat
        try:
            if is_begun_ahead(connection) and not self._is_marked():
                end_ahead(connection)
            if connection.connection is not None:
                _mark(connection)
        except BaseException:
            self.__exit__()
            raise
        return connection

    def _is_marked(self) -> bool:
        """Tell whether the session was marked for the same worker."""
        _, worker = _here.marked.get(self._alias, (None, 0))
        return self._seat is not None and self._seat[0] == worker

    def __exit__(self, *error: object) -> None:
        _here.seats[self._alias] = self._former
        _here.used_at[self._alias] = time.monotonic()


def _mark(connection: BaseDatabaseWrapper) -> None:
    """Mark the open session for the worker whose jobs this thread runs, just once."""
    if (seat := _here.seats.get(connection.alias)) is None:
        return
    driver, worker = _here.marked.get(connection.alias, (None, 0))
    if driver is connection.connection and worker == seat[0]:
        return
    facts = vendor(connection)
    with _closed_on_error(connection):
        watch(connection)
        if not facts.marks_transactions(connection):
            facts.mark_session(connection, *seat)
    _here.marked[connection.alias] = (connection.connection, seat[0])


def _begin_session(connection: BaseDatabaseWrapper, **signal: Any) -> None:
    """Make a session what it is to be, whenever Django has opened one."""
    alias = connection.alias
    if connection in _private:
        with _closed_on_error(connection):
            watch(connection)
            vendor(connection).start_session(connection, _private[connection])
    elif _here.seats.get(alias) and connections[alias] is connection:
        # Not those that a job opens beside it.
        _mark(connection)


connection_created.connect(_begin_session)


@contextmanager
def _closed_on_error(connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Let nobody use a session that is only half of what it is to be."""
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _forget_seats() -> None:
    """In a forked child: it is no worker, whatever its thread was in the parent."""
    _here.seats.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_seats)


def persist(connection: BaseDatabaseWrapper, act: Callable[[], T]) -> T:
    """Return ``act()``, done again up to three times if the database rolls it back.

    Inside a transaction of the caller's it is done once: all of that is lost with it.
    """
    for pause in () if connection.in_atomic_block else _PAUSES:
        try:
            return act()
        except Error as error:
            if not vendor(connection).is_transient(error):
                raise
        time.sleep(pause * random.random())
    return act()
