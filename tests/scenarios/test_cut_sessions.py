"""Sessions of workers are cut, or wait for a lock of somebody's. Faults 16 and 17."""

import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from django.db import Error, connection

from async_queue import cancel, schedule
from async_queue.db import mysql, postgresql
from async_queue.models import Attempt, Job, Progress, Status
from tests import fleet
from tests.factories import JobFactory
from tests.figures import figure
from tests.fleet import Stopwatch, employed, uncommitted
from tests.invariants import assert_kept, assert_nobody_works
from tests.jobs import await_file, count_until_file, take_time
from tests.long import bound, long
from tests.proxy import TO_CLIENT, Proxy, proxy
from tests.workers import Running, registered, seconds_until, working

SETTINGS = connection.settings_dict
pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(
        not SETTINGS.get("HOST"), reason="there is no session that could be cut"
    ),
]
JOBS = long(200, 6000)
EVERY = 0.2  # seconds
CUTS, PAUSE = long(6, 150), long(1.0, 0.2)  # of keepers
# Where other tests run beside these, a keeper may wait for a core for longer than it
# has to come back; the long form measures with what workers have.
GRACE = long({"AQ_GRACE": "10"}, {})
PATIENCE = 2  # seconds; no keeper waits for so long for a lock
WaitUntil = Callable[..., None]

OTHERS = {
    "postgresql": "SELECT pid FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "mysql": "SELECT id FROM information_schema.processlist"
    " WHERE db = DATABASE() AND id <> CONNECTION_ID()",
}
KEEPER = {
    "postgresql": "SELECT pid FROM pg_locks JOIN pg_database AS here"
    " ON here.oid = database AND datname = current_database()"
    " WHERE locktype = 'advisory' AND granted"
    f" AND classid = {postgresql._LIVES} AND objid = %s",
    "mysql": f"SELECT IS_USED_LOCK({mysql._LIFE})",
}
END = {"postgresql": "SELECT pg_terminate_backend(%s)", "mysql": "KILL %s"}


def ask(sql: dict[str, str], *params: Any) -> list[int]:
    with connection.cursor() as cursor:
        cursor.execute(sql[connection.vendor], params)
        return [row[0] for row in cursor.fetchall() if row[0] is not None]


def cut(session: int) -> None:
    try:
        with connection.cursor() as cursor:
            cursor.execute(END[connection.vendor], (session,))
    except Error:  # it has ended by itself
        pass


@pytest.fixture
def workers(tmp_path: Path, wait_until: WaitUntil) -> Iterator[list[Running]]:
    with ExitStack() as stack:
        made = [
            stack.enter_context(working(tmp_path, environment=GRACE)) for _ in range(2)
        ]
        wait_until(lambda: registered(*made))
        yield made


def test_random_cuts_leave_every_job_with_one_effect(
    workers: list[Running], wait_until: WaitUntil
) -> None:
    fleet.schedule_work(JOBS, 0.05)
    chance = random.Random(16)
    cuts = 0

    while fleet.count_successes() < JOBS * 9 // 10:
        if sessions := ask(OTHERS):
            cut(chance.choice(sessions))
            cuts += 1
        fleet.let_pass(EVERY)
    # Some were put off, for longer each time.
    wait_until(fleet.is_drained, 60)

    assert [worker.end() for worker in workers] == [0, 0]
    assert fleet.counted() == {"SUCCESSFUL": JOBS}
    assert_kept()
    assert_nobody_works()
    figure(f"sessions cut every {EVERY} s, {fleet.server_version()}: cuts", cuts)


def test_cuts_of_the_keepers_alone_end_no_run(
    workers: list[Running], tmp_path: Path, wait_until: WaitUntil
) -> None:
    numbers = [worker.number for worker in workers]
    may_end = tmp_path / "may_end"
    for i in range(8):
        schedule(await_file, [f"job-{i}", str(may_end)])
    wait_until(lambda: fleet.counted() == {"RUNNING": 8})

    cuts = 0
    for _ in range(CUTS):
        for number in numbers:
            for session in ask(KEEPER, number):
                cut(session)
                cuts += 1
        fleet.let_pass(PAUSE)
    may_end.touch()
    wait_until(fleet.is_drained)

    assert set(Job.objects.values_list("status", "attempt")) == {("SUCCESSFUL", 1)}
    assert_kept()
    assert [worker.number for worker in workers] == numbers
    assert not Attempt.objects.exists()
    wait_until(lambda: all(ask(KEEPER, number) for number in numbers))
    assert [worker.end() for worker in workers] == [0, 0]
    figure(f"keepers cut every {PAUSE} s, no run repeated: cuts", cuts)


