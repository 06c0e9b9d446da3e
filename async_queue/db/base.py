"""The interface to a vendor's facts, with the answers that most vendors share."""

import copy
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any, NamedTuple

import sqlparse
from django.db.backends.base.base import BaseDatabaseWrapper

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


class Vendor:
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
    # More threads than one gain nothing: jobs that write exclude each other.
    runs_one_job_at_a_time = False

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

    def start_session(self, connection: BaseDatabaseWrapper) -> None:
        """Make a connection of the queue's own READ COMMITTED."""

    def prepare(self, connection: BaseDatabaseWrapper) -> str | None:
        """Make the database fit for workers; return what was changed, if anything."""
        return None

    def turn(self, connection: BaseDatabaseWrapper) -> AbstractContextManager[None]:
        """Wait until the queue may write: around each of its transactions."""
        return nullcontext()

    def is_transient(self, error: BaseException) -> bool:
        """Tell whether everything was rolled back and trying again may well help."""
        raise NotImplementedError

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

    def oldest(self, connection: BaseDatabaseWrapper) -> tuple[str, tuple[int, ...]]:
        """Return the database's name and the oldest version that will do."""
        raise NotImplementedError

    def take_life(self, connection: BaseDatabaseWrapper, worker: int) -> bool:
        """Try to take the lock that the database frees when its holder dies.

        A worker takes its own for life; whoever gets another's has proved a death.
        """
        raise NotImplementedError

    def drop_life(self, connection: BaseDatabaseWrapper, worker: int) -> None:
        """Give the lock of `take_life` back."""
        raise NotImplementedError

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


def scalar(connection: BaseDatabaseWrapper, sql: str, params: tuple[Any, ...]) -> Any:
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
