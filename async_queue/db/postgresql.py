"""PostgreSQL 14 and later, through psycopg."""

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any, ClassVar
from weakref import WeakKeyDictionary
from zoneinfo import ZoneInfo

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import Error, InterfaceError, OperationalError

from async_queue.db import libpq
from async_queue.db.base import (
    PRIVATE,
    Concern,
    Session,
    Vendor,
    scalar,
    too_many_threads,
)

logger = logging.getLogger("async_queue")

CHANNEL = "async_queue"
# The first of the two numbers of our advisory locks; the second is the worker's. One is
# held by the worker alone, the other is shared by the sessions of its job threads.
_LIVES = 0x61715F6C
_SESSIONS = 0x61715F73
_SERIALIZATION_FAILURE, _DEADLOCK, _LOCK_TIMEOUT = "40001", "40P01", "55P03"
_STATEMENT_CANCELLED = "57014"
_NO_RIGHT = "42501"
_UNKNOWN_SETTING = ("42704", "22023")  # for this version, for this platform
_CONNECTION = "08"
# The server stops, starts or has ended this session: by hand, for it was idle or late.
_ENDED = ("57P01", "57P02", "57P03", "57P04", "57P05", "25P03", "25P04", "53300")
# Of libpq's transaction states: one at work, one that waits, one that has failed.
_OPEN = (1, 2, 3)

# Of libpq, for a server that does not answer: TCP itself would wait for 15 minutes.
_PATIENCE = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# The same of the server, for a host that has gone without a word: else it holds the
# locks of the dead for two hours.
_KEEP_ALIVE = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}
# The lock of a worker is the session's: it must not end before its jobs.
_RESTLESS = _KEEP_ALIVE | {
    # While word to a listener is on its way, its host is not asked whether it is there.
    # Not for sessions of jobs, which may pause while they read a long result.
    "tcp_user_timeout": "6000",
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}

_ADVISORY = (
    "locktype = 'advisory' AND objsubid = 2 AND database = "
    "(SELECT oid FROM pg_database WHERE datname = current_database())"
)
_OWN_NUMBER = "SELECT pg_backend_pid()"
_IS_OTHER = (
    "SELECT true FROM pg_stat_activity WHERE pid = %s AND pid <> pg_backend_pid() "
    "AND datname = current_database()"
)
_LIMIT = (
    "SELECT set_config('statement_timeout', LEAST(%s, NULLIF(extract(epoch FROM "
    "current_setting('statement_timeout')::interval) * 1000, 0))::int::text, true)"
)
_SECONDS_UP = (
    "SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())"
)
_ISOLATION = "SHOW default_transaction_isolation"
_READ_COMMITTED = (
    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED"
)


