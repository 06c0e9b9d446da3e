"""The claim: which queues have READY jobs, and taking them for a worker."""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.context import RunningJob
from async_queue.db import Vendor, vendor
from async_queue.models import TRANSITIONS, Status
from async_queue.statements.rows import (
    ATTEMPT,
    CLAIMED,
    CLAIMED_NAMES,
    JOB,
    ORDER,
    Position,
    Selection,
    running_job,
    truth,
    whole,
)

# The worker of a job that is executed by hand: real ones count from 1.
_NOBODY = 0


class _Restricted(NamedTuple):
    """By what a claim is restricted: it decides about the statement's text."""

    suspect: bool
    until: bool
    shard: bool
    prefix: bool
    start: bool


def heads(
    connection: BaseDatabaseWrapper, suspect: bool = False
) -> dict[str, Position]:
    """Return the queues that have READY rows, with where the first of them stands.

    The queue whose turn it is comes first. Only suspects count, or only the others.
    """
    facts = vendor(connection)
    with connection.cursor() as cursor:
        if facts.seeks_in_recursion:
            cursor.execute(_heads_sql(facts, suspect), ())
            rows = cursor.fetchall()
        else:
            rows = sorted(_probe_heads(cursor, facts, suspect))
    return _as_heads(connection, rows)


def heads_from(
    connection: BaseDatabaseWrapper, known: Mapping[str, Position], suspect: bool
) -> dict[str, Position]:
    """Return what `heads` does, but of the ``known`` queues only, from there on.

    Only where the database keeps dead entries: this is how not to step over them.
    """
    ranks, moments, numbers = zip(*known.values(), strict=True)
    columns = list(map(list, (known, ranks, moments, numbers)))
    with connection.cursor() as cursor:
        cursor.execute(_heads_from_sql(suspect), columns)
        return _as_heads(connection, cursor.fetchall())


def claim(
    connection: BaseDatabaseWrapper,
    worker: int,
    queue: str,
    limit: int,
    selection: Selection,
    start: Position | None = None,
) -> list[RunningJob]:
    """Make up to ``limit`` READY rows of ``queue`` RUNNING; return them in order.

    Only those from ``start`` on, if it is given.
    """
    facts = vendor(connection)
    picks = _pick_params(facts, queue, limit, selection, start)
    restricted = _Restricted(
        selection.suspect,
        selection.until is not None,
        selection.shard is not None,
        bool(selection.prefix),
        start is not None,
    )
    if facts.claims_in_one_statement:
        sql = _claim_sql(facts, restricted)
        rows = facts.take(connection, sql, [*picks, worker])
    else:
        with connection.cursor() as cursor:
            rows = _pick_then_take(cursor, connection, worker, picks, restricted)
    jobs = [running_job(connection, worker, row) for row in rows]
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
        columns = facts.spell(f"{CLAIMED}, started_at")
        cursor.execute(f"SELECT {columns} FROM {JOB} WHERE id = %s", [number])
        return running_job(connection, _NOBODY, cursor.fetchone())


def held_job(
    connection: BaseDatabaseWrapper, worker: int, number: int, attempt: int
) -> RunningJob | None:
    """Return the job of this claim; None if the claim stands no more."""
    with connection.cursor() as cursor:
        cursor.execute(_held_sql(vendor(connection)), [number, worker, attempt])
        row = cursor.fetchone()
    return row and running_job(connection, worker, row)


@lru_cache
def _heads_sql(facts: Vendor, suspect: bool) -> str:
    # From the head of one queue to the head of the next by one probe of the index
    # each: DISTINCT would read every READY row.
    return facts.spell(f"""
WITH RECURSIVE heads (id) AS (
    SELECT id FROM (
        SELECT id FROM {JOB}
        WHERE status = '{Status.READY}' AND suspect = {truth(suspect)}
        ORDER BY queue, {ORDER} LIMIT 1
    ) AS first
    UNION ALL
    SELECT (
        SELECT next.id FROM {JOB} AS next
        WHERE next.status = '{Status.READY}' AND next.suspect = {truth(suspect)}
        AND next.queue > (
            SELECT this.queue FROM {JOB} AS this WHERE this.id = heads.id
        )
        ORDER BY next.queue, next."rank", next.run_after, next.id LIMIT 1
    )
    FROM heads WHERE heads.id IS NOT NULL
)
SELECT job."rank", job.run_after, job.id, job.queue
FROM heads JOIN {JOB} AS job ON job.id = heads.id
ORDER BY job."rank", job.run_after, job.id
""")


@lru_cache
def _heads_from_sql(suspect: bool) -> str:
    return f"""
SELECT head."rank", head.run_after, head.id, known.queue
FROM unnest(%s::text[], %s::smallint[], %s::timestamptz[], %s::bigint[])
    AS known (queue, "rank", run_after, id)
CROSS JOIN LATERAL (
    SELECT {ORDER} FROM {JOB} AS job
    WHERE job.status = '{Status.READY}' AND job.suspect = {truth(suspect)}
    AND job.queue = known.queue AND (job."rank", job.run_after, job.id)
        >= (known."rank", known.run_after, known.id)
    ORDER BY {ORDER} LIMIT 1
) AS head
ORDER BY head."rank", head.run_after, head.id
"""


