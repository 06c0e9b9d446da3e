"""The database server is restarted, or killed, while jobs run. Faults 13, 14, 45."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from django.db import connection

from async_queue.models import Job
from tests import fleet
from tests.figures import figure
from tests.fleet import Stopwatch, employed
from tests.invariants import assert_kept, assert_nobody_works
from tests.long import bound, long
from tests.servers import Server
from tests.workers import Running, registered

pytestmark = pytest.mark.django_db(transaction=True)
RESTARTS = long(2, 20)
JOBS = long(300, 6000)
DISASTERS = long(1, 5)
WORKERS = 3
PATIENCE = 60  # seconds
WaitUntil = Callable[..., None]
Settings = dict[str, Any]


def engage(stack: ExitStack, folder: Path, database: Settings) -> list[Running]:
    return [stack.enter_context(employed(folder, on=database)) for _ in range(WORKERS)]


def restart_roughly(server: Server) -> None:
    """Restart it so that nothing is finished and nobody is told."""
    if connection.vendor == "postgresql":
        server.restart("immediate")
    else:
        server.kill()
        server.start()


def seconds_to_next_success(wait_until: WaitUntil) -> float:
    watch = Stopwatch()
    connection.close()
    before = fleet.count_successes()
    wait_until(lambda: fleet.count_successes() > before, PATIENCE)
    return watch.seconds()


def test_restarts_of_the_server_fail_no_job_and_repeat_no_effect(
    server: Server, database: Settings, tmp_path: Path, wait_until: WaitUntil
) -> None:
    fleet.schedule_work(JOBS, 0.01)
    resumed = []

    with ExitStack() as stack:
        workers = engage(stack, tmp_path, database)
        wait_until(lambda: registered(*workers))
        numbers = [worker.number for worker in workers]
        for number in range(1, RESTARTS + 1):
            share = JOBS * number // (RESTARTS + 2)
            wait_until(lambda least=share: fleet.count_successes() >= least, PATIENCE)
            restart_roughly(server)
            resumed.append(seconds_to_next_success(wait_until))
        wait_until(fleet.is_drained, PATIENCE)
        assert [worker.number for worker in workers] == numbers
        assert [worker.end() for worker in workers] == [0] * WORKERS

    assert fleet.counted() == {"SUCCESSFUL": JOBS}
    assert not set(Job.objects.values_list("failures", flat=True)) - {0}
    assert_kept()
    assert_nobody_works()
    assert max(resumed) < bound(2)
    version = fleet.server_version()
    figure(f"{RESTARTS} restarts, {version}: median to first job", median(resumed), "s")
    figure(f"{RESTARTS} restarts, {version}: longest to first job", max(resumed), "s")


def test_server_and_workers_killed_together_lose_and_repeat_nothing(
    server: Server, database: Settings, tmp_path: Path, wait_until: WaitUntil
) -> None:
    fleet.schedule_work(JOBS, 0.01)
    rescued = []

    for number in range(1, DISASTERS + 1):
        with ExitStack() as stack:
            workers = engage(stack, tmp_path, database)
            share = JOBS * number // (DISASTERS + 2)
            wait_until(lambda least=share: fleet.count_successes() >= least, PATIENCE)
            server.kill()
            for worker in workers:
                worker.kill()
        connection.close()
        server.start()
        watch = Stopwatch()
        with employed(tmp_path, on=database) as worker:
            wait_until(partial(nothing_is_held_by_others, worker), PATIENCE)
            rescued.append(watch.seconds())
    with employed(tmp_path, on=database) as worker:
        wait_until(fleet.is_drained, PATIENCE)
        assert worker.end() == 0

    assert fleet.counted() == {"SUCCESSFUL": JOBS}
    assert_kept()
    version = fleet.server_version()
    figure(f"server and workers killed, {version}: all rescued", max(rescued), "s")


def nothing_is_held_by_others(worker: Running) -> bool:
    """Whether what the dead held is READY again, or held by this worker."""
    number = worker.number
    return number > 0 and not fleet.held_by_others(number)
