"""MariaDB 10.6 and MySQL 8, and later."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager
from math import ceil
from typing import Any
from weakref import WeakKeyDictionary

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import DatabaseError, Error, InterfaceError, OperationalError

from async_queue.db.base import (
    ENDINGS,
    Concern,
    Session,
    Vendor,
    scalar,
    statement_pattern,
    too_many_threads,
)
from async_queue.db.block import Block, begin_ahead, may_begin_ahead

logger = logging.getLogger("async_queue")

_A_YEAR = 365 * 24 * 3600  # in seconds; the most that there is
_GENTLE = ("READ-COMMITTED", "READ-UNCOMMITTED")
_DEADLOCK, _LOCK_TIMEOUT, _LOCK_TABLE_FULL, _RECORD_CHANGED = 1213, 1205, 1206, 1020
_UNKNOWN_SESSION, _NOT_OWNER = 1094, 1095
# Of the server: it stops, it has ended this session or refuses one.
_SENT_AWAY = (1040, 1053, 1080, 1152, 1158, 1159, 1160, 1161, 1184, 1927, 4031)
# Of the client: there is no server, it has gone, it does not answer.
_LEFT_ALONE = (2002, 2003, 2005, 2006, 2012, 2013, 2055)
_KEEP_ALIVE = {
    "TCP_KEEPIDLE": 5,
    "TCP_KEEPINTVL": 2,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 15_000,
}

# The names of locks are the whole server's and have at most 64 characters.
_PREFIX = "'async_queue:', LEFT(SHA2(DATABASE(), 256), 16), ':'"
_LIFE = f"CONCAT({_PREFIX}, %s)"
_SLOT = f"CONCAT({_PREFIX}, %s, ':', %s)"
_OWN_NUMBER = "SELECT CONNECTION_ID()"
_IS_OTHER = (
    "SELECT 1 FROM information_schema.processlist "
    "WHERE id = %s AND db = DATABASE() AND id <> CONNECTION_ID()"
)
_HOLDERS = f"""
    WITH RECURSIVE slot (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM slot WHERE n < %s),
    holder (number) AS (
        SELECT IS_USED_LOCK({_LIFE}) UNION
        SELECT IS_USED_LOCK(CONCAT({_PREFIX}, %s, ':', n)) FROM slot
    )
    SELECT number FROM holder WHERE number <> CONNECTION_ID()
