"""The two kinds of connection that a worker uses: its own, and its jobs'."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.db.vendors import vendor
from async_queue.exceptions import InsideTransaction

T = TypeVar("T")

# Reconnecting for each job would cost seven eighths of the speed.
_MAX_AGE = 600
# Seconds for which a connection that has just been used is trusted.
_TRUST = 1.0
# Seconds, at most, before what the database rolled back is done again.
_PAUSES = (0.01, 0.05, 0.2)

# The moment by the monotonic clock for each alias, of this thread.
_used_at = threading.local()


@contextmanager
def private(alias: str) -> Iterator[BaseDatabaseWrapper]:
    """Give the calling thread a connection of the queue's own as ``alias``.

    It is READ COMMITTED whatever the project says, never pooled, and closed at the
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
    connections[alias] = own
    try:
        facts.start_session(own)
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


@contextmanager
def awake(alias: str) -> Iterator[BaseDatabaseWrapper]:
    """Yield the thread's connection, replaced if it has died while it idled.

    It is tested only after more than a second since the last such block.
    """
    connection = connections[alias]
    idled = time.monotonic() - getattr(_used_at, alias, 0.0)
    is_doubtful = connection.connection is not None and idled > _TRUST
    if is_doubtful and not connection.is_usable():
        connection.close()
    try:
        yield connection
    finally:
        setattr(_used_at, alias, time.monotonic())


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
