"""Workers behind a pooler of transactions, PgBouncer. Faults 22 and 23."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import pytest
from django.db import connection
from django.db.models import Q

from async_queue import schedule
from async_queue.models import Attempt, Job, Status, Worker
from tests import fleet, servers
from tests.figures import figure
from tests.fleet import employed
from tests.invariants import assert_kept, assert_nobody_works
from tests.jobs import await_file, take_time
from tests.long import bound, long
from tests.servers import Server
from tests.stepping import exceptions_of
from tests.workers import Running, registered, seconds_until

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(
        bool(servers.pgbouncer_obstacle()),
        reason=servers.pgbouncer_obstacle() or "there is one",
    ),
]
STALL_AFTER = 5  # seconds
JOBS, RESTARTS = long(400, 4000), long(2, 10)
PATIENCE = 60  # seconds
WaitUntil = Callable[..., None]
LOCKS = (
    "SELECT count(*) FROM pg_locks JOIN pg_database AS here"
    " ON here.oid = database AND datname = current_database()"
    " WHERE locktype = 'advisory'"
)
LISTENERS = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND query ILIKE 'LISTEN%'"
)


def ask(sql: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return int(cursor.fetchone()[0])


@pytest.fixture
def pooler() -> Iterator[Server]:
    with servers.pgbouncer(connection.settings_dict) as made:
        yield made


@pytest.fixture
def workers(
    pooler: Server, tmp_path: Path, wait_until: WaitUntil
) -> Iterator[list[Running]]:
    settings = pooler.settings(connection.settings_dict["NAME"])
    with ExitStack() as stack:
        made = [
            stack.enter_context(
                employed(tmp_path, on=settings, STALL_AFTER=STALL_AFTER)
            )
            for _ in range(2)
        ]
        wait_until(lambda: registered(*made))
        yield made


def runs(worker: Running, jobs: list[Job]) -> bool:
    running = Job.objects.filter(status=Status.RUNNING, worker_id=worker.number)
    return running.filter(pk__in=[job.pk for job in jobs]).count() == len(jobs)


def has_succeeded(job: Job) -> bool:
    return Job.objects.filter(pk=job.pk, status=Status.SUCCESSFUL).exists()


def seconds_to_next_success(wait_until: WaitUntil) -> float:
    before = fleet.count_successes()
    return seconds_until(lambda: fleet.count_successes() > before, wait_until)


def test_killed_worker_behind_a_pooler_is_found_by_its_heart(
    workers: list[Running], tmp_path: Path, wait_until: WaitUntil
) -> None:
    may_end = tmp_path / "may_end"
    jobs = [schedule(await_file, [f"job-{i}", str(may_end)]) for i in range(8)]
    wait_until(lambda: fleet.counted() == {"RUNNING": 8})
    doomed, survivor = workers
    lost = list(Job.objects.filter(worker_id=doomed.number))
    assert lost

    doomed.kill()
    seconds = seconds_until(
        lambda: not fleet.held_by_others(survivor.number), wait_until
    )
    may_end.touch()
    wait_until(fleet.is_drained)

    assert seconds < bound(STALL_AFTER + 2.5)
    assert {attempt.job_id for attempt in Attempt.objects.all()} == {
        job.pk for job in lost
    }
    assert fleet.counted() == {"SUCCESSFUL": len(jobs)}
    assert_kept()
    name = f"kill -9 behind PgBouncer, STALL_AFTER {STALL_AFTER} s: rescued after"
    figure(name, seconds, "s")


def test_pooler_is_noticed_said_once_and_left_without_locks(
    workers: list[Running], wait_until: WaitUntil
) -> None:
    fleet.schedule_work(20)
    wait_until(fleet.is_drained)

    assert not Worker.objects.filter(Q(has_lock=True) | Q(wants_wakeup=True)).exists()
    assert ask(LOCKS) == 0
    assert ask(LISTENERS) == 0
    workers[0].kill()
    assert workers[1].end() == 0
    for worker in workers:
        assert worker.said.count("transaction pooler") == 1
    assert ask(LOCKS) == 0
    figure("locks left behind in PgBouncer's connections", ask(LOCKS))


def test_idle_worker_behind_a_pooler_finds_what_is_scheduled(
    workers: list[Running], wait_until: WaitUntil
) -> None:
    waits = []
    for i in range(long(3, 20)):
        job = schedule(take_time, [f"job-{i}", 0.0])
        waits.append(seconds_until(lambda it=job: has_succeeded(it), wait_until))

    assert max(waits) < bound(1.5)
    figure("picked up by polling behind PgBouncer: longest", max(waits), "s")


def test_run_over_time_behind_a_pooler_is_ended(
    workers: list[Running], wait_until: WaitUntil
) -> None:
    job = schedule(take_time, ["slow", 30.0], meta={"timeout": 1, "max_attempts": 1})

    wait_until(lambda: fleet.counted() == {"FAILED": 1})

    assert exceptions_of(job) == ["JobTimeout"]
    assert_kept()


def test_restarts_of_the_pooler_lose_and_repeat_nothing(
    pooler: Server, workers: list[Running], wait_until: WaitUntil
) -> None:
    numbers = [worker.number for worker in workers]
    fleet.schedule_work(JOBS, 0.01)
    resumed = []

    for number in range(1, RESTARTS + 1):
        share = JOBS * number // (RESTARTS + 2)
        wait_until(lambda least=share: fleet.count_successes() >= least, PATIENCE)
        pooler.kill()
        pooler.start()
        resumed.append(seconds_to_next_success(wait_until))
    wait_until(fleet.is_drained, PATIENCE)

    assert [worker.number for worker in workers] == numbers
    assert [worker.end() for worker in workers] == [0, 0]
    assert fleet.counted() == {"SUCCESSFUL": JOBS}
    assert_kept()
    assert_nobody_works()
    assert ask(LOCKS) == 0
    assert max(resumed) < bound(2)
    name = f"{RESTARTS} kills of PgBouncer"
    figure(f"{name}: median to first job", median(resumed), "s")
    figure(f"{name}: longest to first job", max(resumed), "s")
