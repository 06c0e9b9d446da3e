"""The database is away for a while, or stands still. Fault 15, and a long stall."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from async_queue import schedule
from async_queue.models import Attempt, Job, Status, Worker
from tests import fleet
from tests.figures import figure
from tests.fleet import Stopwatch, cpu_seconds, employed
from tests.invariants import assert_kept, assert_nobody_works
from tests.jobs import take_time
from tests.long import bound, long
from tests.servers import Server
from tests.workers import registered

pytestmark = pytest.mark.django_db(transaction=True)
AWAY = long(4, 600)  # seconds
# How long it stands still, and how long a worker may: the first is more.
STALL, STALL_AFTER = long(6, 40), long(5, 30)
WORKERS, JOBS = 3, 150
WaitUntil = Callable[..., None]
Settings = dict[str, Any]


def test_workers_rest_while_the_database_is_away_and_go_on_at_once(
    server: Server, database: Settings, tmp_path: Path, wait_until: WaitUntil
) -> None:
    with ExitStack() as stack:
        workers = [
            stack.enter_context(employed(tmp_path, on=database)) for _ in range(2)
        ]
        wait_until(lambda: registered(*workers))
        numbers = [worker.number for worker in workers]
        interrupted = schedule(take_time, ["interrupted", 1.0])
        wait_until(lambda: Job.objects.filter(status=Status.RUNNING).exists())
        server.stop()
        connection.close()
        fleet.let_pass(2)  # until the job has found out

        before = [cpu_seconds(worker.process.pid) for worker in workers]
        fleet.let_pass(AWAY - 2)
        used = [
            cpu_seconds(worker.process.pid) - earlier
            for worker, earlier in zip(workers, before, strict=True)
        ]
        server.start()
        watch = Stopwatch()
        later = schedule(take_time, ["later", 0.0])
        wait_until(lambda: has_succeeded(later))
        resumed = watch.seconds()
        wait_until(lambda: has_succeeded(interrupted), 60)
        assert [worker.number for worker in workers] == numbers
        assert [worker.end() for worker in workers] == [0, 0]

    share = max(used) / (AWAY - 2)
    version = fleet.server_version()
    figure(f"{AWAY} s away, {version}: processor used meanwhile", 100 * share, "%")
    figure(f"{AWAY} s away, {version}: first job after its return", resumed, "s")
    assert share < long(20, 1) / 100
    assert resumed < bound(2)
    assert_kept()
    assert_nobody_works()
    for worker in workers:
        assert worker.said.count("WARNING the database is away") == 1
        assert worker.said.count("WARNING the database is back") == 1


def has_succeeded(job: Job) -> bool:
    return Job.objects.filter(pk=job.pk, status=Status.SUCCESSFUL).exists()


def test_nobody_is_declared_dead_because_the_database_stood_still(
    server: Server, database: Settings, tmp_path: Path, wait_until: WaitUntil
) -> None:
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                employed(tmp_path, on=database, STALL_AFTER=STALL_AFTER)
            )
            for _ in range(WORKERS)
        ]
        wait_until(lambda: registered(*workers))
        numbers = [worker.number for worker in workers]
        fleet.schedule_work(JOBS, 0.1)
        wait_until(lambda: fleet.count_successes() > 10)

        server.freeze()
        fleet.let_pass(STALL)
        server.thaw()
        watch = Stopwatch()
        before = fleet.count_successes()
        wait_until(lambda: fleet.count_successes() > before)
        resumed = watch.seconds()
        wait_until(fleet.is_drained, 60)
        # Time enough for them to accuse each other.
        fleet.let_pass(STALL_AFTER + 1)

        assert [worker.number for worker in workers] == numbers
        assert not Worker.objects.exclude(dead_at=None).exists()
        assert not Attempt.objects.exists()
        assert [worker.end() for worker in workers] == [0] * WORKERS

    assert fleet.counted() == {"SUCCESSFUL": JOBS}
    assert_kept()
    version = fleet.server_version()
    figure(f"{STALL} s of stall, {version}: first job after it", resumed, "s")
