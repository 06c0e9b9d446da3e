"""What the statements share: the tables' names, and their rows as values."""

from datetime import datetime
from typing import Any, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.context import RunningJob
from async_queue.db import vendor
from async_queue.models import Job, Worker

JOB = Job._meta.db_table
WORKER = Worker._meta.db_table
# Quoted are the names that MySQL 8 reserves; `Vendor.spell` knows its quotes.
ORDER = '"rank", run_after, id'
CLAIMED = (
    'id, "function", args, kwargs, meta, seal, queue, "rank", run_after, enqueued_at, '
    "attempt, failures"
)
CLAIMED_NAMES = CLAIMED.split(", ")
ATTEMPT = CLAIMED_NAMES.index("attempt")
_NUMBERS = [CLAIMED_NAMES.index(name) for name in ('"rank"', "attempt", "failures")]
_STARTED_AT = len(CLAIMED_NAMES)  # stands last in what a claim reads
_MOMENTS = (*map(CLAIMED_NAMES.index, ("run_after", "enqueued_at")), _STARTED_AT)


class NewJob(NamedTuple):
    """The columns of a row that are given when it is inserted."""

    function: str
    args: str
    kwargs: str
    meta: str
    seal: str
    identity: str
    queue: str
    rank: int


class InsertedJob(NamedTuple):
    """The columns of a row that the database gives it."""

    id: int
    status: str
    run_after: datetime
    enqueued_at: datetime


class Selection(NamedTuple):
    """Which of the READY rows a claim may take; what is empty does not restrict.

    ``until`` is a moment that the database told; what was scheduled, or is due, after
    it is left. ``shard`` is (which, out of) by the rows' ids, and ``prefix`` the
    beginning of the function's path. Rows are either all suspects or none is.
    """

    queues: tuple[str, ...] = ()
    until: datetime | None = None
    shard: tuple[int, int] | None = None
    prefix: str = ""
    suspect: bool = False


ANYTHING = Selection()


class Position(NamedTuple):
    """Where a job stands among those of its queue, in the order of ``ORDER``."""

    rank: int
    run_after: datetime
    id: int


def now(connection: BaseDatabaseWrapper) -> datetime:
    """Return the database's time."""
    facts = vendor(connection)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {facts.now}", ())
        return facts.read_moment(cursor.fetchone()[0], connection)


def truth(value: bool) -> str:
    """Return the literal of a boolean; an index is used by one, not by a parameter."""
    return "TRUE" if value else "FALSE"


def whole(number: Any) -> int:
    """Return what stands in a column of numbers.

    SQLite lets anything stand anywhere, and counts it as 0.
    """
    return number if isinstance(number, int) else 0


def running_job(connection: BaseDatabaseWrapper, worker: int, row: Any) -> RunningJob:
    """Return a row of ``CLAIMED`` and started_at as the job that ``worker`` runs."""
    facts = vendor(connection)
    columns = list(row)
    for number in _NUMBERS:
        columns[number] = whole(columns[number])
    for moment in _MOMENTS:
        columns[moment] = facts.read_moment(columns[moment], connection)
    return RunningJob(connection.alias, worker, *columns)
