"""The prepared SQL of a job's path: insert, claim, finish.

The ORM would cost several times the statement itself here. Conditions and targets
come from `TRANSITIONS`; what differs between databases, from `db`.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.context import RunningJob
from async_queue.db import Vendor, vendor
from async_queue.models import TRANSITIONS, Job, Status

# The worker of a job that is executed by hand: real ones count from 1.
_NOBODY = 0

_JOB = Job._meta.db_table
# Quoted are the names that MySQL 8 reserves; `Vendor.spell` knows its quotes.
_ORDER = '"rank", run_after, id'
_CLAIMED = (
    'id, "function", args, kwargs, meta, seal, queue, "rank", run_after, enqueued_at, '
    "attempt, failures"
)
_CLAIMED_NAMES = _CLAIMED.split(", ")
_ATTEMPT = _CLAIMED_NAMES.index("attempt")
_NUMBERS = [_CLAIMED_NAMES.index(name) for name in ('"rank"', "attempt", "failures")]
_STARTED_AT = len(_CLAIMED_NAMES)  # stands last in what a claim reads
_MOMENTS = (*map(_CLAIMED_NAMES.index, ("run_after", "enqueued_at")), _STARTED_AT)


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
    beginning of the function's path.
    """

    queues: tuple[str, ...] = ()
    until: datetime | None = None
    shard: tuple[int, int] | None = None
    prefix: str = ""


ANYTHING = Selection()


def now(connection: BaseDatabaseWrapper) -> datetime:
    """Return the database's time."""
    facts = vendor(connection)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {facts.now}", ())
        return facts.read_moment(cursor.fetchone()[0], connection)


def insert(
    connection: BaseDatabaseWrapper,
    rows: Sequence[NewJob],
    run_after: datetime | timedelta | None,
) -> list[InsertedJob]:
    """Insert ``rows`` and return what they became, in their order.

    By one statement, where the database then tells; by one for each row on MySQL.
    """
    facts = vendor(connection)
    returning = connection.features.can_return_rows_from_bulk_insert
    if not returning and len(rows) > 1:
        return [insert(connection, [row], run_after)[0] for row in rows]
    sql = _insert_sql(facts, len(rows), _kind(run_after), returning)
    params = [item for row in rows for item in (*row, *_moment(facts, run_after))]
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        if not returning:
            columns = ", ".join(InsertedJob._fields)
            sql = f"SELECT {columns} FROM {_JOB} WHERE id = %s"
            cursor.execute(sql, [cursor.lastrowid])
        inserted = cursor.fetchall()
    return [
        InsertedJob(
            number,
            status,
            facts.read_moment(due, connection),
            facts.read_moment(enqueued, connection),
        )
        # RETURNING keeps no order, but the ids were given in ours.
        for number, status, due, enqueued in sorted(inserted)
    ]


def heads(connection: BaseDatabaseWrapper) -> list[str]:
    """Return the queues that have READY rows, the one whose turn it is first."""
    facts = vendor(connection)
    with connection.cursor() as cursor:
        if not facts.seeks_in_recursion:
            return [queue for *_, queue in sorted(_probe_heads(cursor, facts))]
        cursor.execute(_heads_sql(facts), ())
        return [queue for (queue,) in cursor.fetchall()]


def claim(
    connection: BaseDatabaseWrapper,
    worker: int,
    queue: str,
    limit: int,
    selection: Selection,
) -> list[RunningJob]:
    """Make up to ``limit`` READY rows of ``queue`` RUNNING; return them in order."""
    facts = vendor(connection)
    picks = _pick_params(facts, queue, limit, selection)
    restricted = (
        selection.until is not None,
        selection.shard is not None,
        bool(selection.prefix),
    )
    with connection.cursor() as cursor:
        if facts.claims_in_one_statement:
            cursor.execute(_claim_sql(facts, restricted), [*picks, worker])
            rows = cursor.fetchall()
        else:
            rows = _pick_then_take(cursor, connection, worker, picks, restricted)
    jobs = [_running(connection, worker, row) for row in rows]
    # RETURNING keeps no order.
    return sorted(jobs, key=lambda job: (job.rank, job.run_after, job.id))