"""

# Statements that commit by themselves before they do their work.
_IMPLICIT_COMMITS = (
    r"(?:CREATE(?:\s+OR\s+REPLACE)?|DROP)(?!\s+(?:OR|TEMPORARY)\b)|ALTER|RENAME|"
    r"TRUNCATE|GRANT|REVOKE|(?:UN)?LOCK\s+TABLES?|ANALYZE(?!\s+(?:SELECT|UPDATE|DELETE))|"
    r"OPTIMIZE|REPAIR|CHECK\s+(?:TABLE|VIEW)|CACHE\s+INDEX|LOAD\s+INDEX|FLUSH|RESET|"
    r"INSTALL|UNINSTALL|BACKUP|XA|EXECUTE|"
    r"SET\s+(?:STATEMENT|PASSWORD|DEFAULT\s+ROLE)|SET\b[^;]*?\bAUTOCOMMIT"
)


class MySQL(Vendor):
    # Not NOW(): a session's time zone is the server's, and columns are in UTC.
    now = "UTC_TIMESTAMP(6)"
    shifted_now = "(UTC_TIMESTAMP(6) + INTERVAL %s MICROSECOND)"
    free_life = f"IS_FREE_LOCK(CONCAT({_PREFIX}, worker.id))"

    _ends_transaction = statement_pattern(
        rf"(?:/\*M?!\d*\s*)?(?:{ENDINGS}|{_IMPLICIT_COMMITS})"
    )

    def __init__(self) -> None:
        # By the driver's connection, which one thread uses.
        self._lasting: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        self._marks: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()

    def spell(self, sql: str) -> str:
        return sql.replace('"', "`")

    def shift(self, seconds: float) -> Any:
        return round(seconds * 1_000_000)

    def private_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        own = super().private_settings(settings)
        own["OPTIONS"]["isolation_level"] = "read committed"
        own["OPTIONS"].setdefault("connect_timeout", 5)
        return own

    def start_session(self, connection: Any, patience: float | None = None) -> None:
        # The lock of a worker is the session's: it must not end before its jobs.
        settings = {"wait_timeout": _A_YEAR}
        if connection.mysql_is_mariadb:
            settings["idle_transaction_timeout"] = 0
        if patience is not None:
            # For rows, and for tables that somebody alters; in whole seconds.
            seconds = max(1, ceil(patience))
            settings |= {"innodb_lock_wait_timeout": seconds}
            settings |= {"lock_wait_timeout": seconds}
        words = ", ".join(f"{name} = {value}" for name, value in settings.items())
        with connection.cursor() as cursor:
            cursor.execute(f"SET SESSION {words}")
        _keep_alive(connection.connection.fileno())

    def is_transient(self, error: BaseException) -> bool:
        return _code(error) in (_DEADLOCK, _LOCK_TIMEOUT, _RECORD_CHANGED)

    def is_session_lost(
        self, connection: BaseDatabaseWrapper, error: BaseException
    ) -> bool:
        if isinstance(error, InterfaceError):  # (0, ''): closed on this side
            return True
        return isinstance(error, Error) and _code(error) in _SENT_AWAY + _LEFT_ALONE

    def rolls_back(self, connection: BaseDatabaseWrapper, error: BaseException) -> bool:
        # InnoDB undoes the whole transaction and goes on in a new one, in silence.
        if _code(error) == _LOCK_TIMEOUT:
            return bool(scalar(connection, "SELECT @@innodb_rollback_on_timeout", ()))
        return _code(error) in (_DEADLOCK, _RECORD_CHANGED, _LOCK_TABLE_FULL)

    def is_in_transaction(self, connection: Any) -> bool:
        # MySQL keeps it to itself.
        if connection.connection is None or not connection.mysql_is_mariadb:
            return False
        return bool(scalar(connection, "SELECT @@in_transaction", ()))

    def block(self, connection: BaseDatabaseWrapper) -> AbstractContextManager[None]:
        return _Block(connection)

    def conclude(
        self, connection: BaseDatabaseWrapper, sql: str, params: Any, begins_next: bool
    ) -> bool:
        stands = self.change(connection, sql, params)
        begins_next = begins_next and self.has_lasting_sessions(connection)
        if stands and begins_next and may_begin_ahead(connection):
            begin_ahead(connection)
        return stands

    def server_concerns(
        self, connection: BaseDatabaseWrapper, *, threads: int
    ) -> Iterator[Concern]:
        yield from super().server_concerns(connection, threads=threads)
        allowed = int(scalar(connection, "SELECT @@max_connections", ()))
        yield from too_many_threads(threads, allowed)
        if (isolation := _isolation(connection)) not in _GENTLE:
            yield Concern(
                "isolation",
                f"The project's sessions are {isolation.replace('-', ' ')}: jobs lock "
                "gaps between rows and end more often in deadlocks.",
                "Set OPTIONS['isolation_level'] = 'read committed'.",
            )

    def oldest(self, connection: Any) -> tuple[str, tuple[int, ...]]:
        return ("MariaDB", (10, 6)) if connection.mysql_is_mariadb else ("MySQL", (8,))

    def take_life(self, connection: BaseDatabaseWrapper, worker: int) -> bool:
        return bool(scalar(connection, f"SELECT GET_LOCK({_LIFE}, 0)", (worker,)))

    def drop_life(self, connection: BaseDatabaseWrapper, worker: int) -> None:
        scalar(connection, f"SELECT RELEASE_LOCK({_LIFE})", (worker,))

    def has_lasting_sessions(self, connection: BaseDatabaseWrapper) -> bool:
        connection.ensure_connection()
        driver = connection.connection
        if driver not in self._lasting:
            number = scalar(connection, _OWN_NUMBER, ())
            self._lasting[driver] = number == driver.thread_id()
        return self._lasting[driver]

    def marks_transactions(self, connection: BaseDatabaseWrapper) -> bool:
        return not self.has_lasting_sessions(connection)

    def mark_session(
        self, connection: BaseDatabaseWrapper, worker: int, slot: int
    ) -> None:
        mark = worker, slot
        if not scalar(connection, f"SELECT GET_LOCK({_SLOT}, 0)", mark):
            # The thread's former session, which the server has not yet missed.
            _kill(connection, _holder(connection, mark))
            if not scalar(connection, f"SELECT GET_LOCK({_SLOT}, 5)", mark):
                raise OperationalError(
                    f"another session holds slot {slot} of worker {worker} and does "
                    "not end"
                )
        self._marks[connection.connection] = mark

    def mark_transaction(self, connection: BaseDatabaseWrapper, worker: int) -> Any:
        return Session(scalar(connection, _OWN_NUMBER, ()))

    def session_of(self, connection: BaseDatabaseWrapper) -> Any:
        driver = connection.connection
        if driver is None or not self.has_lasting_sessions(connection):
            return None
        worker, slot = self._marks.get(driver, (None, 0))
        return Session(driver.thread_id(), worker, slot)

    def end_session(self, connection: BaseDatabaseWrapper, session: Any) -> bool:
        if session is None:
            return False
        number, worker, slot = session
        # A server that was started again gives the same numbers to others.
        if worker is not None:
            is_there = _holder(connection, (worker, slot)) == number
        else:
            is_there = scalar(connection, _IS_OTHER, (number,))
        return bool(is_there) and _kill(connection, number)

    def end_sessions_of(
        self, connection: BaseDatabaseWrapper, worker: int, threads: int
    ) -> int:
        numbers = _holders(connection, worker, threads)
        return sum(_kill(connection, number) for number in numbers)

    def has_sessions_of(
        self, connection: BaseDatabaseWrapper, worker: int, threads: int
    ) -> bool:
        return bool(_holders(connection, worker, threads))

    def seconds_up(self, connection: BaseDatabaseWrapper) -> float:
        with connection.cursor() as cursor:
            cursor.execute("SHOW GLOBAL STATUS LIKE 'Uptime'")
            return float(cursor.fetchone()[1])

    def descriptor(self, connection: BaseDatabaseWrapper) -> int | None:
        driver = connection.connection
        return None if driver is None else int(driver.fileno())


class _Block(Block):
    """Leaves autocommit off for the next one, which then begins by itself."""

    def _commit(self, has_next: bool) -> bool:
        if has_next:
            self._connection._commit()
        return has_next


def _holder(connection: BaseDatabaseWrapper, mark: tuple[int, int]) -> Any:
    return scalar(connection, f"SELECT IS_USED_LOCK({_SLOT})", mark)


def _holders(connection: BaseDatabaseWrapper, worker: int, threads: int) -> list[int]:
    with connection.cursor() as cursor:
        cursor.execute(_HOLDERS, (4 * threads + 4, worker, worker))
        return [number for (number,) in cursor.fetchall()]


def _kill(connection: BaseDatabaseWrapper, number: int | None) -> bool:
    """End a session; False if there is none of that number, or no right to it."""
    if number is None:
        return False
    try:
        with connection.cursor() as cursor:
            cursor.execute("KILL %s", (number,))
    except DatabaseError as error:
        if _code(error) == _UNKNOWN_SESSION:
            return False
        if _code(error) != _NOT_OWNER:
            raise
        logger.warning(
            "session %s of a worker cannot be ended, because it is another user's: let "
            "all workers log in as one user, or grant CONNECTION ADMIN to this one",
            number,
        )
        return False
    return True


def _keep_alive(descriptor: int) -> None:
    """Let the kernel find out in 15 seconds that nobody is at the other end."""
    with socket.socket(fileno=os.dup(descriptor)) as wire:
        if wire.family not in (socket.AF_INET, socket.AF_INET6):
            return
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not all systems have all of them
                wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _isolation(connection: BaseDatabaseWrapper) -> str:
    # The variable has one name in MySQL and in new MariaDB, another in old MariaDB.
    with connection.cursor() as cursor:
        cursor.execute(
            "SHOW VARIABLES WHERE variable_name RLIKE '^(tx|transaction)_iso'"
        )
        return str(cursor.fetchone()[1])


def _code(error: BaseException) -> Any:
    return error.args[0] if isinstance(error, DatabaseError) and error.args else None
