from datetime import timedelta

import pytest
from django.db import connection

from async_queue import claims, codec, schedule, statements
from async_queue.models import Job, Status
from async_queue.statements import NewJob
from tests.factories import JobFactory, WorkerFactory

pytestmark = pytest.mark.django_db


def running():
    row = JobFactory()
    (job,) = claims.claim("default", WorkerFactory().pk, 1)
    return row, job


def new_job(label):
    stored = ("tests.jobs.leave", codec.encode([label], "args"), "{}", "{}")
    identity = codec.identity(*stored[:3])
    return NewJob(*stored, codec.seal(*stored), identity, "default", 0)


def test_insert_keeps_the_order_of_its_rows():
    rows = [new_job(str(number)) for number in range(50)]

    inserted = statements.insert(connection, rows, None)

    stored = dict(Job.objects.values_list("pk", "args"))
    assert [stored[row.id] for row in inserted] == [row.args for row in rows]


def test_insert_gives_all_rows_of_a_statement_one_moment():
    inserted = statements.insert(
        connection, [new_job("a"), new_job("b")], timedelta(hours=1)
    )

    assert len({row.enqueued_at for row in inserted}) == 1
    assert len({row.run_after for row in inserted}) == 1


def test_heads_are_the_queues_with_ready_jobs_best_head_first():
    for queue, rank in [("c", 1), ("a", 2), ("b", 0), ("b", 9), ("a", 5)]:
        JobFactory(queue=queue, rank=rank)
    JobFactory(queue="asleep", waiting=True)
    JobFactory(queue="done", successful=True)

    assert statements.heads(connection) == ["b", "c", "a"]


def test_heads_of_equal_rank_are_told_by_their_wait():
    for queue in ("b", "c", "a"):
        JobFactory(queue=queue)

    assert statements.heads(connection) == ["b", "c", "a"]


def test_heads_of_an_empty_table_are_none():
    assert statements.heads(connection) == []


def test_finish_passes_while_the_claim_stands():
    row, job = running()

    assert statements.finish(connection, job, "[1]")

    row.refresh_from_db()
    assert (row.status, row.worker_id) == (Status.SUCCESSFUL, None)
    assert row.return_value == [1]
    assert row.finished_at >= row.started_at


@pytest.mark.parametrize(
    "change",
    [
        {"attempt": 2},
        {"worker_id": 10**9},
        {"status": Status.READY, "worker_id": None},
    ],
    ids=str,
)
def test_finish_does_not_pass_once_the_claim_is_lost(change):
    row, job = running()
    Job.objects.filter(pk=row.pk).update(**change)

    assert not statements.finish(connection, job, None)

    row.refresh_from_db()
    assert row.finished_at is None


def test_finish_passes_once():
    _, job = running()

    assert statements.finish(connection, job, None)
    assert not statements.finish(connection, job, None)


@pytest.mark.parametrize("state", ["waiting", "ready"])
def test_claim_here_takes_a_job_whether_due_or_not(state):
    row = JobFactory(**{state: True} if state == "waiting" else {})

    job = statements.claim_here(connection, row.pk)

    assert (job.id, job.attempt, job.worker) == (row.pk, 1, 0)
    assert statements.finish(connection, job, None)


@pytest.mark.parametrize("state", ["running", "successful", "failed", "cancelled"])
def test_claim_here_leaves_a_job_that_runs_or_is_finished(state):
    row = JobFactory(**{state: True})

    assert statements.claim_here(connection, row.pk) is None
    assert statements.claim_here(connection, 0) is None


def test_now_moves_on_inside_a_transaction():
    first = statements.now(connection)

    later = schedule("tests.jobs.leave", run_after=timedelta(0)).enqueued_at

    assert first <= later <= statements.now(connection)
    assert first.utcoffset() == timedelta(0)
