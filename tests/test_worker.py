import os
import subprocess
import sys
import threading
from contextvars import ContextVar
from datetime import timedelta
from itertools import pairwise
from queue import SimpleQueue

import pytest
from django.db import Error, OperationalError, connection, connections, transaction
from django.db.backends.signals import connection_created

from async_queue import cancel, hooks, schedule, worker
from async_queue.context import RunningJob
from async_queue.db import libpq, vendor
from async_queue.exceptions import InsideTransaction
from async_queue.keeper import Keeper
from async_queue.models import Attempt, Job, Status, Worker
from async_queue.statements import Selection
from tests import jobs
from tests.factories import JobFactory, now
from tests.models import Effect
from tests.process import ROOT
from tests.stepping import database_settings, elsewhere, one_pass

SESSION = {
    "postgresql": "SELECT pg_backend_pid()",
    "mysql": "SELECT connection_id()",
}
END_SESSION = {"postgresql": "SELECT pg_terminate_backend(%s)", "mysql": "KILL %s"}
pytestmark = pytest.mark.django_db(transaction=True)
is_serial = vendor(connection).runs_one_job_at_a_time
parallel = pytest.mark.skipif(is_serial, reason="one job runs at a time here")


def flush(threads=2, **options):
    made = one_pass(threads, **options)
    made.run()
    return made


def make_prefetch(made):
    """Let the pass believe that jobs are short."""
    made._intake.note_run(0.0)


def cut_off(made, gate):
    """End the dispatcher's session at its second claim."""
    if not made.outcomes:
        return
    connection = connections["default"]
    with connection.cursor() as cursor:
        cursor.execute(SESSION[connection.vendor])
        (number,) = cursor.fetchone()
    elsewhere(end_session, number).result(20)
    gate.set()


def end_session(number):
    with connection.cursor() as cursor:
        cursor.execute(END_SESSION[connection.vendor], [number])


def threads_of_pools():
    return [one for one in threading.enumerate() if "async_queue" in one.name]


def statuses():
    return list(Job.objects.order_by("id").values_list("status", flat=True))


def assert_nobody_works():
    assert not Worker.objects.exists()
    assert not Job.objects.filter(status=Status.RUNNING).exists()


def test_flush_runs_what_is_due_in_order():
    JobFactory(args='["second"]', rank=0)
    JobFactory(args='["first"]', rank=-5)
    JobFactory(args='["third"]', rank=3)

    made = flush(threads=1)

    assert made.outcomes == {"succeed": 3}
    labels = Effect.objects.order_by("id").values_list("label", flat=True)
    assert list(labels) == ["first", "second", "third"]
    assert_nobody_works()


def test_flush_promotes_what_has_become_due_and_leaves_what_has_not():
    due = JobFactory(waiting=True, run_after=now() - timedelta(seconds=1))
    later = JobFactory(waiting=True)

    flush()

    assert Job.objects.get(pk=due.pk).status == Status.SUCCESSFUL
    assert Job.objects.get(pk=later.pk).status == Status.WAITING


def test_flush_rescues_what_the_dead_have_left():
    JobFactory(orphaned=True)

    made = flush()

    assert made.outcomes == {"succeed": 1}
    lost = Attempt.objects.get()
    assert lost.exception == "async_queue.exceptions.WorkerLost"
    assert Effect.objects.count() == 1


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(queues=("mail",)), {"mail"}),
        (Selection(queues=("bulk", "mail")), {"bulk", "mail"}),
        (Selection(queues=("none",)), set()),
        (Selection(prefix="tests.jobs.le"), {"bulk", "mail"}),
        (Selection(prefix="tests.jobs.add"), set()),
    ],
)
def test_flush_runs_only_what_is_selected(selection, expected):
    JobFactory(queue="mail")
    JobFactory(queue="bulk")

    flush(selection=selection)

    done = Job.objects.filter(status=Status.SUCCESSFUL)
    assert set(done.values_list("queue", flat=True)) == expected


def test_flush_of_a_shard_runs_the_ids_of_that_shard():
    JobFactory.create_batch(6)

    flush(selection=Selection(shard=(1, 3)))

    done = Job.objects.filter(status=Status.SUCCESSFUL).values_list("id", flat=True)
    assert len(done) == 2
    assert {number % 3 for number in done} == {1}


@pytest.mark.parametrize("limit", [1, 3, 9, 10, 11])
def test_flush_runs_at_most_its_limit(limit):
    JobFactory.create_batch(10)

    made = flush(threads=2, limit=limit)

    assert made.outcomes.total() == min(limit, 10)
    assert statuses().count(Status.SUCCESSFUL) == min(limit, 10)
    assert_nobody_works()


