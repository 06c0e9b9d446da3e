"""Jobs that take longer than they may: ended, recorded, and replaced (34, 35)."""

from threading import Event, get_ident
from time import monotonic, time

import pytest
from django.db import connection, transaction

from async_queue import cancel, hooks, schedule
from async_queue.context import Control
from async_queue.db import vendor
from async_queue.exceptions import JobStopped, JobTimeout
from async_queue.models import Attempt, Job, Status
from tests import hanging, jobs
from tests.figures import figure
from tests.fleet import let_pass, uncommitted
from tests.invariants import assert_nobody_works
from tests.long import bound, long
from tests.models import Effect
from tests.stepping import elsewhere, exceptions_of, one_pass
from tests.workers import working

pytestmark = pytest.mark.django_db(transaction=True)
is_serial = vendor(connection).runs_one_job_at_a_time
TIMEOUT = long(1, 2)  # seconds
# In so many seconds after its deadline all must be over.
ALLOWED = bound(1.0)
KINDS = [kind for kind in hanging.KINDS if kind != "row" or not is_serial]
SESSIONS = {
    "postgresql": "SELECT pid FROM pg_stat_activity",
    "mysql": "SELECT id FROM information_schema.processlist",
}
ONCE = {"timeout": TIMEOUT, "max_attempts": 1}


class Watch:
    """Sees when jobs that hang have an outcome, and when their sessions have ended."""

    def __init__(self, folder, numbers):
        self._folder = folder
        self._numbers = numbers
        self.recorded = {}
        self.ended = {}

    def has_seen_all(self):
        for kind, number in self._numbers.items():
            if not (self._folder / kind).exists():
                continue
            session, begun_at = (self._folder / kind).read_text().split()
            late = time() - float(begun_at) - TIMEOUT
            if kind not in self.recorded and has_ended(number):
                self.recorded[kind] = late
            if kind not in self.ended and self._is_free(kind, session):
                self.ended[kind] = late
        return len(self.recorded) == len(self.ended) == len(self._numbers)

    def _is_free(self, kind, session):
        # Who writes the record has the lock of SQLite. PostgreSQL ends statements by
        # itself, and the session is the next job's.
        if is_serial or kind in ("query", "row"):
            return kind in self.recorded
        return session not in sessions()


def has_ended(number):
    return Job.objects.filter(pk=number, status=Status.FAILED).exists()


def sessions():
    with connection.cursor() as cursor:
        cursor.execute(SESSIONS[connection.vendor])
        return {str(number) for (number,) in cursor.fetchall()}


def hold_row(connection):
    """Lock a row until the connection is closed."""
    Effect.objects.create(label="held")
    connection.ensure_connection()
    connection.set_autocommit(False)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE tests_effect SET label = 'held' WHERE label = 'held'")


def labels():
    return sorted(Effect.objects.values_list("label", flat=True))


def test_jobs_that_hang_are_ended_and_their_places_filled(
    tmp_path, wait_until, second_connection
):
    folder = str(tmp_path)
    threads = 2 * len(KINDS) + 2
    if not is_serial:
        hold_row(second_connection)
    numbers = {
        kind: schedule(hanging.hang, [kind, folder], meta=ONCE).pk for kind in KINDS
    }
    watch = Watch(tmp_path, numbers)

    with working(tmp_path, f"--threads={threads}") as running:
        wait_until(watch.has_seen_all, 30)
        together = 1 if is_serial else threads
        for _ in range(together):
            schedule(hanging.meet, [folder, together])
        wait_until(lambda: len(succeeded()) == together)
        code = running.end()

    for kind in KINDS:
        figure(f"34 hung in {kind}: recorded after its deadline", watch.recorded[kind])
        figure(f"34 hung in {kind}: session ended after", watch.ended[kind])
        (attempt,) = Attempt.objects.filter(job=numbers[kind])
        assert attempt.exception == "async_queue.exceptions.JobTimeout", kind
        assert "in hang\n" in attempt.traceback, kind
    assert max(watch.recorded.values()) <= ALLOWED, watch.recorded
    assert max(watch.ended.values()) <= ALLOWED, watch.ended
    assert labels() == ["held"] * (not is_serial)
    assert code == 0, running.said
    assert_nobody_works()


def succeeded():
    return Job.objects.filter(status=Status.SUCCESSFUL)


@pytest.mark.skipif(not is_serial, reason="here a job keeps nobody from writing")
@pytest.mark.parametrize("kind", ["sleep", "query", "stubborn"])
def test_lock_of_a_hung_job_is_freed_for_the_web(kind, tmp_path, wait_until):
    schedule(hanging.hang, [kind, str(tmp_path)], meta=ONCE)

    with working(tmp_path, "--threads=2"):
        wait_until((tmp_path / kind).exists)
        with transaction.atomic():  # waits, for five seconds at most
            Effect.objects.create(label="web")
        begun_at = float((tmp_path / kind).read_text().split()[1])
        late = time() - begun_at - TIMEOUT

    figure(f"34 hung in {kind}: the web can write after the deadline", late)
    assert late <= ALLOWED
    assert labels() == ["web"]


def test_job_in_autocommit_that_hangs_is_ended_too(tmp_path, wait_until):
    meta = ONCE | {"atomic": False}
    job = schedule(hanging.hang, ["sleep", str(tmp_path)], meta=meta)
    watch = Watch(tmp_path, {"sleep": job.pk})

    with working(tmp_path, "--threads=1"):
        wait_until(watch.has_seen_all)
        schedule(jobs.leave, ["after"])
        wait_until(lambda: labels() == ["after", "sleep"])

    assert exceptions_of(job) == ["JobTimeout"]
    assert watch.recorded["sleep"] <= ALLOWED


