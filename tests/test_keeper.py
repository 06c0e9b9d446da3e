from contextlib import contextmanager
from datetime import timedelta
from queue import SimpleQueue
from threading import Event

import pytest
from django.db import Error, connection

from async_queue import cancel, claims, codec, current_job, executor, hooks
from async_queue.db import vendor
from async_queue.exceptions import JobStopped
from async_queue.keeper import Keeper
from async_queue.models import Attempt, Job, Progress, Status, Worker
from async_queue.places import Place
from tests import jobs, misbehaving
from tests.factories import JobFactory, now
from tests.models import Effect
from tests.stepping import elsewhere, exceptions_of, is_proved_dead

pytestmark = pytest.mark.django_db(transaction=True)
has_line = vendor(connection).runs_one_job_at_a_time
leaves_rows = pytest.mark.skipif(has_line, reason="a job that runs keeps others out")


class Crew:
    """A worker, as far as its keeper sees it."""

    def __init__(self):
        self.jobs = {}
        self.words = SimpleQueue()
        self.given_up = []

    def held(self):
        return {job.fencing_token: job for job in list(self.jobs.values())}

    def look_for_work(self, *, suspects=False, queue=""):
        self.words.put("suspects" if suspects else "work")

    def give_up(self, job):
        self.given_up.append(job.id)
        del self.jobs[job.id]

    def run_next(self):
        """Run a READY job in a thread, as a worker's thread would."""
        (job,) = claims.claim("default", self.number, 1)
        self.jobs[job.id] = job
        job.control.slot = 1
        return elsewhere(self._run, job)

    def _run(self, job):
        try:
            return executor.execute(job)
        finally:
            self.jobs.pop(job.id, None)

    def hears(self, word):
        while not self.words.empty():
            if self.words.get() == word:
                return True
        return False


@pytest.fixture(autouse=True)
def quick(settings):
    settings.ASYNC_QUEUE = {"POLL_INTERVAL": 0.05}


@pytest.fixture
def crew(quick, wait_until):
    """A worker with a keeper, which has looked around once."""
    made = Crew()
    place = Place("default", threads=1)
    made.keeper = Keeper(place, made)
    made.keeper.start()
    wait_until(made.keeper.is_sure)
    made.hears("none")  # what was said at the beginning
    made.number = place.number
    yield made
    made.keeper.stop()
    assert not Worker.objects.filter(dead_at=None).exists()


def status_of(job):
    return Job.objects.get(pk=job.pk).status


@contextmanager
def renamed(table, name):
    with connection.schema_editor() as editor:
        editor.execute(f"ALTER TABLE {table} RENAME TO {name}")
    try:
        yield
    finally:
        with connection.schema_editor() as editor:
            editor.execute(f"ALTER TABLE {name} RENAME TO {table}")


def test_keeper_beats_until_it_is_stopped(crew, wait_until):
    assert Worker.objects.get().pk == crew.number
    assert crew.keeper.is_sure()
    if vendor(connection).has_heartbeat:
        wait_until(lambda: Worker.objects.get().beat > 2)


def test_what_prevents_its_beginning_is_an_error(wait_until):
    made = Crew()
    keeper = Keeper(Place("default", threads=1), made)

    with renamed("async_queue_worker", "elsewhere"):
        keeper.start()
        wait_until(lambda: made.hears("work"))
        with pytest.raises(Error):
            keeper.check()

    keeper.stop()
    assert not keeper.is_sure()


def test_ready_jobs_are_told_of(crew, wait_until):
    JobFactory()

    wait_until(lambda: crew.hears("work"))


def test_suspects_are_told_of(crew, wait_until):
    JobFactory(suspect=True)

    wait_until(lambda: crew.hears("suspects"))


def test_job_is_promoted_at_its_moment(crew, wait_until):
    job = JobFactory(waiting=True, run_after=now() + timedelta(seconds=0.2))

    wait_until(lambda: status_of(job) == Status.READY)
    wait_until(lambda: crew.hears("work"))