class PostgreSQL(Vendor):
    now = "statement_timestamp()"
    shifted_now = "(statement_timestamp() + make_interval(secs => %s))"
    claims_in_one_statement = True
    seeks_in_recursion = True
    keeps_dead_entries = True
    begins_late = True
    reads_json_rows = True
    listens = True
    free_life = (
        "((worker.id & 4294967295) NOT IN (SELECT objid::bigint FROM pg_locks "
        f"WHERE {_ADVISORY} AND granted AND classid = {_LIVES}))"
    )
    # A server looks while it computes whether the client is still there. Not on all
    # platforms.
    watch: ClassVar[dict[str, str]] = {"client_connection_check_interval": "500"}

    def __init__(self) -> None:
        # By the driver's connection, which one thread uses.
        self._lasting: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        self._marked: WeakKeyDictionary[Any, Session] = WeakKeyDictionary()
        self._heard: WeakKeyDictionary[Any, deque[str]] = WeakKeyDictionary()
        self._left_behind: list[Any] = []

    def write_moment(self, moment: datetime) -> Any:
        return moment

    def read_moment(self, value: datetime, connection: BaseDatabaseWrapper) -> datetime:
        if value.tzinfo is UTC:
            return value
        if value.tzinfo is None:  # USE_TZ is False: the session's local time
            value = value.replace(tzinfo=ZoneInfo(connection.timezone_name))
        return value.astimezone(UTC)

    def private_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        own = super().private_settings(settings)
        own["OPTIONS"].pop("pool", None)
        own["OPTIONS"].pop("isolation_level", None)
        own["OPTIONS"] = _PATIENCE | own["OPTIONS"]
        return own

    def start_session(
        self, connection: BaseDatabaseWrapper, patience: float | None = None
    ) -> None:
        # Single statements take the session's default. It is changed only where it
        # must be: a setting may outlive us in a pooler's connection.
        if scalar(connection, _ISOLATION, ()) != "read committed":
            with connection.cursor() as cursor:
                cursor.execute(_READ_COMMITTED)
        if not self.has_lasting_sessions(connection):
            return
        settings = dict(_RESTLESS)
        if patience is not None:
            settings["lock_timeout"] = f"{max(1, round(patience * 1000))}ms"
        self._configure(connection, settings)

    def _configure(
        self, connection: BaseDatabaseWrapper, settings: dict[str, str], first: str = ""
    ) -> None:
        """Select ``first`` and change the settings of the session, in one statement."""
        parts = [first] * bool(first) + _changes(settings)
        watchful = _changes(self.watch)
        try:
            scalar(connection, f"SELECT {', '.join(parts + watchful)}", ())
        except Error as error:
            if _state(error) not in _UNKNOWN_SETTING:
                raise
            scalar(connection, f"SELECT {', '.join(parts)}", ())

    def is_transient(self, error: BaseException) -> bool:
        state = getattr(error.__cause__, "sqlstate", None)
        return state in (_SERIALIZATION_FAILURE, _DEADLOCK, _LOCK_TIMEOUT)

    def is_session_lost(
        self, connection: BaseDatabaseWrapper, error: BaseException
    ) -> bool:
        if state := _state(error):
            return state in _ENDED or state.startswith(_CONNECTION)
        # What the server says has a code; this is from the library that speaks to it,
        # which may not have noticed itself that nobody answers any more.
        if isinstance(error, OperationalError):
            return error.__cause__ is not None
        driver = connection.connection
        is_there = driver is not None and not driver.closed
        return not is_there and isinstance(error, InterfaceError)

    def is_inside_transaction(
        self, connection: BaseDatabaseWrapper, has_sent: bool
    ) -> bool:
        # It begins with the first statement. What Django has closed it knows itself.
        driver = connection.connection
        if driver is None or not has_sent:
            return True
        return not libpq.is_idle(driver)

    def is_in_transaction(self, connection: BaseDatabaseWrapper) -> bool:
        driver = connection.connection
        return driver is not None and driver.pgconn.transaction_status in _OPEN

    def block(self, connection: BaseDatabaseWrapper) -> AbstractContextManager[None]:
        return libpq.Block(connection)

    def begin(self, connection: BaseDatabaseWrapper) -> None:
        if connection.connection is not None:
            libpq.begin(connection)

    def conclude(
        self, connection: BaseDatabaseWrapper, sql: str, params: Any, begins_next: bool
    ) -> bool:
        is_prepared = self._keeps_statements(connection)
        if is_prepared and libpq.may_conclude(connection.connection):
            return libpq.conclude(connection, sql, params, begins_next)
        return super().conclude(connection, sql, params, begins_next)

    def take(self, connection: Any, sql: str, params: list[Any]) -> list[Any]:
        return libpq.rows(connection, sql, params)

    def change_many(
        self, connection: BaseDatabaseWrapper, sql: str, arrays: tuple[list[Any], ...]
    ) -> list[tuple[int, int]]:
        if self._keeps_statements(connection):
            return libpq.pairs(connection, sql, arrays)
        return super().change_many(connection, sql, arrays)

    def _keeps_statements(self, connection: BaseDatabaseWrapper) -> bool:
        driver = connection.connection
        # What a pool has lent it may reset.
        if driver is None or connection.settings_dict["OPTIONS"].get("pool"):
            return False
        return libpq.keeps_statements(driver) and self.has_lasting_sessions(connection)

    def limit_statements(self, connection: BaseDatabaseWrapper, seconds: float) -> None:
        scalar(connection, _LIMIT, (max(1, round(1000 * seconds)),))

    def is_over_limit(self, error: BaseException) -> bool:
        return _state(error) == _STATEMENT_CANCELLED

    def setting_concerns(
        self, connection: BaseDatabaseWrapper, *, threads: int, processes: int
    ) -> Iterator[Concern]:
        size = _pool_size(connection.settings_dict["OPTIONS"].get("pool"))
        if size is not None and size < threads + PRIVATE:
            yield Concern(
                "pool",
                f"The connection pool lends {size} connections, too few for {threads} "
                "job threads and the code around them: jobs would wait for each other.",
                "Set OPTIONS['pool'] = {'max_size': "
                f"{threads + PRIVATE}}} or more, or lower ASYNC_QUEUE['THREADS'].",
            )

    def server_concerns(
        self, connection: BaseDatabaseWrapper, *, threads: int
    ) -> Iterator[Concern]:
        yield from super().server_concerns(connection, threads=threads)
        allowed = int(scalar(connection, "SHOW max_connections", ()))
        yield from too_many_threads(threads, allowed)

    def oldest(self, connection: BaseDatabaseWrapper) -> tuple[str, tuple[int, ...]]:
        return "PostgreSQL", (14,)

    def take_life(self, connection: BaseDatabaseWrapper, worker: int) -> bool:
        sql = "SELECT pg_try_advisory_lock(%s, %s)"
        return bool(scalar(connection, sql, (_LIVES, _signed(worker))))

    def drop_life(self, connection: BaseDatabaseWrapper, worker: int) -> None:
        sql = "SELECT pg_advisory_unlock(%s, %s)"
        scalar(connection, sql, (_LIVES, _signed(worker)))

    def has_lasting_sessions(self, connection: Any) -> bool:
        connection.ensure_connection()
        driver = connection.connection
        if driver not in self._lasting:
            # A pooler tells its clients numbers of its own, and sends each statement
            # to whatever server process is free.
            told = driver.info.backend_pid
            self._lasting[driver] = all(
                scalar(connection, _OWN_NUMBER, ()) == told for _ in range(2)
            )
        return self._lasting[driver]

    def marks_transactions(self, connection: BaseDatabaseWrapper) -> bool:
        # What a pool lends is somebody else's next.
        is_lent = bool(connection.settings_dict["OPTIONS"].get("pool"))
        return is_lent or not self.has_lasting_sessions(connection)

    def mark_session(
        self, connection: BaseDatabaseWrapper, worker: int, slot: int
    ) -> None:
        mark = f"pg_advisory_lock_shared({_SESSIONS}, {_signed(worker)})"
        self._configure(connection, _KEEP_ALIVE, mark)
        driver = connection.connection
        self._marked[driver] = Session(driver.info.backend_pid, worker)

    def mark_transaction(self, connection: BaseDatabaseWrapper, worker: int) -> Any:
        sql = "SELECT pg_backend_pid(), pg_advisory_xact_lock_shared(%s, %s)"
        return Session(scalar(connection, sql, (_SESSIONS, _signed(worker))), worker)

    def session_of(self, connection: BaseDatabaseWrapper) -> Any:
        driver = connection.connection
        if driver is None:
            return None
        if marked := self._marked.get(driver):
            return marked
        if self.marks_transactions(connection):
            return None
        return Session(driver.info.backend_pid)

    def end_session(self, connection: BaseDatabaseWrapper, session: Any) -> bool:
        if session is None:
            return False
        number, worker, _ = session
        if worker is not None:
            # Numbers come back, and not all that bear the mark are meant.
            is_there = number in _holders(connection, worker, (_SESSIONS,))
        else:
            is_there = scalar(connection, _IS_OTHER, (number,))
        return bool(is_there) and _terminate(connection, number)

    def end_sessions_of(
        self, connection: BaseDatabaseWrapper, worker: int, threads: int
    ) -> int:
        numbers = _holders(connection, worker, (_LIVES, _SESSIONS))
        return sum(_terminate(connection, number) for number in numbers)

    def has_sessions_of(
        self, connection: BaseDatabaseWrapper, worker: int, threads: int
    ) -> bool:
        return bool(_holders(connection, worker, (_LIVES, _SESSIONS)))

    def seconds_up(self, connection: BaseDatabaseWrapper) -> float:
        return float(scalar(connection, _SECONDS_UP, ()))

    def listen(self, connection: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"LISTEN {CHANNEL}")
        driver = connection.connection
        if driver not in self._heard:
            # What comes with the answers to other statements is given to this one.
            words: deque[str] = deque()
            self._heard[driver] = words
            driver.add_notify_handler(lambda notice: words.append(notice.payload))

    def heard(self, connection: Any) -> list[str]:
        driver = connection.connection
        if (words := self._heard.get(driver) if driver else None) is None:
            raise InterfaceError("this session does not listen; it may be a new one")
        with connection.wrap_database_errors:
            driver.pgconn.consume_input()
        while notice := driver.pgconn.notifies():
            words.append(notice.extra.decode(errors="replace"))
        return [words.popleft() for _ in range(len(words))]

    def descriptor(self, connection: BaseDatabaseWrapper) -> int | None:
        driver = connection.connection
        if driver is None or driver.closed:
            return None
        return int(driver.fileno())

    def leave_to_parent(self, connection: Any) -> None:
        # The threads of a pool stay behind, and what it holds is the parent's.
        pools = getattr(connection, "_connection_pools", {})
        self._left_behind.append(pools.pop(connection.alias, None))


