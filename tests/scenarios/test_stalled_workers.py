"""Workers that stand still for longer or shorter than STALL_AFTER. Faults 8-12."""

import signal
from contextlib import ExitStack

import pytest
from django.db import connection

from async_queue import schedule, schedule_many
from async_queue.db import vendor
from async_queue.models import Attempt, Job, Status, Worker
from tests.deadly import begun
from tests.figures import figure
from tests.fleet import Stopwatch, is_drained, is_stopped, let_pass
from tests.invariants import assert_kept, assert_nobody_works
from tests.long import bound, long
from tests.models import Effect
from tests.workers import registered, seconds_until, working

pytestmark = pytest.mark.django_db(transaction=True)
facts = vendor(connection)
notices_stalls = pytest.mark.skipif(
    not facts.has_heartbeat, reason="whose lock is held is alive, however still it is"
)
STALL = long(3, 30)  # seconds: of STALL_AFTER, whose default is the second
STOPPED = long(5, 60)
SHORTLY = 2
HOGGED = long(2, 20)
# Between the claim and the start, in the transaction, and just before its commit.
BETWEEN = ("after_claim", "before_run")
IN_TRANSACTION = ("after_call", "before_fence", "after_fence")
JOBS = 3


class Fleet:
    """Workers that stand still, each with a queue of its own, and one that does not."""

    def __init__(self, folder, wait_until, stall=None):
        self._folder = folder
        self._wait_until = wait_until
        self._settings = {"STALL_AFTER": stall} if stall else {}
        self._around = ExitStack()
        self.still = {}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._around.close()

    def start(self, *arguments, **environment):
        return self._around.enter_context(
            working(
                self._folder,
                *arguments,
                settings=self._settings,
                environment=environment,
            )
        )

    def start_registered(self, *arguments):
        worker = self.start(*arguments)
        self._wait_until(lambda: registered(worker))
        return worker

    def stop_at(self, *points):
        """Let one worker stop at each of these points."""
        for point in points:
            calls = [("tests.jobs.leave", [f"{point}-{i}"]) for i in range(JOBS)]
            schedule_many(calls, queue=point)
            self.still[point] = self.start(f"--queues={point}", AQ_STOP_AT=point)
        self._wait_until(self._all_stand, 60)

    def stop_in_call(self, **options):
        """Let one worker stop that has called a function."""
        schedule(
            "tests.deadly.hold",
            ["in_call", str(self._folder)],
            queue="in_call",
            meta=options,
        )
        self.still["in_call"] = self.start("--queues=in_call", "--threads=1")
        self._wait_until(lambda: begun(self._folder, 1))
        self.still["in_call"].send(signal.SIGSTOP)
        self._wait_until(self._all_stand, 60)

    def let_end(self):
        """Let the function return, wherever it is called."""
        (self._folder / "go").touch()
        self._wait_until(is_drained)

    def go_on(self):
        """Let go on who stands still; return when all have a new number."""
        former = {queue: worker.number for queue, worker in self.still.items()}
        for worker in self.still.values():
            worker.send(signal.SIGCONT)
        self._wait_until(
            lambda: all(
                worker.number > former[queue] for queue, worker in self.still.items()
            )
        )

    def _all_stand(self):
        return all(is_stopped(it.process.pid) for it in self.still.values())


@pytest.fixture
def fleet(tmp_path, wait_until):
    with Fleet(tmp_path, wait_until, long(STALL, 0)) as made:
        yield made


@pytest.fixture
def patient_fleet(tmp_path, wait_until):
    """One whose workers have the default of STALL_AFTER."""
    with Fleet(tmp_path, wait_until) as made:
        yield made


def assert_nobody_was_found_dead():
    assert not Worker.objects.exclude(dead_at=None).exists()
    assert not Attempt.objects.exists()


def assert_lost_once():
    assert set(Attempt.objects.values_list("exception", "number")) == {
        ("async_queue.exceptions.WorkerLost", 1)
    }
    assert set(Job.objects.values_list("failures", "suspect")) == {(0, False)}