def claim_here(connection: BaseDatabaseWrapper, number: int) -> RunningJob | None:
    """Make the job RUNNING inside the caller's transaction, due or not.

    Nobody else ever sees this claim: it ends with the transaction, so it is no
    worker's. Return None for a job that is running or finished.
    """
    facts = vendor(connection)
    with connection.cursor() as cursor:
        cursor.execute(_claim_here_sql(facts), [_NOBODY, number])
        if cursor.rowcount != 1:
            return None
        columns = facts.spell(f"{_CLAIMED}, started_at")
        cursor.execute(f"SELECT {columns} FROM {_JOB} WHERE id = %s", [number])
        return _running(connection, _NOBODY, cursor.fetchone())


def finish(
    connection: BaseDatabaseWrapper, job: RunningJob, result: str | None
) -> bool:
    """Make ``job`` SUCCESSFUL if its claim still stands; tell whether it did.

    This is the fence: sent in the job's own transaction, it commits with its effects.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            _finish_sql(vendor(connection)),
            (result, job.id, job.worker, job.attempt),
        )
        return bool(cursor.rowcount == 1)


def _kind(run_after: datetime | timedelta | None) -> str:
    if run_after is None:
        return "now"
    return "shifted" if isinstance(run_after, timedelta) else "given"


def _moment(facts: Vendor, run_after: datetime | timedelta | None) -> tuple[Any, ...]:
    if run_after is None:
        return ()
    if isinstance(run_after, timedelta):
        return (facts.shift(run_after.total_seconds()),) * 2
    return (facts.write_moment(run_after),) * 2


@lru_cache
def _insert_sql(facts: Vendor, rows: int, kind: str, returning: bool) -> str:
    due = facts.shifted_now if kind == "shifted" else "%s"
    status = (
        f"CASE WHEN {due} > {facts.now} "
        f"THEN '{Status.WAITING}' ELSE '{Status.READY}' END"
    )
    if kind == "now":
        due, status = facts.now, f"'{Status.READY}'"
    columns = ", ".join(f'"{name}"' for name in NewJob._fields)
    given = ", ".join(["%s"] * len(NewJob._fields))
    values = ", ".join([f"({given}, {status}, {due}, {facts.now}, 0, 0)"] * rows)
    return facts.spell(
        f"INSERT INTO {_JOB} "
        f"({columns}, status, run_after, enqueued_at, attempt, failures) "
        f"VALUES {values}"
        + (f" RETURNING {', '.join(InsertedJob._fields)}" if returning else "")
    )


@lru_cache
def _heads_sql(facts: Vendor) -> str:
    # From the head of one queue to the head of the next by one probe of the index
    # each: DISTINCT would read every READY row.
    return facts.spell(f"""
