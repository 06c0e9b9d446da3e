"""The transaction around a job on PostgreSQL, and the next one, begun with its end.

While jobs that write follow each other, BEGIN goes with the COMMIT before it. Between
the two jobs nobody gets hold of what is open: Django's connection has none then, as if
it were closed, and whoever uses it gets it back without a transaction.
"""

import time
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.transaction import Atomic

from async_queue.db import libpq

# The driver's connections with a transaction for the next job, by Django's.
_ahead: WeakKeyDictionary[BaseDatabaseWrapper, Any] = WeakKeyDictionary()


class Block(Atomic):
    """The outermost atomic() of a session, at a third of the cost while all is well.

    Django's own does whatever is out of the ordinary: the end of what is not committed
    yet, such as after an error.
    """

    def __init__(self, connection: Any) -> None:
        super().__init__(connection.alias, savepoint=True, durable=True)
        self._connection = connection

    def __enter__(self) -> None:
        connection = self._connection
        if not _take_up(connection):
            driver = connection.connection
            is_usual = connection.autocommit and not connection.health_check_enabled
            if driver is None or connection.in_atomic_block or not is_usual:
                return super().__enter__()
            with connection.wrap_database_errors:
                driver.autocommit = False
        connection.autocommit = False
        connection.commit_on_exit = True
        connection.needs_rollback = False
        connection.in_atomic_block = True
        connection.atomic_blocks.append(self)
        return None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        connection = self._connection
        driver = connection.connection
        has_failed = kind is not None or connection.needs_rollback or driver is None
        is_outermost = connection.in_atomic_block and not connection.savepoint_ids
        has_next = driver is not None and _ahead.get(connection) is driver
        # Then it was committed by `conclude`, or nothing was ever sent: whoever ended
        # it in another way has been found out, and has failed.
        is_over = has_next or (driver is not None and libpq.is_idle(driver))
        if has_failed or not is_outermost or not is_over:
            _ahead.pop(connection, None)
            return super().__exit__(kind, error, traceback)
        connection.atomic_blocks.pop()
        connection.in_atomic_block = False
        connection.errors_occurred = False
        connection.autocommit = True
        if has_next:
            _put_away(connection)
        else:
            driver.autocommit = True
        if connection.run_on_commit:
            connection.run_and_clear_commit_hooks()
        return None


def conclude(
    connection: BaseDatabaseWrapper, sql: str, params: Any, begins_next: bool
) -> bool:
    """Do as `libpq.conclude` does; begin the next transaction only if all is usual."""
    begins_next = begins_next and _may_begin_next(connection)
    stands = libpq.conclude(connection, sql, params, begins_next)
    if stands and begins_next:
        _ahead[connection] = connection.connection
    return stands


def _may_begin_next(connection: BaseDatabaseWrapper) -> bool:
    is_ours = isinstance(next(iter(connection.atomic_blocks), None), Block)
    # So that it is closed.
    is_old = connection.close_at is not None and time.monotonic() >= connection.close_at
    return is_ours and not is_old and libpq.begins_plainly(connection.connection)


def is_begun_ahead(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether a transaction is open for the next job."""
    return connection in _ahead


def end_ahead(connection: BaseDatabaseWrapper) -> None:
    """End the transaction that was begun for a job, if none has come."""
    if connection in _ahead:
        connection.ensure_connection()


def _put_away(connection: Any) -> None:
    connection.connection = None
    # Django calls it where it finds no connection.
    connection.connect = partial(_bring_back, connection)


def _take_up(connection: Any) -> bool:
    """Go on in the transaction that was begun, if its session lives."""
    driver = _ahead.get(connection)
    if driver is None or not libpq.is_open(driver):
        return False
    _restore(connection)
    return True


def _bring_back(connection: Any) -> None:
    _end(connection, _restore(connection))


def _restore(connection: Any) -> Any:
    del connection.connect
    connection.connection = driver = _ahead.pop(connection)
    return driver


def _end(connection: Any, driver: Any) -> None:
    """Roll back what is open, and holds nothing; connect anew if that fails."""
    from psycopg import Error

    try:
        driver.rollback()
        driver.autocommit = True
    except Error:
        connection.connection = None
        with suppress(Error):
            driver.close()
        connection.connect()
