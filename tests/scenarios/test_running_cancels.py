"""Jobs that are cancelled, or watched from outside, while they run."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from django.db import OperationalError, connection

from async_queue import cancel, schedule
from async_queue.db import vendor
from async_queue.models import Job, Progress, Status
from tests import hanging, jobs
from tests.figures import figure
from tests.fleet import Stopwatch, let_pass
from tests.invariants import assert_nobody_works
from tests.long import bound
from tests.models import Effect
from tests.stepping import exceptions_of
from tests.workers import working

pytestmark = pytest.mark.django_db(transaction=True)
WaitUntil = Callable[..., None]
is_serial = vendor(connection).runs_one_job_at_a_time
while_it_writes = pytest.mark.skipif(
    is_serial, reason="nobody else can write while a job's transaction is open"
)
LOOSE = {"atomic": False}
# A keeper looks at what its rows say once in POLL_INTERVAL, a second.
NOTICED = 1.5


def labels() -> list[str]:
    return sorted(Effect.objects.values_list("label", flat=True))


def assert_cancelled(job: Job) -> None:
    job.refresh_from_db()
    assert (job.status, job.failures) == (Status.CANCELLED, 0)
    assert job.finished_at is not None
    assert exceptions_of(job) == []


@while_it_writes
@pytest.mark.parametrize("kind", ["sleep", "query", "stubborn"])
def test_cancelled_run_is_ended_and_leaves_nothing(
    kind: str, tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule(hanging.hang, [kind, str(tmp_path)])

    with working(tmp_path, "--threads=1") as running:
        wait_until((tmp_path / kind).exists)
        watch = Stopwatch()
        assert cancel(job) == 1
        told = watch.seconds()
        assert_cancelled(job)
        # Its only thread is free again, or another has taken its place.
        schedule(jobs.leave, ["next"])
        wait_until(lambda: labels() == ["next"])
        freed = watch.seconds()
        code = running.end()

    figure(f"cancel of a job in {kind}: returned after", told)
    figure(f"cancel of a job in {kind}: its place filled after", freed)
    assert told <= bound(0.5)
    assert freed <= bound(NOTICED + 1.5)
    assert code == 0, running.said
    assert_cancelled(job)
    assert labels() == ["next"]
    assert_nobody_works()


@pytest.mark.parametrize(
    "meta", [pytest.param({}, marks=while_it_writes, id="atomic"), LOOSE], ids=str
)
def test_job_that_looks_is_told_that_it_was_cancelled(
    meta: dict[str, bool], tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule(hanging.look_for_cancel, [str(tmp_path)], meta=meta)

    with working(tmp_path, "--threads=1"):
        wait_until((tmp_path / "begun").exists)
        watch = Stopwatch()
        assert cancel(job) == 1
        assert_cancelled(job)
        wait_until((tmp_path / "stopped").exists)
        seconds = watch.seconds()
        schedule(jobs.leave, ["next"])
        wait_until(lambda: "next" in labels())

    figure(f"cancel: a job that looks {meta or ''} is told after", seconds)
    assert seconds <= bound(NOTICED)
    assert (tmp_path / "stopped").read_text() == "JobCancelled"
    assert_cancelled(job)
    # Only what is not atomic has happened.
    assert labels() == ["effect"] * bool(meta) + ["next"]


def test_loose_job_that_does_not_look_goes_on_to_its_end(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule(hanging.wait_for_go, [str(tmp_path)], meta=LOOSE)

    with working(tmp_path, "--threads=1", settings={"POLL_INTERVAL": 0.1}) as running:
        wait_until((tmp_path / "begun-effect").exists)
        assert cancel(job) == 1
        assert_cancelled(job)
        let_pass(1)  # in which the keeper looks ten times
        assert not (tmp_path / "ended-effect").exists()
        (tmp_path / "go").touch()
        wait_until((tmp_path / "ended-effect").exists)
        code = running.end()

    assert code == 0, running.said
    assert_cancelled(job)
    assert labels() == ["effect"]


@pytest.mark.parametrize(
    "meta", [pytest.param({}, marks=while_it_writes, id="atomic"), LOOSE], ids=str
)
def test_progress_is_seen_from_outside_while_the_job_runs(
    meta: dict[str, bool], tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule(hanging.report_progress, [str(tmp_path)], meta=meta)

    def shown() -> tuple[int, int | None, str] | None:
        rows = Progress.objects.filter(job=job)
        return rows.values_list("done", "total", "note").first()

    with working(tmp_path, "--threads=1"):
        wait_until((tmp_path / "begun").exists)
        watch = Stopwatch()
        wait_until(lambda: shown() == (3, 10, "a third"))
        seconds = watch.seconds()
        assert labels() == ["effect"] * bool(meta)
        (tmp_path / "more").touch()
        wait_until(lambda: shown() == (9, 10, ""))
        assert Job.objects.get(pk=job.pk).status == Status.RUNNING
        (tmp_path / "go").touch()
        wait_until(lambda: Job.objects.get(pk=job.pk).status == Status.SUCCESSFUL)

    figure(f"progress of a job {meta or ''} is seen after", seconds)
    assert seconds <= bound(NOTICED)
    assert labels() == ["effect"]


def test_fencing_token_grows_with_each_run_of_a_job(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule(hanging.wait_for_go, [str(tmp_path)])
    begun, tokens = tmp_path / "begun-effect", []

    for number in (signal.SIGKILL, signal.SIGTERM):
        with working(tmp_path, "--threads=1") as running:
            wait_until(begun.exists)
            tokens.append(tuple(map(int, begun.read_text().split()[1:])))
            begun.unlink()
            if number == signal.SIGTERM:
                (tmp_path / "go").touch()
            running.send(number)
            running.process.wait(30)

    assert tokens == [(job.pk, 1), (job.pk, 2)]
    job.refresh_from_db()
    assert (job.status, job.attempt, job.failures) == (Status.SUCCESSFUL, 2, 0)
    assert labels() == ["effect"]


@pytest.mark.skipif(not is_serial, reason="elsewhere a cancel need not wait")
def test_cancel_of_an_atomic_job_on_sqlite_fails_while_it_has_the_lock(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule(hanging.wait_for_go, [str(tmp_path)])

    with working(tmp_path, "--threads=1"):
        wait_until((tmp_path / "begun-effect").exists)
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA busy_timeout = 100")
        with pytest.raises(OperationalError, match="locked"):
            cancel(job)
        (tmp_path / "go").touch()
        wait_until(lambda: Job.objects.get(pk=job.pk).status == Status.SUCCESSFUL)

    connection.close()
    assert labels() == ["effect"]
