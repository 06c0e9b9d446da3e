"""Workers that die at each point of the protocol, and another that ends it. Fault 5."""

import signal
from datetime import timedelta

import pytest

from async_queue import schedule, schedule_many
from async_queue.hooks import POINTS
from async_queue.models import Job, Status
from tests.figures import figure
from tests.fleet import is_stopped
from tests.invariants import assert_kept, assert_nobody_works
from tests.long import long
from tests.workers import working

pytestmark = pytest.mark.django_db(transaction=True)
# Where each job comes by, so that some are done and others under way.
OF_EACH_JOB = POINTS[POINTS.index("before_run") : POINTS.index("before_record")]
# Where only those come by who find that somebody has died.
AT_A_GRAVE = ("after_burial", "after_rescue")
SUCCEED, FAIL = 6, 2
ROUNDS = long(1, 3)


def put_jobs_in(queue):
    """Schedule what takes its worker to every point."""
    jobs = [("tests.jobs.leave", [f"{queue}-{i}"]) for i in range(SUCCEED)]
    schedule_many(jobs, queue=queue)
    soon = timedelta(milliseconds=50)
    schedule("tests.jobs.leave", [f"{queue}-due"], queue=queue, run_after=soon)
    failing = [
        ("tests.jobs.leave_then_fail", [f"{queue}-bad-{i}"]) for i in range(FAIL)
    ]
    schedule_many(failing, queue=queue, meta={"max_attempts": 1})


def die_at(point, queue, folder, wait_until, time=1):
    """Let a worker of this queue die when it comes to the point so many times."""
    fate = {"AQ_DIE_AT": f"{point}:{time}"}
    has_to_give_back = point.endswith("_release")
    if has_to_give_back:
        # What was claimed is not begun after a signal, which comes before its turn.
        fate["AQ_STOP_AT"] = "after_claim"
    with working(
        folder, "--burst", "--threads=2", f"--queues={queue}", environment=fate
    ) as worker:
        if has_to_give_back:
            wait_until(lambda: is_stopped(worker.process.pid))
            worker.send(signal.SIGTERM)
            worker.send(signal.SIGCONT)
        assert worker.process.wait(30) == -signal.SIGKILL, worker.said


def finish(folder):
    with working(folder, "--burst") as worker:
        assert worker.process.wait(60) == 0, worker.said


def count_passed():
    """Return in how many queues all is as if nobody had died."""
    passed = 0
    for queue in Job.objects.values_list("queue", flat=True).distinct():
        jobs = Job.objects.filter(queue=queue)
        succeeded = jobs.filter(status=Status.SUCCESSFUL, failures=0).count()
        failed = jobs.filter(status=Status.FAILED, failures=1).count()
        passed += (succeeded, failed) == (SUCCEED + 1, FAIL)
    return passed


@pytest.mark.parametrize("time", [3, 1, 6][:ROUNDS])
def test_another_worker_finishes_what_one_left_that_died_at_any_point(
    tmp_path, wait_until, time
):
    for point in POINTS:
        put_jobs_in(point)
        if point in AT_A_GRAVE:
            die_at("after_claim", point, tmp_path, wait_until)
        times = time if point in OF_EACH_JOB else 1
        die_at(point, point, tmp_path, wait_until, times)
        if ROUNDS > 1:  # else the next one, which dies as well, comes first
            finish(tmp_path)
    finish(tmp_path)

    passed = count_passed()
    figure("points of death passed", f"{passed} of {len(POINTS)}")
    assert passed == len(POINTS)
    assert_kept()
    assert_nobody_works()
    # Nobody lost a job twice.
    assert set(Job.objects.values_list("attempt", "suspect")) <= {
        (1, False),
        (2, False),
    }
