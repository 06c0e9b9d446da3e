"""Many workers at short jobs, and one that dies behind its commit (24, 33)."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from async_queue import schedule, schedule_many
from async_queue.models import Attempt, Job, Status
from tests import hanging
from tests.figures import figure
from tests.fleet import Stopwatch, counted, is_drained
from tests.invariants import assert_kept, assert_nobody_works
from tests.long import long
from tests.models import Effect
from tests.workers import registered, working

pytestmark = pytest.mark.django_db(transaction=True)
WaitUntil = Callable[..., None]
JOBS = long(300, 10_000)
WORKERS = long(3, 8)


def test_workers_that_race_run_each_job_once(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    with ExitStack() as stack:
        workers = [
            stack.enter_context(working(tmp_path, "--threads=4"))
            for _ in range(WORKERS)
        ]
        wait_until(lambda: registered(*workers), 60)
        watch = Stopwatch()
        schedule_many(
            ("tests.jobs.take_time", [str(number), 0.001]) for number in range(JOBS)
        )
        wait_until(is_drained, 300)
        seconds = watch.seconds()
        codes = [worker.end() for worker in workers]

    figure(f"24 jobs run twice, of {JOBS} on {WORKERS} workers", repeated())
    figure(f"24 jobs a second, of {JOBS} on {WORKERS} workers", JOBS / seconds)
    assert repeated() == 0
    assert counted() == {"SUCCESSFUL": JOBS}
    assert set(Job.objects.values_list("attempt", flat=True)) == {1}
    assert codes == [0] * WORKERS
    assert_kept()
    assert_nobody_works()


def repeated() -> int:
    effects = Counter(Effect.objects.values_list("label", flat=True))
    return sum(times - 1 for times in effects.values())


def test_job_whose_worker_dies_behind_its_commit_is_done_once(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule(hanging.die_between_hooks)

    with working(tmp_path, "--threads=1") as doomed:
        assert doomed.process.wait(30) == -9
    with working(tmp_path, "--threads=1"):
        schedule("tests.jobs.leave", ["after"])
        wait_until(is_drained)

    job.refresh_from_db()
    assert (job.status, job.attempt, job.failures) == (Status.SUCCESSFUL, 1, 0)
    assert not Attempt.objects.exists()
    # Its other hook is lost, as hooks are: what must happen belongs into a job.
    assert sorted(Effect.objects.values_list("label", flat=True)) == [
        "after",
        "committed",
    ]