def test_flush_begins_nothing_more_after_a_job_that_raises():
    """Though several jobs have been claimed behind it."""
    JobFactory.create_batch(6)
    bad = JobFactory(function="tests.jobs.leave_then_fail")
    JobFactory.create_batch(6)
    begun = []

    made = flush(threads=1, on_start=lambda job: begun.append(job.id))

    assert begun[-1] == bad.pk
    assert made.failures == 1
    assert statuses() == ["SUCCESSFUL"] * 6 + ["WAITING"] + ["READY"] * 6
    assert Effect.objects.count() == 6
    assert_nobody_works()


def test_flush_that_keeps_going_runs_all():
    JobFactory.create_batch(3, function="tests.jobs.leave_then_fail")
    JobFactory.create_batch(3)
    seen = []

    made = flush(threads=1, keep_going=True, on_finish=seen.append)

    assert made.failures == 3
    assert made.outcomes == {"retry": 3, "succeed": 3}
    assert [finished.is_failure for finished in seen] == [True] * 3 + [False] * 3
    assert Effect.objects.count() == 3


@pytest.mark.parametrize(
    ("function", "args", "action"),
    [
        ("leave_then_snooze", "[60]", "snooze"),
        ("leave_then_cancel", "[]", "cancel"),
        ("leave_then_retry", "[60]", "retry"),
    ],
)
def test_flush_goes_on_after_a_job_that_steers_itself(function, args, action):
    JobFactory(function=f"tests.jobs.{function}", args=args)
    JobFactory()

    made = flush(threads=1)

    assert made.failures == 0
    assert made.outcomes == {action: 1, "succeed": 1}


def test_retry_that_was_the_last_attempt_is_a_failure():
    JobFactory(function="tests.jobs.leave_then_retry", meta='{"max_attempts":1}')

    made = flush()

    assert made.outcomes == {"fail": 1}
    assert made.failures == 1


@pytest.mark.parametrize("run_after", [None, timedelta(days=-1)])
def test_job_that_schedules_itself_belongs_to_the_next_pass(run_after):
    shift = None if run_after is None else run_after.total_seconds()
    schedule("tests.jobs.schedule_itself", [shift])

    # The clock of SQLite stands still within a millisecond.
    made = flush(threads=1, limit=50)

    assert made.outcomes.total() < 50
    assert statuses()[-1] == Status.READY


def test_many_queues_without_a_job_that_is_selected_hide_none_that_is():
    for number in range(70):
        JobFactory(queue=f"other{number}", function="tests.jobs.take", rank=-1)
    JobFactory(queue="last")

    made = flush(selection=Selection(prefix="tests.jobs.leave"))

    assert made.outcomes == {"succeed": 1}


@parallel
def test_idle_thread_gets_work_while_the_others_are_busy(gate):
    JobFactory(function="tests.jobs.last", args="[0.05]")  # too long for a prefetch
    JobFactory.create_batch(3, function="tests.jobs.leave_then_wait")
    last = JobFactory(args='["last"]')
    made = one_pass(threads=4, on_finish=lambda finished: ended(finished.job))
    numbers = SimpleQueue()
    ended = numbers.put

    passing = elsewhere(made.run)
    while numbers.get(timeout=20).id != last.pk:
        pass

    gate.set()
    passing.result(20)
    assert made.outcomes == {"succeed": 5}


def test_stop_gives_back_at_once_what_has_not_begun(gate, wait_until):
    JobFactory(function="tests.jobs.leave_then_wait")
    JobFactory.create_batch(3)
    made = one_pass(threads=1)
    make_prefetch(made)
    passing = elsewhere(made.run)
    assert jobs.begun.wait(20)

    made.stop()

    # Where one job runs at a time, giving back waits for it.
    wait_until(lambda: made.given_back == 3 or is_serial)
    assert not passing.done()
    gate.set()
    passing.result(20)
    assert made.outcomes == {"succeed": 1}
    assert statuses() == ["SUCCESSFUL"] + ["READY"] * 3
    assert_nobody_works()


@parallel
def test_what_waits_behind_a_long_job_is_given_back_to_others(gate, wait_until):
    JobFactory(function="tests.jobs.leave_then_wait")
    JobFactory.create_batch(3)
    made = worker.Worker(threads=1)
    make_prefetch(made)
    working = elsewhere(made.run)
    assert jobs.begun.wait(20)

    wait_until(lambda: statuses() == ["RUNNING"] + ["READY"] * 3)

    gate.set()
    wait_until(lambda: statuses() == ["SUCCESSFUL"] * 4)
    made.stop()
    working.result(20)
    assert made.given_back == 3
    assert set(Job.objects.values_list("failures", flat=True)) == {0}