def _as_heads(
    connection: BaseDatabaseWrapper, rows: Iterable[Any]
) -> dict[str, Position]:
    facts = vendor(connection)
    return {
        queue: Position(whole(rank), facts.read_moment(run_after, connection), number)
        for rank, run_after, number, queue in rows
    }


def _probe_heads(cursor: Any, facts: Vendor, suspect: bool) -> Iterator[Any]:
    """Yield the order and the queue of each head, found by a statement each."""
    queue = ""
    while True:
        cursor.execute(_next_head_sql(facts, suspect), [queue])
        if (head := cursor.fetchone()) is None:
            return
        yield head
        queue = head[-1]


@lru_cache
def _next_head_sql(facts: Vendor, suspect: bool) -> str:
    return facts.spell(
        f"SELECT {ORDER}, queue FROM {JOB} "
        f"WHERE status = '{Status.READY}' AND suspect = {truth(suspect)} "
        f"AND queue > %s ORDER BY queue, {ORDER} LIMIT 1"
    )


def _pick_params(
    facts: Vendor,
    queue: str,
    limit: int,
    selection: Selection,
    start: Position | None,
) -> list[Any]:
    params: list[Any] = [queue]
    if start is not None:
        params += [start.rank, facts.write_moment(start.run_after), start.id]
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
    facts: Vendor, columns: str, restricted: _Restricted, locking: str
) -> str:
    (source,) = TRANSITIONS["claim"].sources
    return facts.spell(
        f"SELECT {columns} FROM {JOB} WHERE status = '{source}' "
        f"AND suspect = {truth(restricted.suspect)} AND queue = %s"
        + (f" AND ({ORDER}) >= (%s, %s, %s)" if restricted.start else "")
        + (" AND run_after <= %s AND enqueued_at <= %s" if restricted.until else "")
        + (" AND MOD(id, %s) = %s" if restricted.shard else "")
        + (' AND SUBSTR("function", 1, %s) = %s' if restricted.prefix else "")
        + f" ORDER BY {ORDER} LIMIT %s {locking}"
    )


@lru_cache
def _claim_sql(facts: Vendor, restricted: _Restricted) -> str:
    # A subquery instead of the CTE would be run again for each row and claim more
    # than its LIMIT under stale statistics.
    pick = _pick_sql(facts, "id", restricted, "FOR UPDATE SKIP LOCKED")
    columns = ", ".join(f"job.{name}" for name in CLAIMED_NAMES)
    return (
        f"WITH picked AS MATERIALIZED ({pick}) UPDATE {JOB} AS job "
        f"SET status = '{TRANSITIONS['claim'].target}', attempt = attempt + 1, "
        f"worker_id = %s, started_at = {facts.now} "
        f"FROM picked WHERE job.id = picked.id RETURNING {columns}, started_at"
    )


def _pick_then_take(
    cursor: Any,
    connection: BaseDatabaseWrapper,
    worker: int,
    picks: list[Any],
    restricted: _Restricted,
) -> list[Any]:
    facts = vendor(connection)
    skips = connection.features.has_select_for_update_skip_locked
    locking = "FOR UPDATE SKIP LOCKED" if skips else ""
    with transaction.atomic(using=connection.alias):
        columns = f"{CLAIMED}, {facts.now}"
        cursor.execute(_pick_sql(facts, columns, restricted, locking), picks)
        rows = [list(row) for row in cursor.fetchall()]
        for row in rows:
            row[ATTEMPT] = whole(row[ATTEMPT]) + 1
        if rows:
            ids = [row[0] for row in rows]
            cursor.execute(_take_sql(facts, len(ids)), [worker, *ids])
    return rows


@lru_cache
def _take_sql(facts: Vendor, rows: int) -> str:
    ids = ", ".join(["%s"] * rows)
    return (
        f"UPDATE {JOB} SET status = '{TRANSITIONS['claim'].target}', "
        f"attempt = attempt + 1, worker_id = %s, started_at = {facts.now} "
        f"WHERE id IN ({ids})"
    )


@lru_cache
def _claim_here_sql(facts: Vendor) -> str:
    move = TRANSITIONS["execute"]
    sources = ", ".join(f"'{source}'" for source in move.sources)
    return (
        f"UPDATE {JOB} SET status = '{move.target}', attempt = attempt + 1, "
        f"worker_id = %s, started_at = {facts.now} "
        f"WHERE id = %s AND status IN ({sources})"
    )


@lru_cache
def _held_sql(facts: Vendor) -> str:
    return facts.spell(
        f"SELECT {CLAIMED}, started_at FROM {JOB} WHERE id = %s "
        f"AND status = '{Status.RUNNING}' AND worker_id = %s AND attempt = %s"
    )
