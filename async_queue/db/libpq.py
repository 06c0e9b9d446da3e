"""What is sent for each job on PostgreSQL past Django's cursors, claim to COMMIT.

Django's and psycopg's cursors take three times the CPU of a message. What psycopg has
below them is there for this: https://www.psycopg.org/psycopg3/docs/api/pq.html
"""

import re
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.db import block

# Seconds for which a statement is used as the server has planned it: the table may have
# been empty then, and is read as a whole.
_FRESH = 1.0
# Of libpq: what a result may be when all is well; no transaction, and one that waits.
_DONE, _IDLE, _OPEN = (1, 2), 0, 2
_NOTHING = (None, None, None)
_DIVISION_BY_ZERO, _NOT_PREPARED = "22012", "26000"
_SPECIAL = re.compile(r'(["\\])')


class _Prepared(NamedTuple):
    name: bytes
    made_at: float  # by the monotonic clock


# By the driver's connection, which one thread uses, and the statement.
_prepared: WeakKeyDictionary[Any, dict[str, _Prepared]] = WeakKeyDictionary()
# Those in which somebody has deallocated them.
_forgetful: WeakSet[Any] = WeakSet()
_numbers = count(1)


def keeps_statements(driver: Any) -> bool:
    """Tell whether statements that are prepared in this lasting session stay there.

    Where psycopg prepares some itself, it may also drop them all; and somebody who has
    once done so will again.
    """
    return driver.prepare_threshold is None and driver not in _forgetful


def may_conclude(driver: Any) -> bool:
    """Tell whether nothing of psycopg's stands between the fence and COMMIT.

    A transaction() block or a pipeline that was left open, a result that was not read.
    """
    status = driver.pgconn.transaction_status
    return status in (_IDLE, _OPEN) and not _is_busy(driver)


def _is_busy(driver: Any) -> bool:
    # It keeps the number of its own blocks to itself.
    has_block = getattr(driver, "_num_transactions", 0)
    return bool(has_block or driver.pgconn.pipeline_status)


class Block(block.Block):
    """At a third of the cost of Django's while all is well."""

    def _lives(self, driver: Any) -> bool:
        return bool(driver.pgconn.transaction_status == _OPEN)

    def _begin(self) -> bool:
        connection = self._connection
        driver = connection.connection
        is_usual = connection.autocommit and not connection.health_check_enabled
        if driver is None or connection.in_atomic_block or not is_usual:
            return False
        connection._set_autocommit(False)
        return True

    def _commit(self, has_next: bool) -> bool:
        # It was committed by `conclude`, or nothing was ever sent: whoever ended it in
        # another way has been found out, and has failed.
        return has_next or is_idle(self._connection.connection)


def begin(connection: BaseDatabaseWrapper) -> None:
    """Begin a transaction as psycopg is about to, unless it has more to say there."""
    driver = connection.connection
    is_usual = _begins_plainly(driver) and not driver.autocommit
    if is_usual and is_idle(driver) and not _is_busy(driver):
        with connection.wrap_database_errors:
            _checked(connection, driver.pgconn.exec_(b"BEGIN"))


def _begins_plainly(driver: Any) -> bool:
    """Tell whether psycopg has nothing more to say where it begins a transaction."""
    return (driver.isolation_level, driver.read_only, driver.deferrable) == _NOTHING


def rows(connection: Any, sql: str, params: Sequence[Any]) -> list[Any]:
    """Return the rows that a statement returns, which is planned for its parameters.

    By a plain cursor of psycopg's: Django's reads text, and moments in Python, which
    takes twice the CPU.
    """
    from psycopg import Cursor
    from psycopg.rows import tuple_row

    connection.ensure_connection()
    with (
        connection.wrap_database_errors,
        Cursor(connection.connection, row_factory=tuple_row) as cursor,
    ):
        return cursor.execute(sql, params, prepare=False, binary=True).fetchall()


def pairs(
    connection: BaseDatabaseWrapper, sql: str, arrays: Iterable[Iterable[Any]]
) -> list[tuple[int, int]]:
    """Return the pairs of numbers that a statement returns, which is given arrays."""
    name = _prepare(connection, sql)
    values = [_array(array).encode() for array in arrays]
    with connection.wrap_database_errors:
        pgconn = connection.connection.pgconn
        found = _checked(connection, pgconn.exec_prepared(name, values))
    read = found.get_value
    return [(int(read(row, 0)), int(read(row, 1))) for row in range(found.ntuples)]