def test_jobs_of_the_dead_are_rescued(crew, wait_until):
    job = JobFactory(orphaned=True)
    Worker.objects.filter(pk=job.worker_id).update(dead_at=now())

    wait_until(lambda: status_of(job) == Status.READY)
    wait_until(lambda: crew.hears("suspects"))


def test_jobs_that_no_thread_runs_are_given_back(crew, wait_until, caplog):
    """The answer to their claim was lost."""
    job = JobFactory(running=True, worker=Worker.objects.get())

    wait_until(lambda: status_of(job) == Status.READY)

    wait_until(lambda: "gave back 1 jobs that no thread runs" in caplog.text)
    assert (Job.objects.get().failures, Job.objects.get().suspect) == (0, False)


def test_worker_that_was_found_dead_goes_on_under_a_new_number(crew, wait_until):
    Worker.objects.update(dead_at=now())

    wait_until(lambda: Worker.objects.filter(dead_at=None).exists())

    assert Worker.objects.get(dead_at=None).pk > crew.number


def test_what_is_old_is_pruned(crew, wait_until):
    old = JobFactory(successful=True, finished_at=now() - timedelta(days=8))
    young = JobFactory(successful=True)

    crew.keeper._prune_at = 0.0

    wait_until(lambda: not Job.objects.filter(pk=old.pk).exists())
    assert Job.objects.filter(pk=young.pk).exists()


def report_and_wait():
    current_job().progress(3, 7, "on the way")
    jobs.leave_then_wait()


def test_progress_is_written_as_soon_as_it_can_be(crew, gate, wait_until):
    JobFactory(function="tests.test_keeper.report_and_wait")
    running = crew.run_next()
    assert jobs.begun.wait(20)

    if not has_line:
        wait_until(Progress.objects.exists)
        assert status_of(Job.objects.get()) == Status.RUNNING
    gate.set()

    assert running.result(20).action == "succeed"


@leaves_rows
def test_progress_that_cannot_be_written_is_kept(crew, gate, wait_until, caplog):
    JobFactory(function="tests.test_keeper.report_and_wait")

    with renamed("async_queue_progress", "elsewhere"):
        running = crew.run_next()
        assert jobs.begun.wait(20)
        wait_until(lambda: "trying again" in caplog.text)
    wait_until(Progress.objects.exists)
    gate.set()

    assert running.result(20).action == "succeed"


def meta(**options):
    return codec.encode(options, "meta")


def test_run_that_is_too_long_is_ended_and_recorded(crew, gate, wait_until):
    JobFactory(
        function="tests.jobs.leave_then_wait", meta=meta(timeout=timedelta(seconds=0.1))
    )

    running = crew.run_next()

    wait_until(lambda: exceptions_of(Job.objects.get()) == ["JobTimeout"])
    assert Job.objects.get().status == Status.WAITING
    gate.set()
    assert running.result(20).action == "lose"
    assert not Effect.objects.exists()


def ignore_all():
    """Do not come back, whatever is raised here, until the test lets it."""
    while not jobs.go_on.is_set():
        try:
            jobs.go_on.wait(0.01)
        except JobStopped:
            continue


def test_thread_that_does_not_come_back_is_given_up(
    crew, gate, wait_until, monkeypatch
):
    monkeypatch.setattr("async_queue.keeper._RETURN", 0.1)
    job = JobFactory(
        function="tests.test_keeper.ignore_all", meta=meta(timeout=timedelta(seconds=1))
    )

    running = crew.run_next()

    wait_until(lambda: crew.given_up == [job.pk])
    gate.set()
    assert running.result(20).action == "lose"
    assert Attempt.objects.get().exception.endswith("JobTimeout")


