"""What every worker does for all: promote what is due, rescue what the dead left.

In small batches in the order of ids, and past rows that somebody holds, so that
nobody waits for it.
"""

import logging
from collections.abc import Iterable

from django.db import connections, transaction

from async_queue.db import Now, vendor
from async_queue.exceptions import WorkerLost
from async_queue.models import Attempt, Job, JobQuerySet, Status, Worker
from async_queue.retries import class_path

logger = logging.getLogger("async_queue")

_BATCH = 500


def promote(alias: str) -> int:
    """Make the WAITING jobs READY whose moment has come; return how many."""
    due = Job.objects.using(alias).filter(status=Status.WAITING, run_after__lte=Now())
    return sum(
        due.filter(pk__in=ids).transition("promote")
        for ids in _batches(due.order_by("run_after", "id"))
    )


def rescue(alias: str, worker: int) -> int:
    """Make the jobs of dead workers READY again, uncharged; return how many.

    A death is proved by taking the lock that only a dead worker does not hold.
    """
    _mark_dead(alias, worker)
    running = Job.objects.using(alias).filter(status=Status.RUNNING)
    # First whose jobs are running, then who lives: a worker lives before it claims.
    holders = set(running.values_list("worker_id", flat=True).distinct())
    living = Worker.objects.using(alias).filter(dead_at=None).in_bulk(holders)
    lost = running.filter(worker_id__in=holders - set(living))
    return sum(_rescue_batch(alias, ids) for ids in _batches(lost.order_by("id")))


def _mark_dead(alias: str, worker: int) -> None:
    connection = connections[alias]
    others = Worker.objects.using(alias).filter(dead_at=None).exclude(pk=worker)
    for other in others:
        with vendor(connection).proof_of_death(connection, other.pk) as is_dead:
            if is_dead and others.filter(pk=other.pk).update(dead_at=Now()):
                logger.warning("worker %s has died; its jobs run again", other)


def _rescue_batch(alias: str, ids: list[int]) -> int:
    rows = Job.objects.using(alias).filter(pk__in=ids)
    Attempt.objects.using(alias).bulk_create(
        Attempt(
            job_id=job.pk,
            number=job.attempt,
            worker_id=job.worker_id,
            started_at=job.started_at,
            finished_at=Now(),
            exception=class_path(WorkerLost),
            message=f"worker {job.worker_id} has died; the job runs again",
            traceback="",
        )
        for job in rows
    )
    return rows.transition("rescue")


def _batches(rows: JobQuerySet) -> Iterable[list[int]]:
    """Yield the ids of ``rows`` in batches, each locked until the next is asked for."""
    connection = connections[rows.db]
    # Most of the time there is nothing, and asking costs no lock.
    while rows.exists():
        with vendor(connection).turn(connection), transaction.atomic(using=rows.db):
            locked = rows.select_for_update(skip_locked=True)
            ids = list(locked.values_list("pk", flat=True)[:_BATCH])
            yield ids
        if len(ids) < _BATCH:
            return
