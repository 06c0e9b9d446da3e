from dataclasses import replace
from datetime import timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from async_queue import claims, codec, schedule, schedule_many, statements
from async_queue.db import private, vendor
from async_queue.models import Job, Status, Worker
from async_queue.statements import NewJob, Selection
from tests import jobs
from tests.factories import JobFactory, WorkerFactory, now

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

    assert list(statements.heads(connection)) == ["b", "c", "a"]


def test_heads_of_equal_rank_are_told_by_their_wait():
    for queue in ("b", "c", "a"):
        JobFactory(queue=queue)

    assert list(statements.heads(connection)) == ["b", "c", "a"]


def test_heads_of_an_empty_table_are_none():
    assert list(statements.heads(connection)) == []


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


SUSPECTS = Selection(suspect=True)


@pytest.mark.parametrize(("selection", "label"), [(Selection(), 0), (SUSPECTS, 1)])
def test_claim_takes_suspects_or_the_others_and_never_both(selection, label):
    rows = [JobFactory(), JobFactory(suspect=True)]

    taken = claims.claim("default", WorkerFactory().pk, 5, selection)

    assert [job.id for job in taken] == [rows[label].pk]


def test_heads_are_of_suspects_or_of_the_others():
    JobFactory(queue="calm")
    JobFactory(queue="odd", suspect=True)

    assert list(statements.heads(connection)) == ["calm"]
    assert list(statements.heads(connection, suspect=True)) == ["odd"]


def test_held_job_is_read_as_it_was_claimed():
    _, job = running()

    held = statements.held_job(connection, job.worker, job.id, job.attempt)

    # A claim of two statements tells the moment of the first.
    assert held == replace(job, claimed_at=held.claimed_at)


@pytest.mark.parametrize("change", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_held_job_is_none_once_the_claim_is_lost(change):
    _, job = running()
    claim = (job.worker, job.id, job.attempt)

    wrong = [number + more for number, more in zip(claim, change, strict=True)]

    assert statements.held_job(connection, *wrong) is None


def test_running_tells_the_attempts_of_what_a_worker_holds():
    first, second = WorkerFactory.create_batch(2)
    held = JobFactory(running=True, worker=first, attempt=7)
    JobFactory(running=True, worker=second)
    JobFactory(successful=True)

    assert statements.running(connection, first.pk) == {held.pk: 7}


def test_tick_beats_for_its_worker_alone():
    mine, other = WorkerFactory.create_batch(2)

    seen = statements.tick(connection, mine.pk)

    before = mine.seen_at
    mine.refresh_from_db()
    other.refresh_from_db()
    assert seen.is_registered
    assert before <= mine.seen_at <= seen.now <= now()
    # On SQLite a lock alone proves life: a heart that beats would disturb writers.
    assert mine.beat == (0 if vendor(connection).runs_one_job_at_a_time else 1)
    assert other.beat == 0


def test_tick_sees_the_other_workers_that_live():
    mine = WorkerFactory()
    other = WorkerFactory(beat=5, threads=9, has_lock=False)
    WorkerFactory(dead=True)

    (seen,) = statements.tick(connection, mine.pk).others

    assert seen[:4] == (other.pk, 5, 9, False)


def test_tick_tells_a_worker_that_it_was_declared_dead():
    mine = WorkerFactory(dead=True)
    JobFactory()

    alone = statements.tick(connection, mine.pk)
    WorkerFactory()
    among_others = statements.tick(connection, mine.pk)

    mine.refresh_from_db()
    assert mine.beat == 0
    for seen in (alone, among_others):
        assert (seen.is_registered, seen.has_ready) == (False, True)
    assert (len(alone.others), len(among_others.others)) == (0, 1)


@pytest.mark.skipif(connection.vendor != "sqlite", reason="others make no such index")
@pytest.mark.django_db(transaction=True)
def test_tick_of_a_file_makes_no_index_of_its_own():
    schedule_many([(jobs.leave,)] * 5000, run_after=timedelta(hours=1))
    worker = WorkerFactory()
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")

    with private("default") as own:
        with CaptureQueriesContext(own) as sent:
            statements.tick(own, worker.pk)
        plan = own.connection.execute(f"EXPLAIN QUERY PLAN {sent[-1]['sql']}")
        assert "AUTOMATIC" not in str(plan.fetchall())


def test_tick_of_an_empty_table_finds_nothing():
    seen = statements.tick(connection, WorkerFactory().pk)

    assert seen[2:] == ([], False, False, None, 0, False)


def test_tick_tells_ready_jobs_from_suspects():
    worker = WorkerFactory().pk

    JobFactory(suspect=True)
    first = statements.tick(connection, worker)
    JobFactory()
    second = statements.tick(connection, worker)

    assert (first.has_ready, first.has_suspect) == (False, True)
    assert (second.has_ready, second.has_suspect) == (True, True)


def test_tick_looks_into_the_given_queues():
    worker = WorkerFactory().pk
    JobFactory(queue="b")
    JobFactory(queue="d", suspect=True)

    found = [
        statements.tick(connection, worker, queues)[3:5]
        for queues in ([], ["a", "b"], ["a"], ["d", "a"])
    ]

    assert found == [(True, True), (True, False), (False, False), (False, True)]


def test_tick_tells_when_the_next_waiting_job_is_due():
    first = JobFactory(waiting=True)
    JobFactory(waiting=True, run_after=first.run_after + timedelta(hours=1))
    JobFactory()

    seen = statements.tick(connection, WorkerFactory().pk)

    assert seen.next_due == first.run_after
    assert seen.next_due > seen.now


def test_tick_counts_what_runs_under_its_worker():
    mine = WorkerFactory()
    JobFactory.create_batch(2, running=True, worker=mine)
    JobFactory(running=True)

    assert statements.tick(connection, mine.pk).running == 2


@pytest.mark.parametrize("holder", ["dead", "gone"])
def test_tick_tells_of_jobs_that_run_under_nobody(holder):
    mine = WorkerFactory()
    JobFactory(running=True)

    before = statements.tick(connection, mine.pk)
    JobFactory(running=True, worker=WorkerFactory(dead=True))
    if holder == "gone":
        Worker.objects.exclude(dead_at=None).delete()
    after = statements.tick(connection, mine.pk)

    assert (before.has_lost, after.has_lost) == (False, True)


def test_tick_of_an_idle_worker_is_one_statement():
    worker = WorkerFactory().pk
    facts = vendor(connection)
    one = facts.claims_in_one_statement or facts.runs_one_job_at_a_time

    with CaptureQueriesContext(
        connection,
    ) as sent:
        statements.tick(connection, worker, ["a", "b"], echo="echo:1")

    assert len(sent) == (1 if one else 2)


def test_a_worker_wants_wakeups_until_it_does_not():
    worker = WorkerFactory()

    for wanted in (True, False):
        statements.want_wakeup(connection, worker.pk, wanted)

        worker.refresh_from_db()
        assert worker.wants_wakeup is wanted