def conclude(
    connection: BaseDatabaseWrapper, sql: str, params: Any, begins_next: bool
) -> bool:
    """Change one row by the UPDATE, and commit what is open, in one message.

    Its parameters are a text, and numbers. False if there is no such row: then what is
    open has failed. If it ``begins_next`` as usual, the next transaction is open then.
    """
    driver = connection.connection
    text, *numbers = params
    name = _prepare(connection, _failing(sql))
    message = b"EXECUTE %b(%b, %b)" % (name, _literal(driver, text), _list(numbers))
    was_idle = is_idle(driver)
    begins_next = begins_next and not was_idle and _may_begin_next(connection)
    if not was_idle:
        message += b"; COMMIT; BEGIN" if begins_next else b"; COMMIT"
    with connection.wrap_database_errors:
        answer = driver.pgconn.exec_(message)
        # An error of the COMMIT leaves no transaction; one of what stands before it
        # leaves all as it was: a transaction that can only be rolled back, or none.
        has_refused = answer.status not in _DONE and was_idle == is_idle(driver)
        if has_refused and _state(answer) == _DIVISION_BY_ZERO:
            return False
        _checked(connection, answer)
    if begins_next:
        block.begin_ahead(connection)
    return True


def _may_begin_next(connection: BaseDatabaseWrapper) -> bool:
    may_begin = block.may_begin_ahead(connection)
    return may_begin and _begins_plainly(connection.connection)


def is_idle(driver: Any) -> bool:
    """Tell whether no transaction is open."""
    return bool(driver.pgconn.transaction_status == _IDLE)


def _prepare(connection: BaseDatabaseWrapper, sql: str) -> bytes:
    """Return the name under which the session knows the statement."""
    driver = connection.connection
    known = _prepared.get(driver)
    if known is None:
        known = _prepared[driver] = {}
    now = time.monotonic()
    found = known.get(sql)
    if found is None or now - found.made_at > _FRESH:
        with connection.wrap_database_errors:
            if found is not None:
                _checked(connection, driver.pgconn.exec_(b"DEALLOCATE " + found.name))
            found = _Prepared(b"async_queue_%d" % next(_numbers), now)
            _checked(connection, driver.pgconn.prepare(found.name, _numbered(sql)))
        known[sql] = found
    return found.name


@lru_cache
def _failing(sql: str) -> str:
    """Return the UPDATE as a statement that fails if it changes no row.

    Only an error keeps the server from what follows in the same message.
    """
    return f"WITH changed AS ({sql} RETURNING 1) SELECT 1 / count(*) FROM changed"


@lru_cache
def _numbered(sql: str) -> bytes:
    """Return the statement with its parameters as libpq has them."""
    places = count(1)
    return re.sub("%s", lambda _: f"${next(places)}", sql).encode()


def _literal(driver: Any, text: str | None) -> bytes:
    if text is None:
        return b"NULL"
    from psycopg.pq import Escaping

    encoded = text.encode(driver.info.encoding)
    return bytes(Escaping(driver.pgconn).escape_literal(encoded))


def _list(numbers: Iterable[int]) -> bytes:
    return b", ".join([b"%d" % number for number in numbers])


def _array(values: Iterable[Any]) -> str:
    """Return an array of numbers, or of texts, as PostgreSQL writes it."""
    return f"{{{','.join(map(_element, values))}}}"


def _element(value: Any) -> str:
    if isinstance(value, str):
        return '"' + _SPECIAL.sub(r"\\\1", value) + '"'
    return "NULL" if value is None else str(value)


def _checked(connection: BaseDatabaseWrapper, answer: Any) -> Any:
    """Return the answer of the server, unless it is an error: raise that."""
    if answer.status in _DONE:
        return answer
    from psycopg.errors import (
        OperationalError,
        SerializationFailure,
        error_from_result,
    )

    driver, state = connection.connection, _state(answer)
    if state == _NOT_PREPARED:
        _forgetful.add(driver)
        # It is rolled back for no fault of its own, and may be run again.
        raise SerializationFailure("somebody has deallocated the queue's statements")
    if driver.closed and not state:
        raise OperationalError(answer.get_error_message())
    raise error_from_result(answer, driver.info.encoding)


def _state(answer: Any) -> str:
    from psycopg.pq import DiagnosticField

    return (answer.error_field(DiagnosticField.SQLSTATE) or b"").decode()
