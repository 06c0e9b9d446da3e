"""The end of a run: the fence."""

from collections.abc import Sequence
from functools import lru_cache

from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.context import RunningJob
from async_queue.db import Vendor, vendor
from async_queue.models import TRANSITIONS
from async_queue.statements.rows import JOB


def finish(
    connection: BaseDatabaseWrapper,
    job: RunningJob,
    result: str | None,
    *,
    commits: bool = False,
    begins_next: bool = False,
) -> bool:
    """Make ``job`` SUCCESSFUL if its claim still stands; tell whether it did.

    This is the fence: sent in the job's own transaction, it commits with its effects.
    With ``commits`` it also commits that transaction, where one message can say both;
    if the claim is lost, the caller has to roll back. With ``begins_next`` it also
    begins the transaction of the job that follows, if that message can say it, too.
    """
    facts = vendor(connection)
    sql, params = _finish_sql(facts), (result, job.id, job.worker, job.attempt)
    if commits:
        return facts.conclude(connection, sql, params, begins_next)
    return facts.change(connection, sql, params)


@lru_cache
def _finish_sql(facts: Vendor) -> str:
    move = TRANSITIONS["succeed"]
    (source,) = move.sources
    return (
        f"UPDATE {JOB} SET status = '{move.target}', result = %s, "
        f"finished_at = {facts.now}, worker_id = NULL "
        f"WHERE id = %s AND status = '{source}' AND worker_id = %s AND attempt = %s"
    )


def finish_many(
    connection: BaseDatabaseWrapper, runs: Sequence[tuple[RunningJob, str | None]]
) -> set[tuple[int, int]]:
    """Make jobs SUCCESSFUL whose claims still stand; return their ids and attempts.

    By one fence for all of them, which waits for nobody: a row that somebody has
    locked is left out. Only where `Vendor.begins_late`.
    """
    facts = vendor(connection)
    arrays = (
        [job.id for job, _ in runs],
        [job.worker for job, _ in runs],
        [job.attempt for job, _ in runs],
        [result for _, result in runs],
    )
    return set(facts.change_many(connection, _finish_many_sql(facts), arrays))


@lru_cache
def _finish_many_sql(facts: Vendor) -> str:
    move = TRANSITIONS["succeed"]
    (source,) = move.sources
    # LATERAL, so that each row is looked up: a join may choose to read all that run.
    return (
        "WITH run AS MATERIALIZED (SELECT held.place, done.result "
        "FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::text[]) "
        "AS done (id, worker_id, attempt, result), "
        f"LATERAL (SELECT ctid AS place FROM {JOB} WHERE id = done.id "
        f"AND status = '{source}' AND worker_id = done.worker_id "
        "AND attempt = done.attempt FOR UPDATE SKIP LOCKED) AS held) "
        f"UPDATE {JOB} AS job SET status = '{move.target}', result = run.result, "
        f"finished_at = {facts.now}, worker_id = NULL "
        "FROM run WHERE job.ctid = run.place RETURNING job.id, job.attempt"
    )
