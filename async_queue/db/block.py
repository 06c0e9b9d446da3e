"""The transaction around a job, and the next one, which begins with its end.

While jobs follow each other, a transaction is ended so that the next job's is open.
Between the two, where nothing but the queue's own code should run, Django's connection
has no session, as if it were closed; and who uses it all the same gets the session back
without a transaction.
"""

import time
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from django.db import Error
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.transaction import Atomic

# Seconds for which a transaction is kept for a job that is to follow at once.
_KEPT = 0.05


class _Next(NamedTuple):
    """The driver's connection with a transaction for the next job."""

    driver: Any
    begun_at: float  # by the monotonic clock


# By Django's connection, which one thread uses.
_ahead: WeakKeyDictionary[BaseDatabaseWrapper, _Next] = WeakKeyDictionary()


class Block(Atomic):
    """The outermost atomic() of a session, which may go on where the last one ended.

    Django's own does whatever is out of the ordinary: the end of what is not committed
    yet, such as after an error. Vendors shorten the rest.
    """

    def __init__(self, connection: Any) -> None:
        super().__init__(connection.alias, savepoint=True, durable=True)
        self._connection = connection

    def __enter__(self) -> None:
        connection = self._connection
        if not (self._take_up() or self._begin()):
            return super().__enter__()
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
        following = _ahead.pop(connection, None)
        has_next = following is not None
        if has_failed or not is_outermost or not self._ends(has_next):
            return super().__exit__(kind, error, traceback)
        connection.atomic_blocks.pop()
        connection.in_atomic_block = False
        connection.errors_occurred = False
        connection.autocommit = True
        if following is not None:
            _put_away(connection, following)
        else:
            connection._set_autocommit(True)
        if connection.run_on_commit:
            connection.run_and_clear_commit_hooks()
        return None

    def _take_up(self) -> bool:
        """Go on in the transaction that was begun just now, if its session lives."""
        following = _ahead.get(self._connection)
        if following is None or not self._lives(following.driver):
            return False
        if time.monotonic() - following.begun_at > _KEPT:
            return False
        _restore(self._connection)
        return True

    def _lives(self, driver: Any) -> bool:
        """Tell whether what was begun is there, as far as the driver knows."""
        return True

    def _begin(self) -> bool:
        """Begin; False if that is to be left to Django."""
        return False

    def _ends(self, has_next: bool) -> bool:
        """Commit, unless Django is to do so; end as it does where that fails."""
        try:
            return self._commit(has_next)
        except BaseException as error:
            super().__exit__(type(error), error, error.__traceback__)
            raise

    def _commit(self, has_next: bool) -> bool:
        """Commit what is not committed; False if that is to be left to Django.

        With ``has_next``, which Django cannot do, so that the next transaction is open.
        """
        return False


def may_begin_ahead(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether the open transaction is a `Block`, and the session is to stay."""
    is_ours = isinstance(next(iter(connection.atomic_blocks), None), Block)
    # So that it is closed.
    is_old = connection.close_at is not None and time.monotonic() >= connection.close_at
    return is_ours and not is_old


def begin_ahead(connection: BaseDatabaseWrapper) -> None:
    """Let the block that is being left keep its session for the next one."""
    _ahead[connection] = _Next(connection.connection, time.monotonic())


def is_begun_ahead(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether a transaction is open for the next job."""
    return connection in _ahead


def end_ahead(connection: BaseDatabaseWrapper) -> None:
    """End the transaction that was begun for a job, if none has come."""
    if connection in _ahead:
        with suppress(Error):  # where the database is away, nothing is open
            connection.ensure_connection()


def _put_away(connection: Any, following: _Next) -> None:
    _ahead[connection] = following
    connection.connection = None
    # Django calls it where it finds no connection.
    connection.connect = partial(_bring_back, connection)


def _restore(connection: Any) -> Any:
    del connection.connect
    connection.connection = driver = _ahead.pop(connection).driver
    return driver


def _bring_back(connection: Any) -> None:
    """Roll back what is open, and holds nothing; connect anew if that fails."""
    driver = _restore(connection)
    try:
        connection._rollback()
        connection._set_autocommit(True)
    except Error:
        connection.connection = None
        with suppress(Exception):
            driver.close()
        connection.connect()