@leaves_rows
def test_thread_of_a_worker_that_was_cut_off_has_time_to_hear_of_it(
    crew, gate, wait_until, monkeypatch
):
    """TCP sends again what was lost after a pause that grows."""
    monkeypatch.setattr("async_queue.keeper._RETURN", 0.0)
    JobFactory(function="tests.test_keeper.ignore_all")
    running = crew.run_next()
    (job,) = crew.jobs.values()
    wait_until(lambda: job.control.is_in_call)
    beats = []

    Worker.objects.update(dead_at=now())

    wait_until(lambda: job.control.is_ended)
    with hooks.at("after_beat", lambda: beats.append(1)):
        wait_until(lambda: len(beats) >= 3)
    assert crew.given_up == []
    gate.set()
    assert running.result(20).action == "lose"


@leaves_rows
def test_run_that_was_cancelled_is_ended(crew, gate, wait_until):
    job = JobFactory(function="tests.jobs.leave_then_wait")
    running = crew.run_next()
    assert jobs.begun.wait(20)
    control = crew.jobs[job.pk].control

    assert cancel(job) == 1

    wait_until(lambda: control.is_ended)
    gate.set()
    assert running.result(20).action == "lose"
    assert status_of(job) == Status.CANCELLED
    assert not Effect.objects.exists()


def check_often():
    jobs.leave()
    jobs.begun.set()
    while not jobs.go_on.wait(0.01):
        current_job().check_cancelled()


def test_job_without_a_transaction_is_asked_to_stop(crew, gate):
    job = JobFactory(function="tests.test_keeper.check_often", meta=meta(atomic=False))
    running = crew.run_next()
    assert jobs.begun.wait(20)

    assert cancel(job) == 1

    running.result(20)
    assert status_of(job) == Status.CANCELLED
    assert Effect.objects.count() == 1


def test_all_runs_are_ended_uncharged(crew, gate, wait_until):
    job = JobFactory(function="tests.jobs.leave_then_wait")
    running = crew.run_next()
    assert jobs.begun.wait(20)

    crew.keeper.end_all("for a test")

    wait_until(lambda: status_of(job) == Status.READY)
    gate.set()
    assert running.result(20).action == "lose"
    assert Job.objects.get().failures == 0
    assert not Attempt.objects.exists()


def test_job_that_holds_a_transaction_for_long_is_advised_once(
    crew, gate, wait_until, caplog, monkeypatch
):
    monkeypatch.setattr(vendor(connection), "long_transaction", 0.0)
    JobFactory(function="tests.jobs.leave_then_wait")

    running = crew.run_next()

    wait_until(lambda: "has held a transaction for" in caplog.text)
    Event().wait(0.2)
    gate.set()
    running.result(20)
    assert caplog.text.count("has held a transaction for") == 1


@pytest.mark.skipif(has_line, reason="a file has no sessions to end")
def test_keeper_that_is_cut_before_its_first_look_goes_on(wait_until):
    """So it is on a machine that starts many at once."""
    place = Place("default", threads=1)
    keeper = Keeper(place, Crew())
    cuts = []

    def cut():
        if not cuts:
            cuts.append(place.number)
            misbehaving.end_own_session()

    with hooks.at("after_register", cut):
        keeper.start()
        wait_until(lambda: keeper.is_sure() or keeper.failure)
    keeper.stop()

    keeper.check()
    assert cuts == [place.number]


def test_keeper_that_fails_leaves_no_life_behind(wait_until):
    """SQLite's locks are the process's, which may live on."""
    place = Place("default", threads=1)
    keeper = Keeper(place, Crew())

    with hooks.at("after_register", fail):
        keeper.start()
        wait_until(lambda: keeper.failure)
    keeper.stop()

    (number,) = Worker.objects.values_list("pk", flat=True)
    assert elsewhere(is_proved_dead, number).result(20)


def fail():
    raise ZeroDivisionError


def test_job_is_vouched_for_only_under_the_number_of_the_worker(crew):
    JobFactory()
    (job,) = claims.claim("default", crew.number, 1)
    crew.jobs[job.id] = job

    assert crew.keeper.vouches_for(job)
    Worker.objects.update(dead_at=now())

    while crew.keeper.vouches_for(job):
        Event().wait(0.01)
    del crew.jobs[job.id]