def test_idle_keeper_that_is_cut_goes_on_under_its_number(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    with employed(tmp_path) as worker:
        wait_until(lambda: registered(worker))
        number = worker.number

        (session,) = ask(KEEPER, number)
        cut(session)
        wait_until(lambda: ask(KEEPER, number) not in ([], [session]))
        schedule(take_time, ["later", 0.0])
        wait_until(fleet.is_drained)

        assert worker.number == number
    assert_kept()


@pytest.fixture
def orphaned(tmp_path: Path, wait_until: WaitUntil) -> Iterator[tuple[Any, ...]]:
    """Three jobs that their worker has begun, it itself, and one that could rescue."""
    may_end = tmp_path / "may_end"
    jobs = [schedule(await_file, [f"job-{i}", str(may_end)]) for i in range(3)]
    with employed(tmp_path, "--queues=default") as doomed:
        wait_until(lambda: fleet.counted() == {"RUNNING": 3})
        with employed(tmp_path, "--queues=default") as survivor:
            wait_until(lambda: registered(doomed, survivor))
            yield jobs, doomed, survivor, may_end


def are_run_by(worker: Running, jobs: list[Job]) -> bool:
    running = Job.objects.filter(status=Status.RUNNING, worker_id=worker.number)
    return running.filter(pk__in=[job.pk for job in jobs]).count() == len(jobs)


def test_uncommitted_cancel_delays_no_other_rescue_or_outcome(
    orphaned: tuple[Any, ...], wait_until: WaitUntil
) -> None:
    (held, *others), doomed, survivor, may_end = orphaned

    with uncommitted(lambda: cancel(held)):
        doomed.kill()
        rescued = seconds_until(lambda: are_run_by(survivor, others), wait_until)
        new = schedule(take_time, ["new", 0.0])
        done = seconds_until(lambda: has_succeeded(new), wait_until)
        assert Job.objects.get(pk=held.pk).attempt == 1
    freed = seconds_until(lambda: are_run_by(survivor, [held]), wait_until)
    may_end.touch()
    wait_until(fleet.is_drained)

    assert rescued < bound(2.5)
    assert done < bound(2)
    assert freed < bound(2.5)
    assert_kept()
    figure("rescue beside an uncommitted cancel", rescued, "s")
    figure("a job's outcome beside an uncommitted cancel", done, "s")


def test_open_fence_delays_no_other_rescue_or_outcome(
    orphaned: tuple[Any, ...], tmp_path: Path, wait_until: WaitUntil
) -> None:
    jobs, doomed, survivor, may_end = orphaned
    stops = {"AQ_STOP_AT": "after_fence"}

    with working(tmp_path, "--queues=fenced", environment=stops) as stopped:
        fenced = schedule(take_time, ["fenced", 0.0], queue="fenced")
        wait_until(lambda: fleet.is_stopped(stopped.process.pid))
        doomed.kill()
        rescued = seconds_until(lambda: are_run_by(survivor, jobs), wait_until)
        new = schedule(take_time, ["new", 0.0])
        done = seconds_until(lambda: has_succeeded(new), wait_until)
        assert Job.objects.get(pk=fenced.pk).status == Status.RUNNING
        stopped.send(signal.SIGCONT)
        wait_until(lambda: has_succeeded(fenced))
    may_end.touch()
    wait_until(fleet.is_drained)

    assert rescued < bound(2.5)
    assert done < bound(2)
    assert_kept()
    figure("rescue beside an open fence", rescued, "s")
    figure("a job's outcome beside an open fence", done, "s")


def test_uncommitted_cancel_delays_no_other_record_of_a_timeout(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    held, other = (
        schedule(take_time, [f"job-{i}", 30.0], meta={"timeout": 2, "max_attempts": 1})
        for i in range(2)
    )
    with employed(tmp_path):
        wait_until(lambda: fleet.counted() == {"RUNNING": 2})

        with uncommitted(lambda: cancel(held)):
            seconds = seconds_until(lambda: has_failed(other), wait_until)
            assert not has_failed(held)
        wait_until(lambda: has_failed(held))

    assert seconds < bound(4)
    assert_kept()
    figure("timeout of 2 s recorded beside an uncommitted cancel after", seconds, "s")


def test_uncommitted_cancel_delays_no_other_lost_claim(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    with employed(tmp_path) as worker:
        wait_until(lambda: registered(worker))
        held, other = (
            JobFactory(
                function="tests.jobs.leave",
                args=json.dumps([f"job-{i}"]),
                running=True,
                worker_id=worker.number,
            )
            for i in range(2)
        )

        with uncommitted(lambda: cancel(held)):
            seconds = seconds_until(lambda: has_succeeded(other), wait_until)
            assert not has_succeeded(held)
        wait_until(lambda: has_succeeded(held))

        assert "the database is away" not in worker.said
    assert seconds < bound(3.5)
    assert_kept()
    figure("lost claim beside an uncommitted cancel: run again after", seconds, "s")


def test_uncommitted_cancel_delays_no_shutdown_of_others(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    may_end = tmp_path / "may_end"
    jobs = [schedule(await_file, [f"job-{i}", str(may_end)]) for i in range(3)]
    with employed(tmp_path, "--shutdown-timeout=0") as worker:
        wait_until(lambda: fleet.counted() == {"RUNNING": 3})

        with uncommitted(lambda: cancel(jobs[0])):
            watch = Stopwatch()
            assert worker.end() == 0
            seconds = watch.seconds()
            assert fleet.counted() == {"RUNNING": 1, "READY": 2}
            assert not Attempt.objects.exists()
    may_end.touch()
    with employed(tmp_path):
        wait_until(fleet.is_drained)

    assert seconds < bound(5)
    assert fleet.counted() == {"SUCCESSFUL": 3}
    assert_kept()
    figure("shutdown beside an uncommitted cancel", seconds, "s")


def test_keeper_that_waits_in_vain_for_a_lock_still_rescues_and_stays_connected(
    orphaned: tuple[Any, ...], tmp_path: Path, wait_until: WaitUntil
) -> None:
    jobs, doomed, survivor, may_end = orphaned
    last = schedule(count_until_file, ["last", str(may_end)])
    wait_until(lambda: are_run_by(survivor, [last]) or are_run_by(doomed, [last]))
    jobs = jobs if are_run_by(survivor, [last]) else [*jobs, last]
    wait_until(lambda: Progress.objects.filter(job=last).exists())
    (session,) = ask(KEEPER, survivor.number)

    with uncommitted(lambda: Progress.objects.update(done=0)):
        fleet.let_pass(PATIENCE)
        doomed.kill()
        rescued = seconds_until(lambda: are_run_by(survivor, jobs), wait_until)
        assert ask(KEEPER, survivor.number) == [session]
    written = Progress.objects.get(job=last).done
    wait_until(lambda: Progress.objects.get(job=last).done > written)
    may_end.touch()
    wait_until(fleet.is_drained)

    assert "the database is away" not in survivor.said
    assert rescued < bound(2.5 + PATIENCE)
    assert_kept()
    figure("rescue by a keeper that waits in vain for a lock", rescued, "s")


def has_succeeded(job: Job) -> bool:
    return Job.objects.filter(pk=job.pk, status=Status.SUCCESSFUL).exists()


def has_failed(job: Job) -> bool:
    return Job.objects.filter(pk=job.pk, status=Status.FAILED).exists()


@pytest.fixture
def wire() -> Iterator[Proxy]:
    with proxy(SETTINGS["HOST"], int(SETTINGS["PORT"])) as made:
        yield made


def test_claim_whose_answer_is_lost_runs_soon_under_the_same_worker(
    wire: Proxy, tmp_path: Path, wait_until: WaitUntil
) -> None:
    settings = {**SETTINGS, "HOST": "127.0.0.1", "PORT": str(wire.port)}
    del settings["TEST"]
    with employed(tmp_path, on=settings) as worker:
        wait_until(lambda: registered(worker))
        number = worker.number

        wire.delay[TO_CLIENT] = 0.5
        for i in range(4):
            schedule(take_time, [f"job-{i}", 0.0])
        wait_until(lambda: fleet.counted() == {"RUNNING": 4})
        wire.cut_all()
        wire.delay[TO_CLIENT] = 0.0
        seconds = seconds_until(fleet.is_drained, wait_until)

        assert worker.number == number
        assert "gave back" in worker.said
    assert set(Job.objects.values_list("status", "attempt")) == {("SUCCESSFUL", 2)}
    assert seconds < bound(3)
    assert_kept()
    figure("claim whose answer was lost: run again", seconds, "s")