@parallel
def test_deadline_gives_back_what_has_not_begun(gate, wait_until):
    JobFactory(function="tests.jobs.leave_then_wait")
    JobFactory.create_batch(3)
    made = one_pass(threads=1, deadline=0.5)
    make_prefetch(made)
    passing = elsewhere(made.run)
    assert jobs.begun.wait(20)

    wait_until(lambda: made.given_back)

    gate.set()
    passing.result(20)
    assert made.outcomes == {"succeed": 1}
    assert statuses() == ["SUCCESSFUL"] + ["READY"] * 3


def test_deadline_that_is_over_lets_nothing_begin():
    JobFactory.create_batch(3)

    made = flush(deadline=0)

    assert made.outcomes.total() == 0
    assert statuses() == ["READY"] * 3
    assert_nobody_works()


@parallel
def test_stop_at_once_gives_back_what_runs(gate, wait_until):
    JobFactory(function="tests.jobs.leave_then_wait")
    made = one_pass(threads=1)
    passing = elsewhere(made.run)
    assert jobs.begun.wait(20)

    made.stop(at_once=True)
    passing.result(20)

    assert statuses() == ["READY"]
    assert_nobody_works()
    gate.set()
    wait_until(lambda: not threads_of_pools())
    assert not Effect.objects.exists()
    assert statuses() == ["READY"]


@parallel
def test_claim_that_fails_lets_finish_what_runs_and_gives_back_the_rest(gate):
    """The dispatcher is cut off while one job runs and others wait behind it."""
    JobFactory(function="tests.jobs.last", args="[0.05]")
    JobFactory(function="tests.jobs.leave_then_wait")
    JobFactory.create_batch(3)
    made = one_pass(threads=2)

    with hooks.at("after_claim", lambda: cut_off(made, gate)):
        passing = elsewhere(made.run)
        with pytest.raises(Error):
            passing.result(20)

    assert "RUNNING" not in statuses()
    assert Effect.objects.count() == statuses().count("SUCCESSFUL") >= 1
    assert_nobody_works()


def test_error_of_a_listener_ends_the_pass_and_leaves_nothing_running():
    JobFactory.create_batch(3)

    def complain(job: RunningJob) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        flush(threads=1, on_start=complain)

    assert statuses() == ["READY"] * 3
    assert_nobody_works()


@parallel
def test_lost_claim_is_no_failure():
    row = JobFactory()

    with hooks.at("before_fence", lambda: elsewhere(cancel, row).result(20)):
        made = flush(threads=1)

    assert made.outcomes == {"lose": 1}
    assert made.failures == 0


IN_MEMORY = """
import django; django.setup()
from django.core.management import call_command
from async_queue import schedule
from async_queue.models import Job
from tests.stepping import one_pass
call_command("migrate", run_syncdb=True, verbosity=0)
for name in ("leave", "leave_then_fail", "leave"):
    schedule(f"tests.jobs.{name}")
one_pass(threads=8).run()
print(*Job.objects.order_by("id").values_list("status", flat=True))
one_pass(threads=8, keep_going=True).run()
print(*Job.objects.order_by("id").values_list("status", flat=True))
"""


def test_flush_inside_a_transaction_is_refused():
    JobFactory()

    with transaction.atomic(), pytest.raises(InsideTransaction):
        flush()

    assert statuses() == [Status.READY]
    assert_nobody_works()


def test_flush_commits_although_the_project_does_not_by_itself():
    JobFactory()

    with database_settings({}, AUTOCOMMIT=False):
        made = flush()

    assert made.outcomes == {"succeed": 1}
    assert statuses() == [Status.SUCCESSFUL]
    assert Effect.objects.count() == 1
    assert_nobody_works()


def test_database_in_memory_runs_jobs_in_the_calling_thread():
    ended = subprocess.run(
        [sys.executable, "-c", IN_MEMORY],
        cwd=ROOT,
        env={**os.environ, "DB": "sqlite", "DJANGO_SETTINGS_MODULE": "tests.settings"},
        capture_output=True,
        text=True,
    )

    assert ended.stdout.splitlines() == [
        "SUCCESSFUL WAITING READY",
        "SUCCESSFUL WAITING SUCCESSFUL",
    ], ended.stderr


@pytest.fixture
def started():
    """Start workers, which are stopped in the end."""
    workers = []

    def start(**options):
        workers.append(worker.Worker(**options))
        workers[-1].start()
        return workers[-1]

    yield start
    for one in workers:
        one.stop()
        one.join()
    assert_nobody_works()
    assert not threads_of_pools()