WITH RECURSIVE heads (id) AS (
    SELECT id FROM (
        SELECT id FROM {_JOB} WHERE status = '{Status.READY}'
        ORDER BY queue, {_ORDER} LIMIT 1
    ) AS first
    UNION ALL
    SELECT (
        SELECT next.id FROM {_JOB} AS next
        WHERE next.status = '{Status.READY}' AND next.queue > (
            SELECT this.queue FROM {_JOB} AS this WHERE this.id = heads.id
        )
        ORDER BY next.queue, next."rank", next.run_after, next.id LIMIT 1
    )
    FROM heads WHERE heads.id IS NOT NULL
)
SELECT job.queue FROM heads JOIN {_JOB} AS job ON job.id = heads.id
ORDER BY job."rank", job.run_after, job.id
""")


def _probe_heads(cursor: Any, facts: Vendor) -> Iterator[Any]:
    """Yield the order and the queue of each head, found by a statement each."""
    queue = ""
    while True:
        cursor.execute(_next_head_sql(facts), [queue])
        if (head := cursor.fetchone()) is None:
            return
        yield head
        queue = head[-1]


@lru_cache
def _next_head_sql(facts: Vendor) -> str:
    return facts.spell(
        f"SELECT {_ORDER}, queue FROM {_JOB} WHERE status = '{Status.READY}' "
        f"AND queue > %s ORDER BY queue, {_ORDER} LIMIT 1"
    )


def _pick_params(
    facts: Vendor, queue: str, limit: int, selection: Selection
) -> list[Any]:
    params: list[Any] = [queue]
    if selection.until is not None:
        params += [facts.write_moment(selection.until)] * 2
    if selection.shard is not None:
        which, out_of = selection.shard
        params += [out_of, which]
    if selection.prefix:
        params += [len(selection.prefix), selection.prefix]
    return [*params, limit]


@lru_cache
def _pick_sql(
    facts: Vendor, columns: str, restricted: tuple[bool, bool, bool], locking: str
) -> str:
    until, shard, prefix = restricted
    (source,) = TRANSITIONS["claim"].sources
    return facts.spell(
        f"SELECT {columns} FROM {_JOB} WHERE status = '{source}' AND queue = %s"
        + (" AND run_after <= %s AND enqueued_at <= %s" if until else "")
        + (" AND MOD(id, %s) = %s" if shard else "")
        + (' AND SUBSTR("function", 1, %s) = %s' if prefix else "")
        + f" ORDER BY {_ORDER} LIMIT %s {locking}"
    )


@lru_cache
def _claim_sql(facts: Vendor, restricted: tuple[bool, bool, bool]) -> str:
    # A subquery instead of the CTE would be run again for each row and claim more
    # than its LIMIT under stale statistics.
    pick = _pick_sql(facts, "id", restricted, "FOR UPDATE SKIP LOCKED")
    columns = ", ".join(f"job.{name}" for name in _CLAIMED_NAMES)
    return (
        f"WITH picked AS MATERIALIZED ({pick}) UPDATE {_JOB} AS job "
        f"SET status = '{TRANSITIONS['claim'].target}', attempt = attempt + 1, "
        f"worker_id = %s, started_at = {facts.now} "
        f"FROM picked WHERE job.id = picked.id RETURNING {columns}, started_at"
    )


def _pick_then_take(
    cursor: Any,
    connection: BaseDatabaseWrapper,
    worker: int,
    picks: list[Any],
    restricted: tuple[bool, bool, bool],
) -> list[Any]:
    facts = vendor(connection)
    skips = connection.features.has_select_for_update_skip_locked
    locking = "FOR UPDATE SKIP LOCKED" if skips else ""
    with transaction.atomic(using=connection.alias):
        columns = f"{_CLAIMED}, {facts.now}"
        cursor.execute(_pick_sql(facts, columns, restricted, locking), picks)
        rows = [list(row) for row in cursor.fetchall()]
        for row in rows:
            row[_ATTEMPT] = _whole(row[_ATTEMPT]) + 1
        if rows:
            ids = [row[0] for row in rows]
            cursor.execute(_take_sql(facts, len(ids)), [worker, *ids])
    return rows


@lru_cache
def _take_sql(facts: Vendor, rows: int) -> str:
    ids = ", ".join(["%s"] * rows)
    return (
        f"UPDATE {_JOB} SET status = '{TRANSITIONS['claim'].target}', "
        f"attempt = attempt + 1, worker_id = %s, started_at = {facts.now} "
        f"WHERE id IN ({ids})"
    )


@lru_cache
def _claim_here_sql(facts: Vendor) -> str:
    move = TRANSITIONS["execute"]
    sources = ", ".join(f"'{source}'" for source in move.sources)
    return (
        f"UPDATE {_JOB} SET status = '{move.target}', attempt = attempt + 1, "
        f"worker_id = %s, started_at = {facts.now} "
        f"WHERE id = %s AND status IN ({sources})"
    )


@lru_cache
def _finish_sql(facts: Vendor) -> str:
    move = TRANSITIONS["succeed"]
    (source,) = move.sources
    return (
        f"UPDATE {_JOB} SET status = '{move.target}', result = %s, "
        f"finished_at = {facts.now}, worker_id = NULL "
        f"WHERE id = %s AND status = '{source}' AND worker_id = %s AND attempt = %s"
    )


def _whole(number: Any) -> int:
    # SQLite lets anything stand anywhere, and counts it as 0.
    return number if isinstance(number, int) else 0


def _running(connection: BaseDatabaseWrapper, worker: int, row: Any) -> RunningJob:
    facts = vendor(connection)
    columns = list(row)
    for number in _NUMBERS:
        columns[number] = _whole(columns[number])
    for moment in _MOMENTS:
        columns[moment] = facts.read_moment(columns[moment], connection)
    return RunningJob(connection.alias, worker, *columns)