def test_job_that_looks_at_its_deadline_ends_in_good_order(tmp_path, wait_until):
    job = schedule(hanging.look_for_cancel, [str(tmp_path)], meta=ONCE)

    with working(tmp_path, "--threads=1") as running:
        wait_until(lambda: has_ended(job.pk))
        code = running.end()

    assert (tmp_path / "stopped").read_text() == "JobTimeout"
    left = float((tmp_path / "begun").read_text().split()[1])
    assert TIMEOUT - 0.5 < left <= TIMEOUT
    (attempt,) = Attempt.objects.all()
    assert attempt.exception == "async_queue.exceptions.JobTimeout"
    assert "in look_for_cancel" in attempt.traceback
    assert labels() == []
    assert code == 0, running.said


@pytest.mark.skipif(is_serial, reason="nobody else can write while the job runs")
def test_timeout_is_recorded_however_long_the_row_is_locked(tmp_path, wait_until):
    meta = ONCE | {"timeout": 0.5}
    job = schedule(hanging.hang, ["stubborn", str(tmp_path)], meta=meta)
    looks_often = {"POLL_INTERVAL": 0.1}

    with working(tmp_path, "--threads=1", settings=looks_often) as running:
        wait_until((tmp_path / "stubborn").exists)
        with uncommitted(lambda: cancel(job)):
            # The worker, which cannot record it, looks for what no thread runs.
            let_pass(3)
        wait_until(lambda: has_ended(job.pk))

    assert exceptions_of(job) == ["JobTimeout"]
    assert "gave back" not in running.said
    assert labels() == []


def test_timeout_is_a_failure_that_is_tried_again(tmp_path, wait_until):
    meta = {"timeout": TIMEOUT, "max_attempts": 2, "backoff": "constant"}
    job = schedule(hanging.hang, ["sleep", str(tmp_path)], meta=meta)

    with working(tmp_path, "--threads=1"):
        wait_until(lambda: exceptions_of(job))

    job.refresh_from_db()
    assert (job.status, job.failures, job.crashes) == (Status.WAITING, 1, 0)
    assert not job.suspect


def test_worker_with_too_many_lost_threads_is_replaced(tmp_path, wait_until):
    for _ in range(3):
        schedule(hanging.hang, ["sleep", str(tmp_path)], meta=ONCE)

    with working(tmp_path, "--threads=2", "--processes=2") as running:
        wait_until(lambda: running.said.count("(pid ") >= 3, 60)
        schedule(jobs.leave, ["after"])
        wait_until(lambda: labels() == ["after"])
        code = running.end()

    assert Attempt.objects.count() == 3
    assert code == 0, running.said
    assert_nobody_works()


@pytest.mark.parametrize(
    ("point", "function"),
    [
        ("after_call", jobs.leave),
        ("before_fence", jobs.leave),
        ("after_fence", jobs.leave),
        ("after_commit", jobs.leave),
        ("before_record", jobs.leave_then_fail),
        ("after_record", jobs.leave_then_fail),
    ],
)
def test_bookkeeping_has_no_deadline(point, function, caplog):
    slow = schedule(function, ["slow"], meta={"timeout": 0.2, "max_attempts": 1})
    after = schedule(jobs.leave, ["after"], priority=-1)
    threads = []

    def dally():
        if len(threads) == 1:
            Event().wait(1.2)

    made = one_pass(
        1, keep_going=True, on_start=lambda job: threads.append(get_ident())
    )
    with hooks.at(point, dally):
        made.run()

    assert len(threads) == 2
    assert len(set(threads)) == 1
    assert "the worker itself failed" not in caplog.text
    after.refresh_from_db()
    slow.refresh_from_db()
    assert after.status == Status.SUCCESSFUL
    assert "JobTimeout" not in exceptions_of(slow)
    assert labels() == ["after"] + ["slow"] * (function is jobs.leave)


def test_interrupt_is_raised_in_the_call_or_not_at_all():
    """Whatever moment it comes at: else it would end the thread in our own code."""
    rounds = long(300, 20_000)

    raised = elsewhere(call_and_interrupt, rounds).result(long(60, 900))

    figure("35 interrupts at random moments: raised in the function", raised)
    assert 0 <= raised < rounds


def call_and_interrupt(rounds):
    """Return how many interrupts were raised; any other end of this is an error."""
    raised = 0
    for number in range(rounds):
        control, is_over = Control(), Event()
        ending = elsewhere(interrupt, control, is_over)
        try:
            control.call(lambda number=number: spin(number % 100))
        except JobTimeout:
            raised += 1
        is_over.set()
        ending.result(20)
        spin(100)  # where it would be raised if it was still on its way
        assert not control.is_in_call
    return raised


def interrupt(control, is_over):
    while not (control.stop(JobTimeout("too long")) or is_over.is_set()):
        pass
    control.interrupt()


def spin(count):
    for number in range(count):
        str(number)


def test_stopped_call_that_swallows_all_is_interrupted_once(wait_until):
    control, spins, seen = Control(), [], []

    def swallow():
        until = monotonic() + 0.5
        while True:
            try:
                while monotonic() < until:
                    spin(100)
                    spins.append(None)  # no Event, which would stay locked
                return
            except JobStopped as error:
                seen.append(error)

    calling = elsewhere(control.call, swallow)
    wait_until(lambda: spins)
    assert control.stop(JobTimeout("too long"))
    assert control.interrupt()
    assert not control.interrupt()

    try:
        calling.result(20)
    except JobStopped as error:  # it came on the way back into the inner try
        seen.append(error)
    assert len(seen) == 1
