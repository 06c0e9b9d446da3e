"""SQLite: workers are killed and stopped beside a web process that writes. Fault 43."""

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from threading import Event

import pytest
from django.db import Error, connection

from async_queue.db import vendor
from async_queue.models import Attempt
from async_queue.threads import Thread
from tests import fleet
from tests.figures import figure
from tests.fleet import Stopwatch, let_pass
from tests.invariants import assert_kept
from tests.long import long
from tests.models import Order
from tests.workers import Running, registered, working

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(
        not vendor(connection).runs_one_job_at_a_time,
        reason="elsewhere a writer waits for no other",
    ),
]
ROUNDS, JOBS = long(4, 40), long(150, 2500)
STOPPED = 0.3  # seconds
PATIENCE = 120  # seconds


class Web:
    """Writes a row each hundredth of a second, as views do."""

    def __init__(self) -> None:
        self.written = self.refused = 0
        self.longest = 0.0
        self._is_over = Event()
        self._thread = Thread(target=self._write)

    def __enter__(self) -> "Web":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _write(self) -> None:
        while not self._is_over.wait(0.01):
            watch = Stopwatch()
            try:
                Order.objects.create(total=self.written)
                self.written += 1
            except Error:
                self.refused += 1
            self.longest = max(self.longest, watch.seconds())


def start(stack: ExitStack, folder: Path, wait_until: Callable[..., None]) -> Running:
    worker = stack.enter_context(working(folder, "--threads=2"))
    wait_until(lambda: registered(worker))
    return worker


def test_killed_and_stopped_workers_lose_nothing_beside_a_web_process(
    tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    fleet.schedule_work(JOBS, 0.01)
    rng, killed = Random(43), 0

    with ExitStack() as stack, Web() as web:
        workers = [start(stack, tmp_path, wait_until) for _ in range(3)]
        for number in range(ROUNDS):
            let_pass(rng.uniform(0.05, 0.3))
            victim = workers.pop(0)
            if number % 2:
                victim.send(signal.SIGSTOP)
                let_pass(STOPPED)
                victim.send(signal.SIGCONT)
                workers.append(victim)
            else:
                victim.send(signal.SIGKILL)
                killed += 1
                workers.append(start(stack, tmp_path, wait_until))
        wait_until(fleet.is_drained, PATIENCE)

    figure("43 kills and stops beside a writer", ROUNDS)
    figure("43 jobs that lost their worker", Attempt.objects.count())
    figure("43 rows written meanwhile", web.written)
    figure("43 rows refused meanwhile", web.refused)
    figure("43 longest write", web.longest)
    assert fleet.counted() == {"SUCCESSFUL": JOBS}
    assert Order.objects.count() == web.written
    assert_kept()
    with connection.cursor() as cursor:
        assert cursor.execute("PRAGMA integrity_check").fetchone() == ("ok",)
