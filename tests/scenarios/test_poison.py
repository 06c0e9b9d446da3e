"""Jobs that take their process with them, among innocent ones. Faults 6 and 7."""

import os
import signal
from contextlib import suppress
from itertools import pairwise

import pytest
from django.db import connection, transaction

from async_queue import schedule, schedule_many
from async_queue.db import vendor
from async_queue.models import Attempt, Job, Status, Worker
from tests.deadly import begun
from tests.figures import figure
from tests.fleet import is_drained, let_pass
from tests.invariants import assert_kept
from tests.long import bound, long
from tests.stepping import exceptions_of
from tests.workers import children, registered, working

pytestmark = pytest.mark.django_db(transaction=True)
is_serial = vendor(connection).runs_one_job_at_a_time
INNOCENT = 50
TAKES = 0.02 if is_serial else 0.2  # seconds, by each of them
EVERY = 0.2  # seconds, for as long as there is poison another comes
PAUSE = bound(3.0)  # seconds, the longest without any success
USUAL = [["segfault"], ["abort", "exit_at_once", "exceed_memory"]]
KINDS = long(USUAL, [[kind] for kinds in USUAL for kind in kinds])


def schedule_innocent(*labels):
    schedule_many([("tests.jobs.take_time", [label, TAKES]) for label in labels])


def keep_scheduling(poison):
    """Schedule innocent ones for as long as the poison works."""
    at_work = Job.objects.filter(pk__in=poison).exclude(status=Status.FAILED)
    for number in range(round(60 / EVERY)):
        if not at_work.exists():
            return
        schedule_innocent(f"later-{number}")
        let_pass(EVERY)
    raise AssertionError(f"{at_work} were not found out")


def count_living():
    return Worker.objects.filter(dead_at=None).count()


def longest_pause():
    """Return the most seconds in which nothing succeeded."""
    succeeded = Job.objects.filter(status=Status.SUCCESSFUL).order_by("finished_at")
    moments = succeeded.values_list("finished_at", flat=True)
    return max((later - sooner).total_seconds() for sooner, later in pairwise(moments))


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_job_that_kills_its_process_is_found_out_and_nobody_else_suffers(
    kinds, tmp_path, wait_until
):
    # It takes two of them down before it runs alone.
    with working(tmp_path, "--processes=3") as workers:
        wait_until(lambda: count_living() == 3, 60)
        schedule_innocent(*(f"before-{i}" for i in range(INNOCENT // 2)))
        poison = [schedule(f"tests.deadly.{kind}", [kind]) for kind in kinds]
        schedule_innocent(*(f"behind-{i}" for i in range(INNOCENT // 2)))
        keep_scheduling([job.pk for job in poison])
        wait_until(is_drained, 60)
        assert workers.end() == 0, workers.said

    runs = [exceptions_of(job) for job in poison]
    pause = longest_pause()
    figure(f"{', '.join(kinds)}: processes lost", sum(map(len, runs)))
    figure(f"{', '.join(kinds)}: longest pause of the others", round(pause, 3), "s")
    for job, raised in zip(poison, runs, strict=True):
        assert raised == ["WorkerLost"] * 2 + ["WorkerCrashed"] * 3
        job.refresh_from_db()
        assert (job.status, job.crashes, job.failures) == (Status.FAILED, 3, 0)
    assert_innocent_ones_uncharged(poison)
    assert_kept()
    assert pause <= PAUSE


def assert_innocent_ones_uncharged(poison):
    guilty = [job.pk for job in poison]
    innocent = Job.objects.exclude(pk__in=guilty)
    ends = innocent.values_list("status", "failures", "crashes")
    assert set(ends) == {(Status.SUCCESSFUL, 0, 0)}
    raised = Attempt.objects.exclude(job__in=guilty)
    kinds = set(raised.values_list("exception", flat=True))
    assert kinds <= {"async_queue.exceptions.WorkerLost"}


def exists(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_process_of_a_suspect_ends_when_its_worker_is_killed(tmp_path, wait_until):
    with working(tmp_path) as one, working(tmp_path) as other:
        wait_until(lambda: registered(one, other))
        with transaction.atomic():
            job = schedule("tests.deadly.hold", ["held", str(tmp_path)])
            Job.objects.filter(pk=job.pk).update(suspect=True)
        wait_until(lambda: begun(tmp_path, 1))
        job.refresh_from_db()
        doomed = {one.number: one, other.number: other}[job.worker_id]
        (alone,) = children(doomed.process.pid)
        doomed.send(signal.SIGKILL)
        wait_until(lambda: not exists(alone))
        wait_until(lambda: begun(tmp_path, 2))
        (tmp_path / "go").touch()
        wait_until(is_drained, 60)

    assert exceptions_of(job) == ["WorkerLost"]
    job.refresh_from_db()
    assert (job.status, job.crashes, job.attempt) == (Status.SUCCESSFUL, 0, 2)
    assert_kept()
