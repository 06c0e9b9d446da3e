"""The beat of a worker, and what it learns with it: everything in one look."""

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.db import Vendor, vendor
from async_queue.models import Status
from async_queue.statements.rows import JOB, ORDER, WORKER, truth
from async_queue.statements.wakeups import CHANNEL


class Other(NamedTuple):
    """Another worker that nobody has declared dead.

    ``is_free`` tells whether nobody holds the lock of its life, if it ``has_lock``;
    None where the database cannot say so in passing.
    """

    id: int
    beat: int
    threads: int
    has_lock: bool
    is_free: bool | None


class Tick(NamedTuple):
    """What a worker learns with a beat.

    ``is_registered`` is False once the worker was declared dead. ``next_due`` is the
    moment of the first WAITING job, which may have passed. ``running`` counts the
    rows that are RUNNING under this worker; ``has_lost`` tells of any under the dead.
    """

    is_registered: bool
    now: datetime
    others: list[Other]
    has_ready: bool
    has_suspect: bool
    next_due: datetime | None
    running: int
    has_lost: bool


def tick(
    connection: BaseDatabaseWrapper,
    worker: int,
    queues: Sequence[str] = (),
    echo: str | None = None,
) -> Tick:
    """Beat for ``worker``, and return what else is to be known.

    Jobs that are ready are looked for in ``queues``, or in all. On PostgreSQL it is one
    statement, which also sends ``echo`` to all who listen, the sender included. SQLite,
    where a lock alone proves life, has no beat: there it only reads.
    """
    facts = vendor(connection)
    echoes = echo is not None and facts.listens
    params = [worker, *queues, *queues, worker, *([echo] if echoes else [])]
    with connection.cursor() as cursor:
        if _beats_apart(facts):
            cursor.execute(_beat_sql(facts), [worker])
        cursor.execute(_tick_sql(facts, len(queues), echoes), params)
        rows = cursor.fetchall()
    return _as_tick(facts, connection, worker, rows)


def running(connection: BaseDatabaseWrapper, worker: int) -> dict[int, int]:
    """Return the ids of the jobs that are RUNNING under ``worker``, with attempts."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT id, attempt FROM {JOB} "
            f"WHERE status = '{Status.RUNNING}' AND worker_id = %s",
            [worker],
        )
        return dict(cursor.fetchall())


def _as_tick(
    facts: Vendor, connection: BaseDatabaseWrapper, worker: int, rows: list[Any]
) -> Tick:
    is_registered, now, has_ready, has_suspect, due, held, has_lost, *_ = rows[0]
    return Tick(
        is_registered=bool(is_registered),
        now=facts.read_moment(now, connection),
        others=[
            Other(
                number,
                beat,
                threads,
                bool(has_lock),
                None if is_free is None else bool(is_free),
            )
            for *_, number, beat, threads, has_lock, is_free in rows
            if number not in (worker, None)
        ],
        has_ready=bool(has_ready),
        has_suspect=bool(has_suspect),
        next_due=None if due is None else facts.read_moment(due, connection),
        running=held,
        has_lost=bool(has_lost),
    )


def _beats_apart(facts: Vendor) -> bool:
    return not (facts.claims_in_one_statement or facts.runs_one_job_at_a_time)


@lru_cache
def _beat_sql(facts: Vendor) -> str:
    return (
        f"UPDATE {WORKER} SET beat = beat + 1, seen_at = {facts.now} "
        "WHERE id = %s AND dead_at IS NULL"
    )


@lru_cache
def _tick_sql(facts: Vendor, queues: int, echoes: bool) -> str:
    beat = f"SELECT id FROM {WORKER} WHERE id = %s AND dead_at IS NULL"
    if facts.claims_in_one_statement:
        beat = f"{_beat_sql(facts)} RETURNING id"
    free = facts.free_life or "NULL"
    return facts.spell(f"""
WITH beaten AS ({beat})
SELECT EXISTS (SELECT 1 FROM beaten), {facts.now},
    {_has_ready(False, queues)}, {_has_ready(True, queues)},
    (SELECT run_after FROM {JOB} WHERE status = '{Status.WAITING}'
        ORDER BY run_after, id LIMIT 1),
    (SELECT COUNT(*) FROM {JOB}
        WHERE status = '{Status.RUNNING}' AND worker_id = %s),
    (SELECT id FROM {JOB} WHERE status = '{Status.RUNNING}'
        AND worker_id NOT IN (SELECT id FROM {WORKER} WHERE dead_at IS NULL)
        ORDER BY worker_id, id LIMIT 1) IS NOT NULL,
    {f"(SELECT pg_notify('{CHANNEL}', %s))" if echoes else "NULL"},
    worker.id, worker.beat, worker.threads, worker.has_lock, {free}
FROM (SELECT 1 AS present) AS always
LEFT JOIN {WORKER} AS worker ON worker.dead_at IS NULL
""")


def _has_ready(suspect: bool, queues: int) -> str:
    # In the order of the index, so that it is followed whatever the statistics say; of
    # EXISTS they may believe that reading the table finds one soon.
    return " OR ".join(
        f"""(SELECT id FROM {JOB}
        WHERE status = '{Status.READY}' AND suspect = {truth(suspect)}{in_queue}
        ORDER BY queue, {ORDER} LIMIT 1) IS NOT NULL"""
        for in_queue in [" AND queue = %s"] * queues or [""]
    )
