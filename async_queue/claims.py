"""Taking READY jobs for a worker, and giving back what was not begun.

Called by the dispatcher of a worker on its private connection.
"""

from collections.abc import Iterable

from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import F
from django.db.models.functions import Left, Mod

from async_queue import hooks, statements
from async_queue.context import RunningJob
from async_queue.db import persist, vendor
from async_queue.models import Job, JobQuerySet
from async_queue.statements import ANYTHING, Selection


def claim(
    alias: str, worker: int, limit: int, selection: Selection = ANYTHING
) -> list[RunningJob]:
    """Take up to ``limit`` jobs for ``worker``, in the order in which they should run.

    Without queues in the selection, those that have READY jobs are visited, the one
    with the job of the highest priority and the longest wait first.
    """
    connection = connections[alias]
    queues = selection.queues or statements.heads(connection)
    jobs: list[RunningJob] = []
    for queue in queues:
        if len(jobs) == limit:
            break
        jobs += _claim_one_queue(
            connection, worker, queue, limit - len(jobs), selection
        )
    hooks.point("after_claim")
    return jobs


def due(alias: str, selection: Selection) -> JobQuerySet:
    """Return what a pass with this selection would find now, in its order."""
    jobs = Job.objects.using(alias).due()
    if selection.queues:
        jobs = jobs.filter(queue__in=selection.queues)
    if selection.shard:
        which, out_of = selection.shard
        jobs = jobs.alias(shard=Mod(F("id"), out_of)).filter(shard=which)
    if prefix := selection.prefix:
        # Not startswith, to which SQLite's LIKE makes capitals the same.
        jobs = jobs.alias(start=Left("function", len(prefix))).filter(start=prefix)
    return jobs


def release(alias: str, worker: int, jobs: Iterable[RunningJob]) -> int:
    """Give ``jobs`` back, uncharged; return how many still were the worker's."""
    connection = connections[alias]
    rows = Job.objects.using(alias).filter(
        pk__in=[job.id for job in jobs], worker_id=worker
    )
    with vendor(connection).turn(connection), transaction.atomic(using=alias):
        return rows.transition("release")


def _claim_one_queue(
    connection: BaseDatabaseWrapper,
    worker: int,
    queue: str,
    limit: int,
    selection: Selection,
) -> list[RunningJob]:
    def act() -> list[RunningJob]:
        with vendor(connection).turn(connection):
            return statements.claim(connection, worker, queue, limit, selection)

    return persist(connection, act)