@notices_stalls
def test_jobs_of_stopped_workers_run_elsewhere_and_no_late_commit_counts(
    fleet, tmp_path, wait_until
):
    fleet.stop_in_call()
    fleet.stop_at(*BETWEEN, *IN_TRANSACTION)
    stopwatch = Stopwatch()
    other = fleet.start_registered()
    took = seconds_until(
        lambda: begun(tmp_path, 2) and count_left() == 1,
        lambda predicate: wait_until(predicate, 3 * STALL + 30),
    )
    fleet.let_end()
    let_pass(max(0.0, STOPPED - stopwatch.seconds()))
    assert other.end() == 0
    fleet.go_on()
    for queue in fleet.still:
        schedule("tests.jobs.leave", [f"{queue}-later"], queue=queue)
    wait_until(is_drained)

    assert {worker.end() for worker in fleet.still.values()} == {0}
    late = Attempt.objects.filter(job__queue__in=("in_call", *IN_TRANSACTION))
    figure("SIGSTOP to the jobs run by another that was started", round(took, 1), "s")
    figure("late commits refused", late.count())
    assert late.values("job__queue").distinct().count() == 1 + len(IN_TRANSACTION)
    assert took <= STALL + bound(4.0)
    assert_lost_once()
    assert_kept()
    assert_nobody_works()


def count_left():
    return Job.objects.exclude(status=Status.SUCCESSFUL).count()


@notices_stalls
def test_atomic_false_job_of_a_stopped_worker_runs_at_most_once_more(
    fleet, tmp_path, wait_until
):
    fleet.stop_in_call(atomic=False)
    other = fleet.start_registered("--threads=1")
    wait_until(lambda: begun(tmp_path, 2), 3 * STALL + 30)
    (tmp_path / "go-1").touch()
    fleet.go_on()
    # When its only thread runs the next, that has had its say on the former run.
    later = schedule("tests.jobs.leave", ["later"], queue="in_call")
    wait_until(lambda: Job.objects.get(pk=later.pk).status == Status.SUCCESSFUL)
    job = Job.objects.exclude(pk=later.pk).get()
    held_by = job.status, job.attempt, job.worker_id
    assert held_by == (Status.RUNNING, 2, other.number)
    fleet.let_end()

    duplicates = Effect.objects.filter(label="in_call").count() - 1
    figure("atomic=False beside a stalled worker: duplicates", duplicates)
    assert duplicates == 1
    assert set(Job.objects.values_list("status", flat=True)) == {Status.SUCCESSFUL}
    assert_lost_once()
    assert_kept(repeated=["in_call"])


@pytest.mark.skipif(facts.has_heartbeat, reason="others take over")
@pytest.mark.parametrize("point", ["after_claim", "after_fence"])
def test_jobs_of_a_stopped_worker_wait_for_it_where_its_lock_is_the_proof(
    fleet, wait_until, point
):
    fleet.stop_at(point)
    # Which cannot even register while somebody stands still in a transaction.
    other = fleet.start(f"--queues={point}")
    let_pass(STOPPED)
    fleet.still[point].send(signal.SIGCONT)
    wait_until(is_drained)
    wait_until(lambda: registered(other))

    assert {other.end(), fleet.still[point].end()} == {0}
    assert set(Job.objects.values_list("failures", "suspect")) == {(0, False)}
    assert_nobody_was_found_dead()
    assert_kept()
    assert_nobody_works()


def test_worker_that_stands_still_shortly_loses_nothing(patient_fleet):
    other = patient_fleet.start_registered("--queues=others")
    patient_fleet.stop_in_call()
    (stopped,) = patient_fleet.still.values()
    number = stopped.number
    for _ in range(long(1, 10)):
        stopped.send(signal.SIGSTOP)
        let_pass(SHORTLY)
        stopped.send(signal.SIGCONT)
        let_pass(SHORTLY / 4)
    patient_fleet.let_end()

    figure(f"SIGSTOP {SHORTLY} s: false rescues", Attempt.objects.count())
    assert stopped.number == number
    assert Job.objects.get().attempt == 1
    assert_nobody_was_found_dead()
    assert_kept()
    assert {other.end(), stopped.end()} == {0}


def test_worker_whose_job_lets_no_other_thread_run_has_not_stalled(
    patient_fleet, tmp_path, wait_until
):
    one, other = (patient_fleet.start_registered() for _ in range(2))
    numbers = one.number, other.number
    schedule("tests.deadly.hog", ["hog", str(tmp_path), HOGGED])
    wait_until(is_drained, 10 * HOGGED + 20)

    took = float((tmp_path / "hogged").read_text())
    figure("a job kept all other threads from running", round(took, 1), "s")
    figure("such a job: false rescues", Attempt.objects.count())
    assert took >= 0.9 * HOGGED
    assert (one.number, other.number) == numbers
    assert Job.objects.get().attempt == 1
    assert_nobody_was_found_dead()
    assert_kept()
    assert {one.end(), other.end()} == {0}
