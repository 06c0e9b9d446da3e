"""Workers that are told to stop while jobs run: in time, uncharged, no orphans (36)."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from async_queue import schedule, schedule_many
from async_queue.db import vendor
from async_queue.models import Job, Status, Worker
from tests import hanging
from tests.factories import JobFactory
from tests.figures import figure
from tests.fleet import Stopwatch, counted, is_drained
from tests.invariants import assert_nobody_works
from tests.long import bound, long
from tests.models import Effect
from tests.stepping import exceptions_of
from tests.workers import Running, descendants, working

pytestmark = pytest.mark.django_db(transaction=True)
is_serial = vendor(connection).runs_one_job_at_a_time
WaitUntil = Callable[..., None]

TERM, INT = signal.SIGTERM, signal.SIGINT
# Seconds: what the worker waits for, and jobs that it does and does not wait for.
PATIENCE = long(2, 25)
SHORT, ENDLESS = long(1, 5), 60.0
# Beyond its patience, the worker ends runs, records that, and ends. Whoever kills what
# does not end, such as Kubernetes after 30 s, must leave it so long.
MARGIN = 5.0
HANGS = 60.0
QUICK = long(50, 500)
ONE, TWO = ["--threads=4"], ["--threads=2", "--processes=2"]
# One job runs at a time on SQLite; the second stands in line behind it.
LABELS = [["short", "endless"]]
if is_serial:
    LABELS = [["short", "short too"], ["endless", "endless too"]]
WAITS = f"--shutdown-timeout={PATIENCE}"


def schedule_slow(folder: Path, label: str) -> None:
    seconds = SHORT if label.startswith("short") else ENDLESS
    args = [str(folder), label, seconds]
    schedule(hanging.take, args, priority=10, meta={"max_attempts": 1})


def schedule_quick() -> None:
    schedule_many(("tests.jobs.leave", [f"quick-{i}"]) for i in range(QUICK))


@contextmanager
def at_work(
    folder: Path, count: int, wait_until: WaitUntil, *arguments: str
) -> Iterator[Running]:
    """Yield a worker once so many jobs have begun."""
    with working(folder, WAITS, *arguments) as running:
        wait_until(lambda: len(begun_in(folder)) == count)
        yield running


def begun_in(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in folder.glob("begun-*"))


def labels() -> list[str]:
    return sorted(Effect.objects.values_list("label", flat=True))


def assert_uncharged(job: Job) -> None:
    job.refresh_from_db()
    assert job.status == Status.READY
    assert (job.failures, job.crashes, job.suspect) == (0, 0, False)
    # On SQLite a process may have to leave it to another one, which writes just then.
    assert set(exceptions_of(job)) <= ({"WorkerLost"} if is_serial else set())


@pytest.mark.parametrize("slow", LABELS, ids=" and ".join)
@pytest.mark.parametrize(
    ("number", "arguments"),
    [(TERM, ONE), (TERM, TWO), (INT, TWO)],
    ids=["TERM", "TERM, two processes", "INT, two processes"],
)
def test_signal_lets_short_jobs_finish_and_gives_back_long_ones(
    number: signal.Signals,
    arguments: list[str],
    slow: list[str],
    tmp_path: Path,
    wait_until: WaitUntil,
) -> None:
    for label in slow:
        schedule_slow(tmp_path, label)
    schedule_quick()

    with at_work(tmp_path, 1 if is_serial else 2, wait_until, *arguments) as running:
        watch = Stopwatch()
        running.send(number)
        code = running.process.wait(PATIENCE + HANGS)
        seconds = watch.seconds()

    begun = begun_in(tmp_path)
    short = [label for label in begun if label.startswith("short")]
    figure(f"36 {number.name}, {begun} of 5 and 60 s at work: ended after", seconds)
    allowed = SHORT if begun == short else PATIENCE
    assert code == 0, running.said
    assert seconds <= allowed + bound(MARGIN)
    assert [label for label in labels() if not label.startswith("quick")] == short
    assert counted().keys() <= {"SUCCESSFUL", "READY"}
    assert counted()["SUCCESSFUL"] == Effect.objects.count()
    for job in Job.objects.filter(status=Status.READY):
        assert_uncharged(job)
    assert_nobody_works()


@pytest.mark.parametrize("arguments", [ONE, TWO], ids=["one", "two"])
def test_worker_without_a_job_ends_at_once(
    arguments: list[str], tmp_path: Path, wait_until: WaitUntil
) -> None:
    schedule_quick()

    with at_work(tmp_path, 0, wait_until, *arguments) as running:
        wait_until(is_drained, HANGS)
        wait_until(lambda: Worker.objects.count() == (2 if arguments == TWO else 1))
        watch = Stopwatch()
        code = running.end()
        seconds = watch.seconds()

    figure(f"36 TERM with jobs of 0 s {' '.join(arguments)}: ended after", seconds)
    assert code == 0, running.said
    assert seconds <= bound(MARGIN)
    assert not Worker.objects.exists()


@pytest.mark.parametrize(
    ("number", "arguments"),
    [(TERM, ONE), (INT, TWO)],
    ids=["TERM", "INT, two processes"],
)
def test_second_signal_ends_it_at_once_and_others_run_what_it_ran(
    number: signal.Signals,
    arguments: list[str],
    tmp_path: Path,
    wait_until: WaitUntil,
) -> None:
    job = schedule(hanging.wait_for_go, [str(tmp_path), "held"])
    with at_work(tmp_path, 1, wait_until, *arguments) as running:
        running.send(number)
        wait_until(lambda: "the next signal ends it" in running.said)
        watch = Stopwatch()
        running.send(number)
        code = running.process.wait(HANGS)
        seconds = watch.seconds()
        (tmp_path / "go").touch()

        with working(tmp_path, "--burst"):
            wait_until(is_drained)

    figure(f"36 second {number.name} with a job at work: ended after", seconds)
    assert seconds <= bound(MARGIN)
    assert code == 128 + number, running.said
    job.refresh_from_db()
    assert (job.status, job.failures, job.crashes) == (Status.SUCCESSFUL, 0, 0)
    assert labels() == ["held"]
    wait_until(lambda: not Job.objects.filter(status=Status.RUNNING).exists())


def test_job_that_swallows_all_is_given_back_too(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule(hanging.hang, ["stubborn", str(tmp_path)])

    with working(tmp_path, "--shutdown-timeout=0") as running:
        wait_until((tmp_path / "stubborn").exists)
        watch = Stopwatch()
        code = running.end()
        seconds = watch.seconds()

    figure("36 TERM, no patience, with a stubborn job: ended after", seconds)
    assert code == 0, running.said
    assert seconds <= bound(MARGIN)
    assert_uncharged(job)
    assert labels() == []
    assert not Worker.objects.exists()


def test_process_of_a_suspect_ends_with_its_worker(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    args: list[Any] = [str(tmp_path), "alone", ENDLESS]
    job = JobFactory(function="tests.hanging.take", args=json.dumps(args), suspect=True)
    with working(tmp_path, "--shutdown-timeout=0") as running:
        wait_until((tmp_path / "begun-alone").exists)
        (process,) = descendants(running.process.pid)
        code = running.end()

    assert code == 0, running.said
    assert not Path(f"/proc/{process}").exists()
    job.refresh_from_db()
    assert (job.status, job.failures, job.crashes) == (Status.READY, 0, 0)
    assert job.suspect
    assert labels() == []
    assert_nobody_works()