def test_worker_that_was_started_runs_what_comes_until_it_is_stopped(
    started, wait_until
):
    made = started(threads=2)
    wait_until(lambda: made.is_ready)
    assert Worker.objects.get().pid == os.getpid()

    JobFactory.create_batch(3)

    wait_until(lambda: statuses() == ["SUCCESSFUL"] * 3)
    made.stop()
    made.join()
    assert made.reason == "stopped"


def test_worker_waits_at_its_end_for_what_runs(started, gate):
    JobFactory(function="tests.jobs.leave_then_wait")
    made = started(threads=1)
    assert jobs.begun.wait(20)

    made.stop()
    assert statuses() == ["RUNNING"]
    gate.set()
    made.join()

    assert statuses() == ["SUCCESSFUL"]


def test_worker_that_was_stopped_before_ends_at_once(started):
    made = worker.Worker(threads=1)
    JobFactory()

    made.join()  # there is nothing to wait for
    made.stop()
    made.start()
    made.join()

    assert statuses() == ["READY"]
    assert_nobody_works()


trace = ContextVar("trace", default="clean")


def leave_trace():
    jobs.leave(trace.get())


def test_jobs_know_nothing_of_the_context_in_which_a_worker_was_started(
    started, wait_until
):
    JobFactory(function="tests.test_worker.leave_trace")
    token = trace.set("dirty")

    started(threads=1)

    trace.reset(token)
    wait_until(Effect.objects.exists)
    assert Effect.objects.get().label == "clean"


def start_worker():
    worker.Worker().start()


def test_worker_cannot_be_started_by_a_job():
    JobFactory(function="tests.test_worker.start_worker")

    flush()

    assert Attempt.objects.get().exception.endswith("InsideTransaction")
    assert not threads_of_pools()


def test_burst_whose_keeper_was_cut_off_waits_for_it(monkeypatch):
    JobFactory()
    is_sure, answers = Keeper.is_sure, [False, False]
    monkeypatch.setattr(
        Keeper,
        "is_sure",
        lambda keeper: (
            answers.pop() if keeper.has_begun and answers else is_sure(keeper)
        ),
    )

    assert flush().outcomes == {"succeed": 1}
    assert answers == []


def test_burst_does_not_wait_for_a_database_that_is_away(monkeypatch):
    job = JobFactory()
    moments = [now()]  # one, for the begin of the pass

    def ask(connection):
        if moments:
            return moments.pop()
        raise OperationalError("the server has gone")

    monkeypatch.setattr(Keeper, "is_sure", lambda keeper: False)
    monkeypatch.setattr("async_queue.statements.now", ask)

    with pytest.raises(OperationalError, match="the server has gone"):
        flush()
    job.refresh_from_db()
    assert job.status == "READY"


@parallel
def test_worker_whose_keeper_fails_waits_for_no_job(monkeypatch, gate, wait_until):
    schedule("tests.jobs.leave_then_wait", ["long"])
    made = worker.Worker(threads=1)
    running = elsewhere(made.run)
    assert jobs.begun.wait(20)

    def fail(*args):
        raise RuntimeError("a keeper has its faults")

    monkeypatch.setattr("async_queue.statements.tick", fail)

    with pytest.raises(RuntimeError, match="has its faults"):
        running.result(20)
    assert made.reason == "failed"
    gate.set()
    wait_until(lambda: not Job.objects.filter(status=Status.RUNNING).exists())


def test_idle_worker_sends_the_database_one_statement_with_each_beat(
    started, settings, wait_until, monkeypatch
):
    monkeypatch.setattr("async_queue.keeper._PRUNE", 1e6)  # now and then one more
    settings.ASYNC_QUEUE = {"POLL_INTERVAL": 0.1}
    sent, counts = [], []

    def record(execute, sql, *rest):
        sent.append(sql)
        return execute(sql, *rest)

    def listen_in(*, connection, **signal):
        connection.execute_wrappers.append(record)

    def claim(connection, sql, params, rows=libpq.rows):
        sent.append(sql)
        return rows(connection, sql, params)

    monkeypatch.setattr(libpq, "rows", claim)  # past Django's cursors
    connection_created.connect(listen_in)
    try:
        with hooks.at("after_beat", lambda: counts.append(len(sent))):
            started(threads=2)
            wait_until(lambda: len(counts) >= 15)
    finally:
        connection_created.disconnect(listen_in)

    # MariaDB beats and looks in a statement each.
    each = 2 if connection.vendor == "mysql" else 1
    assert [after - before for before, after in pairwise(counts[-8:])] == [each] * 7
