"""The interface to a vendor's facts, with the answers that most vendors share."""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from math import inf
from typing import Any, NamedTuple

import sqlparse
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.transaction import atomic

# MySQL executes what stands in a comment that starts with /*! or, as MariaDB, /*M!.
_SPACE = r"(?:\s|(?:--|#)[^\n]*(?:\n|$)|/\*(?!M?!).*?\*/)*"
ENDINGS = (
    r"COMMIT|END|ABORT|BEGIN|START\s+TRANSACTION|PREPARE\s+TRANSACTION|"
    r"ROLLBACK(?!(?:\s+(?:WORK|TRANSACTION))?\s+TO\b)"
)

# The connections of a worker beside those of its job threads.
PRIVATE = 2


def statement_pattern(keywords: str) -> re.Pattern[str]:
    """Return a pattern that finds a statement which starts with one of ``keywords``."""
    return re.compile(rf"(?:^|;){_SPACE}((?:{keywords})\b)", re.I | re.S)


class Concern(NamedTuple):
    """What makes a project's database unfit for its queue, and the remedy."""

    kind: str
    message: str
    hint: str


class Session(NamedTuple):
    """By what another session ends this one: its number, and whose mark it bears."""

    number: int
    worker: int | None = None
    slot: int = 0


class Vendor(ABC):
    """What one kind of database can do, and how it is asked for it.

    ``now`` and ``shifted_now`` are SQL for its clock in UTC at the start of the
    statement; the latter takes one parameter, made by `shift`.
    """

    now: str
    shifted_now: str
    # Claims with one UPDATE ... RETURNING, instead of a SELECT and an UPDATE.
    claims_in_one_statement = False
    # Seeks in an index by a value that a recursive query has found, instead of
    # reading it from its begin for each one (a second for a million rows).
    seeks_in_recursion = False
    # Keeps the index entries of rows that have changed until a vacuum, and seeks by a
    # row of values: so a claim had better start where the last one ended.
    keeps_dead_entries = False
    # More threads than one gain nothing: jobs that write exclude each other.
    runs_one_job_at_a_time = False
    # Workers show that they live by their beat, too. Elsewhere their lock is the proof.
    has_heartbeat = True
    # Takes rows as one parameter, through json_to_recordset().
    reads_json_rows = False
    # A transaction begins with its first statement, and costs nothing without one.
    begins_late = False
    # Tells of what is scheduled, so that a worker need not ask all the time.
    listens = False
    # SQL that is true where nobody holds the lock of the worker in the row ``worker``.
    # It takes nothing, and is no proof of a death. None: only a process can ask.
    free_life: str | None = None
    # Seconds for which a job may hold a transaction before somebody is told, and from
    # what that keeps whom.
    long_transaction = 60.0
    harm_of_long_transactions = "the database from cleaning up"

    _ends_transaction = statement_pattern(ENDINGS)

    def spell(self, sql: str) -> str:
        """Return ``sql`` with its double-quoted names as this database quotes them."""
        return sql

    def shift(self, seconds: float) -> Any:
        """Return the parameter of ``shifted_now``."""
        return seconds

    def write_moment(self, moment: datetime) -> Any:
        """Return the parameter that stores the aware ``moment``."""
        return (
            moment.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
        )

    def read_moment(self, value: Any, connection: BaseDatabaseWrapper) -> datetime:
        """Return what a cursor or Django read from a column as an aware moment."""
        moment = value if isinstance(value, datetime) else _moment_of(value)
        return moment.replace(tzinfo=UTC)

    def is_single_connection(self, connection: BaseDatabaseWrapper) -> bool:
        """Tell whether no second connection could see this one's data."""
        return False

    def private_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a connection of the queue's own."""
        own = copy.deepcopy(settings)
        own |= {"AUTOCOMMIT": True, "CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": False}
        return own

    @abstractmethod
    def start_session(
        self, connection: BaseDatabaseWrapper, patience: float | None = None
    ) -> None:
        """Make a connection of the queue's own READ COMMITTED, and let it idle.

        With ``patience`` it waits for locks that many seconds at most, or as few as the
        database counts, and then raises OperationalError.
        """

    def prepare(self, connection: BaseDatabaseWrapper) -> str | None:
        """Make the database fit for workers; return what was changed, if anything."""
        return None

    def turn(self, connection: BaseDatabaseWrapper) -> AbstractContextManager[None]:
        """Wait until the queue may write: around each of its transactions."""
        return nullcontext()

    @abstractmethod
    def is_transient(self, error: BaseException) -> bool:
        """Tell whether everything was rolled back and trying again may well help."""

    @abstractmethod
    def is_session_lost(
        self, connection: BaseDatabaseWrapper, error: BaseException
    ) -> bool:
        """Tell whether ``error`` means that the session has ended, or never began."""

    def rolls_back(self, connection: BaseDatabaseWrapper, error: BaseException) -> bool:
        """Tell whether the database has just rolled back the transaction by itself."""
        return False

    def is_inside_transaction(
        self, connection: BaseDatabaseWrapper, has_sent: bool
    ) -> bool:
        """Tell whether the driver is where Django believes, as far as it tells.

        ``has_sent`` tells whether statements were sent: some drivers begin with them.
        """
        return True

    def is_in_transaction(self, connection: BaseDatabaseWrapper) -> bool:
        """Tell whether a transaction is open, as the database sees it."""
        return False

    def block(self, connection: BaseDatabaseWrapper) -> AbstractContextManager[None]:
        """Return an atomic() that is inside no other."""
        return atomic(using=connection.alias, durable=True)

    def begin(self, connection: BaseDatabaseWrapper) -> None:
        """Begin now what the next statement would begin, where that takes less."""

    def change(self, connection: BaseDatabaseWrapper, sql: str, params: Any) -> bool:
        """Send an UPDATE of one row; tell whether there is such a row."""
        with connection.cursor() as cursor:
            cursor.execute(sql, params)
            return bool(cursor.rowcount == 1)

    def conclude(
        self, connection: BaseDatabaseWrapper, sql: str, params: Any, begins_next: bool
    ) -> bool:
        """Do the same, and commit if so, where one message can say both.

        It also ``begins_next``, where that message can say that, too. Without such a
        row the caller has to roll back.
        """
        return self.change(connection, sql, params)

    def take(self, connection: Any, sql: str, params: list[Any]) -> list[Any]:
        """Send a statement that claims; return the rows that it returns.

        Only where `claims_in_one_statement`.
        """
        raise NotImplementedError

    def change_many(
        self, connection: BaseDatabaseWrapper, sql: str, arrays: tuple[list[Any], ...]
    ) -> list[tuple[int, int]]:
        """Send a statement that is given arrays; return the pairs that it returns."""
        with connection.cursor() as cursor:
            cursor.execute(sql, arrays)
            return cursor.fetchall()  # type: ignore[no-any-return]

    def limit_statements(self, connection: BaseDatabaseWrapper, seconds: float) -> None:
        """Let no statement of the open transaction take longer, where it can be said.

        A limit that the project has set, and that is shorter, stays.
        """

    def is_over_limit(self, error: BaseException) -> bool:
        """Tell whether a statement was ended because it, or somebody, waited no longer.

        As `limit_statements` makes it do.
        """
        return False

    def refused_statement(self, sql: Any) -> str | None:
        """Return the keyword by which ``sql`` would end a transaction, if any."""
        text = sql if isinstance(sql, str) else _as_text(sql)
        if not (match := self._ends_transaction.search(text)):
            return None
        # The semicolon may stand in a literal or in a function's body.
        for statement in sqlparse.split(text) if match.start() else [text]:
            if match := self._ends_transaction.match(statement):
                return " ".join(match[1].upper().split())
        return None

    def setting_concerns(
        self, connection: BaseDatabaseWrapper, *, threads: int, processes: int
    ) -> Iterator[Concern]:
        """Yield what is unfit in the project's settings; the database is not asked."""
        yield from ()

    def server_concerns(
        self, connection: BaseDatabaseWrapper, *, threads: int
    ) -> Iterator[Concern]:
        """Yield what is unfit in the database itself."""
        version = connection.get_database_version()
        name, floor = self.oldest(connection)
        if version < floor:
            yield Concern(
                "version",
                f"{name} {_dotted(version)} is older than {_dotted(floor)}, the oldest "
                "version that async_queue is made for.",
                f"Upgrade {name}.",
            )

    @abstractmethod
    def oldest(self, connection: BaseDatabaseWrapper) -> tuple[str, tuple[int, ...]]:
        """Return the database's name and the oldest version that will do."""

    @abstractmethod
    def take_life(self, connection: BaseDatabaseWrapper, worker: int) -> bool:
        """Try to take the lock that the database frees when its holder dies.

        A worker takes its own for life; whoever gets another's has proved a death.
        """

    @abstractmethod
    def drop_life(self, connection: BaseDatabaseWrapper, worker: int) -> None:
        """Give the lock of `take_life` back."""

    @contextmanager
    def proof_of_death(
        self, connection: BaseDatabaseWrapper, worker: int
    ) -> Iterator[bool]:
        """Tell whether another worker is dead, and keep it so inside the block."""
        is_dead = self.take_life(connection, worker)
        try:
            yield is_dead
        finally:
            if is_dead:
                self.drop_life(connection, worker)

    def has_lasting_sessions(self, connection: BaseDatabaseWrapper) -> bool:
        """Tell whether the session is the server's own, and not shared by a pooler.

        Only then are its locks and settings its own. When in doubt it is not.
        """
        return True

    def marks_transactions(self, connection: BaseDatabaseWrapper) -> bool:
        """Tell whether each transaction is to be marked, because the session cannot."""
        return False

    def mark_session(
        self, connection: BaseDatabaseWrapper, worker: int, slot: int
    ) -> None:
        """Mark the session of a job thread as the worker's, for `end_sessions_of`.

        Done once for each session. ``slot`` is the thread's own among the worker's.
        """

    def mark_transaction(self, connection: BaseDatabaseWrapper, worker: int) -> Any:
        """Mark the open transaction as the worker's; return what `end_session` takes.

        Only where `marks_transactions`.
        """
        return self.session_of(connection)

    def session_of(self, connection: BaseDatabaseWrapper) -> Any:
        """Return by what another thread may end this thread's session.

        None where there is none, or where only `mark_transaction` knows.
        """
        return None

    def end_session(self, connection: BaseDatabaseWrapper, session: Any) -> bool:
        """End a session of `session_of`, so that what it has open cannot commit.

        ``connection`` is the caller's. False if it is gone, or is no longer what it
        was: nobody else's session is ended, nor the caller's own.
        """
        return False

    def end_sessions_of(
        self, connection: BaseDatabaseWrapper, worker: int, threads: int
    ) -> int:
        """End the marked sessions of a worker and the holder of its life; count them.

        They may still be there for a moment, see `has_sessions_of`. ``threads`` tells
        how many slots there are: 4 for each thread, and 4.
        """
        return 0

    def has_sessions_of(
        self, connection: BaseDatabaseWrapper, worker: int, threads: int
    ) -> bool:
        """Tell whether `end_sessions_of` would find any."""
        return False

    def seconds_up(self, connection: BaseDatabaseWrapper) -> float:
        """Return for how long the server has been running."""
        return inf

    def is_life_free(self, connection: BaseDatabaseWrapper, worker: int) -> bool:
        """Tell whether nobody holds the worker's lock just now, by taking it."""
        with self.proof_of_death(connection, worker) as is_dead:
            return is_dead

    def listen(self, connection: BaseDatabaseWrapper) -> None:
        """Let this session hear from now on what is sent to the queue's workers."""

    def heard(self, connection: BaseDatabaseWrapper) -> list[str]:
        """Return what has been sent since the last call, without waiting.

        Raises Error if the session has ended or does not listen.
        """
        return []

    def descriptor(self, connection: BaseDatabaseWrapper) -> int | None:
        """Return the file number that can be read when something arrives, or the end.

        None where the session has none.
        """
        return None

    def data_version(self, connection: BaseDatabaseWrapper) -> int | None:
        """Return a number that changes when others commit, where asking is nearly free.

        It means nothing in another session.
        """
        return None

    def leave_to_parent(self, connection: BaseDatabaseWrapper) -> None:
        """Make the session that a fork has copied unusable here, not in the parent.

        Its socket is already out of reach: see `async_queue.db.forks`.
        """


def _moment_of(text: Any) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):  # written by hand: as if long ago
        return datetime.min


def too_many_threads(threads: int, allowed: int) -> Iterator[Concern]:
    """Yield a concern if the server allows fewer connections than a worker needs."""
    if allowed < threads + PRIVATE:
        yield Concern(
            "server",
            f"{threads} threads and {PRIVATE} connections of the worker's own are more "
            f"than the {allowed} connections that the server allows.",
            "Lower ASYNC_QUEUE['THREADS'] or raise the server's max_connections.",
        )


def scalar(connection: BaseDatabaseWrapper, sql: str, params: Any) -> Any:
    """Return the one value that ``sql`` selects."""
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        row = cursor.fetchone()
    return row[0] if row else None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _as_text(sql: Any) -> str:
    if isinstance(sql, bytes):
        return sql.decode(errors="replace")
    # psycopg's composed statements.
    return str(sql.as_string(None)) if hasattr(sql, "as_string") else str(sql)