def _changes(settings: dict[str, str]) -> list[str]:
    return [f"set_config('{name}', '{it}', false)" for name, it in settings.items()]


def _holders(
    connection: BaseDatabaseWrapper, worker: int, classes: tuple[int, ...]
) -> list[int]:
    """Return the sessions, but for this one, that hold a lock of the worker's."""
    places = ", ".join(["%s"] * len(classes))
    sql = (
        f"SELECT DISTINCT pid FROM pg_locks WHERE {_ADVISORY} AND granted "
        f"AND classid IN ({places}) AND objid = %s AND pid <> pg_backend_pid()"
    )
    with connection.cursor() as cursor:
        cursor.execute(sql, (*classes, worker % 2**32))
        return [number for (number,) in cursor.fetchall()]


def _terminate(connection: BaseDatabaseWrapper, number: int) -> bool:
    """End a session; False if there is none of that number, or no right to it."""
    try:
        return bool(scalar(connection, "SELECT pg_terminate_backend(%s)", (number,)))
    except Error as error:
        if _state(error) != _NO_RIGHT:
            raise
        logger.warning(
            "session %s of a worker cannot be ended, because it is another role's: let "
            "all workers log in as one role, or grant pg_signal_backend to this one",
            number,
        )
        return False


def _state(error: BaseException) -> str | None:
    return getattr(error.__cause__, "sqlstate", None)


def _pool_size(pool: Any) -> int | None:
    """Return the most connections of psycopg's pool, whose own default is 4."""
    if not pool:
        return None
    options = pool if isinstance(pool, dict) else {}
    return int(options.get("max_size") or options.get("min_size", 4))


def _signed(worker: int) -> int:
    # Numbers of advisory locks are signed and of 32 bits.
    return (worker + 2**31) % 2**32 - 2**31
