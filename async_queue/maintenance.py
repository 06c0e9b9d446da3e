"""What every worker does for all: promote, rescue, prune.

In small batches in the order of ids, and past rows that somebody holds, so that
nobody waits for it.
"""

import logging
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial

from django.db import connections, transaction
from django.db.models import Exists, OuterRef, Q

from async_queue import conf, hooks
from async_queue.context import Report
from async_queue.db import Now, vendor
from async_queue.exceptions import WorkerLost
from async_queue.models import (
    FINAL,
    Attempt,
    Job,
    JobQuerySet,
    Progress,
    Status,
    Worker,
)
from async_queue.retries import class_path
from async_queue.tracebacks import storable

logger = logging.getLogger("async_queue")

_BATCH = 500
_CHUNKS = 20  # of that size
_NOTE = 255  # bytes, so no more characters
# Dead workers are remembered for whoever asks what has happened.
_WORKERS_KEPT = timedelta(days=1)


def promote(alias: str) -> int:
    """Make the WAITING jobs READY whose moment has come; return how many."""
    due = Job.objects.using(alias).filter(status=Status.WAITING, run_after__lte=Now())
    promoted = _in_batches(
        due.order_by("run_after", "id"),
        lambda ids: due.filter(pk__in=ids).transition("promote"),
    )
    hooks.point("after_promote")
    return promoted


def bury(alias: str, worker: int) -> bool:
    """Mark a worker dead, if its lock proves that it is; tell whether it was."""
    connection = connections[alias]
    rows = Worker.objects.using(alias).filter(pk=worker, dead_at=None)
    with vendor(connection).proof_of_death(connection, worker) as is_dead:
        if not is_dead:
            return False
        with vendor(connection).turn(connection):
            buried = bool(rows.update(dead_at=Now()))
    hooks.point("after_burial")
    return buried


def bury_unproved(alias: str, worker: int, beat: int) -> bool:
    """Mark a worker dead that has no lock, if its heart still stands at ``beat``."""
    rows = Worker.objects.using(alias).filter(pk=worker, dead_at=None, beat=beat)
    buried = bool(rows.update(dead_at=Now()))
    hooks.point("after_burial")
    return buried


def rescue(alias: str) -> int:
    """Make the jobs of dead workers READY again, uncharged; return how many.

    One that lost its worker before becomes a suspect: a kill from outside hits a job
    once, but a job that kills its process does so each time.
    """
    running = Job.objects.using(alias).filter(status=Status.RUNNING)
    living = Worker.objects.using(alias).filter(pk=OuterRef("worker_id"), dead_at=None)
    # Named before any row is locked: a row may be given to a worker that this query
    # does not know yet, but numbers of workers are not used again.
    dead = set(running.filter(~Exists(living)).values_list("worker_id", flat=True))
    lost = running.filter(worker_id__in=dead).order_by("id")
    rescued = _in_batches(lost, partial(_rescue_batch, alias)) if dead else 0
    if rescued:
        logger.warning("%s of dead workers made ready again", _jobs(rescued))
    hooks.point("after_rescue")
    return rescued


def write_progress(alias: str, reports: Mapping[int, Report]) -> None:
    """Write how far these jobs say they are."""
    connection = connections[alias]
    rows = [
        Progress(
            job_id=job,
            done=report.done,
            total=report.total,
            note=storable(str(report.note), _NOTE),
        )
        for job, report in sorted(reports.items())
    ]
    names_target = connection.features.supports_update_conflicts_with_target
    with vendor(connection).turn(connection), transaction.atomic(using=alias):
        Progress.objects.using(alias).bulk_create(
            rows,
            update_conflicts=True,
            update_fields=["done", "total", "note"],
            unique_fields=["job"] if names_target else None,
        )


def prune(alias: str, after: int = 0) -> int | None:
    """Delete what has been finished for longer than RETENTION, among the next jobs.

    These are the first 500 whose ids are above ``after``. Return the last of the ids,
    with which to go on; None if nothing behind them can be old enough. There is no
    index for this: ids and moments grow together.
    """
    kept = _retention()
    if not kept:
        return None
    jobs = Job.objects.using(alias).filter(pk__gt=after).order_by("pk")
    chunk = list(jobs.values_list("pk", "enqueued_at")[:_BATCH])
    if not chunk:
        return None
    old = Q()
    for status, age in kept.items():
        old |= Q(status=status, finished_at__lt=Now(after=-age))
    # By their ids: a finished job is nobody's, so there is nothing to wait for.
    ids = jobs.filter(old, pk__lte=chunk[-1][0]).values_list("pk", flat=True)
    _delete(alias, list(ids))
    is_young = jobs.filter(
        pk=chunk[-1][0], enqueued_at__gte=Now(after=-min(kept.values()))
    )
    is_last = len(chunk) < _BATCH or is_young.exists()
    return None if is_last else int(chunk[-1][0])


def prune_some(alias: str) -> None:
    """Do at once, and for some thousands of jobs, what `prune` does in many steps."""
    after = 0
    for _ in range(_CHUNKS):
        if (last := prune(alias, after)) is None:
            prune_workers(alias)
            return
        after = last


def prune_workers(alias: str) -> None:
    """Forget the workers that died more than a day ago."""
    connection = connections[alias]
    dead = Worker.objects.using(alias).filter(dead_at__lt=Now(after=-_WORKERS_KEPT))
    if dead.exists():
        with vendor(connection).turn(connection):
            dead.delete()


def _retention() -> dict[str, timedelta]:
    ages = conf.settings().retention
    return {
        status: age for status in FINAL if (age := ages[status.lower()]) is not None
    }


def _delete(alias: str, ids: list[int]) -> None:
    if not ids:
        return
    connection = connections[alias]
    finished = Job.objects.using(alias).filter(pk__in=ids, status__in=FINAL)
    with vendor(connection).turn(connection), transaction.atomic(using=alias):
        if connection.features.has_select_for_update_skip_locked:
            finished = finished.select_for_update(skip_locked=True)
        # With their attempts and their progress.
        Job.objects.using(alias).filter(
            pk__in=list(finished.values_list("pk", flat=True))
        ).delete()


def _rescue_batch(alias: str, ids: list[int]) -> int:
    rows = Job.objects.using(alias).filter(pk__in=ids)
    lost_before = Attempt.objects.using(alias).filter(
        job__in=ids, exception=class_path(WorkerLost)
    )
    suspects = set(lost_before.values_list("job_id", flat=True))
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
    rescued = rows.filter(pk__in=suspects).transition("rescue", suspect=True)
    return rescued + rows.exclude(pk__in=suspects).transition("rescue")


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


def _in_batches(rows: JobQuerySet, act: Callable[[list[int]], int]) -> int:
    """Call ``act`` with the ids of ``rows``, batch by batch, locked; return its sum.

    No generator yields them: after an error the garbage collector would end its
    transaction, in whatever thread it runs, and there that of another connection.
    """
    connection = connections[rows.db]
    count = 0
    # Most of the time there is nothing, and asking costs no lock.
    while rows.exists():
        with vendor(connection).turn(connection), transaction.atomic(using=rows.db):
            ids = list(rows.unlocked().values_list("pk", flat=True)[:_BATCH])
            count += act(ids)
        if len(ids) < _BATCH:
            break
    return count
