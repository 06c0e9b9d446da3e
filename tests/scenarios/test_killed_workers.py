"""Workers killed in the middle of jobs: how soon others run these again. Faults 1-4."""

import json
import os
import signal
from contextlib import ExitStack, suppress
from functools import partial
from random import random
from statistics import median
from time import monotonic

import pytest
from django.db import connection

from async_queue import schedule_many
from async_queue.db import vendor
from async_queue.models import Attempt, Job, Status, Worker
from tests.deadly import begun
from tests.figures import figure
from tests.fleet import let_pass
from tests.invariants import assert_kept, assert_nobody_works
from tests.long import bound, long
from tests.workers import registered, seconds_until, working

pytestmark = pytest.mark.django_db(transaction=True)
is_serial = vendor(connection).runs_one_job_at_a_time
# As many as each worker could run: atomic ones of SQLite run one at a time.
JOBS = 1 if is_serial else 6
ROUNDS = long(3, 40)
MEDIAN, WORST = bound(1.0), bound(2.5)  # seconds
QUERIES = {
    "sqlite": {
        "computing": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n "
        "WHERE i < 300000000) SELECT count(*) FROM n",
    },
    "postgresql": {
        "sleeping": "SELECT pg_sleep(30)",
        "computing": "SELECT count(*) FROM generate_series(1, 300000000)",
    },
    "mysql": {
        "sleeping": "SELECT SLEEP(30)",
        "computing": "SELECT BENCHMARK(2000000000, MD5('x'))",
    },
}[connection.vendor]


class Fleet:
    """Three workers, of which one after the other is killed and replaced."""

    def __init__(self, folder, wait_until):
        self._folder = folder
        self._wait_until = wait_until
        self._around = ExitStack()
        self.workers = {}
        self.rounds = 0

    def __enter__(self):
        self.add(3)
        return self

    def __exit__(self, *exc):
        self._around.close()

    def add(self, count):
        new = [
            self._around.enter_context(working(self._folder, f"--threads={JOBS}"))
            for _ in range(count)
        ]
        self._wait_until(lambda: registered(*new))
        self.workers |= {each.number: each for each in new}

    def kill_one(self, function="hold", *args):
        """Kill the one that runs a job of this; return the seconds until all run again.

        Once they do, they are let finish.
        """
        folder = self._begin(function, *args)
        victim, lost = self._find_victim()
        # At any moment between two looks of the others.
        let_pass(random())
        killed_at = monotonic()
        self.workers.pop(victim).send(signal.SIGKILL)
        self._wait_until(lambda: begun(folder, 2) >= lost)
        took = monotonic() - killed_at
        assert begun(folder, 2) == lost
        (folder / "go").touch()
        self._wait_until(is_drained, 60)
        return took

    def kill_all(self):
        """Kill all in the middle of their jobs; return the folder of these."""
        folder = self._begin("hold")
        for each in self.workers.values():
            each.send(signal.SIGKILL)
        self.workers.clear()
        return folder

    def end(self):
        for each in self.workers.values():
            each.send(signal.SIGTERM)
        assert {each.process.wait(30) for each in self.workers.values()} == {0}

    def _begin(self, function, *args):
        """Let one begin a job of this function, and all of them hold others."""
        self.rounds += 1
        folder = self._folder / str(self.rounds)
        folder.mkdir()
        calls = [(f"tests.deadly.{function}", [self._first(), str(folder), *args])]
        for number in range(1, JOBS):
            label = f"{self.rounds}-{number}"
            calls.append(("tests.deadly.hold", [label, str(folder)]))
        schedule_many(calls)
        self._wait_until(lambda: len(begun(folder, 1)) == JOBS)
        return folder

    def _first(self):
        return f"{self.rounds}-first"

    def _find_victim(self):
        jobs = Job.objects.filter(status=Status.RUNNING)
        labels = {
            it: json.loads(args)[0] for it, args in jobs.values_list("id", "args")
        }
        workers = dict(jobs.values_list("id", "worker_id"))
        (victim,) = (workers[it] for it in labels if labels[it] == self._first())
        return victim, {labels[it] for it in labels if workers[it] == victim}


@pytest.fixture
def fleet(tmp_path, wait_until):
    with Fleet(tmp_path, wait_until) as three:
        yield three


def has_run_again(folder, labels):
    return begun(folder, 2) == labels


def is_drained():
    return not Job.objects.exclude(status=Status.SUCCESSFUL).exists()


def note(name, seconds):
    figure(f"{name}: median", round(median(seconds), 3), "s")
    figure(f"{name}: worst", round(max(seconds), 3), "s")


def assert_lost_once_uncharged():
    assert set(Job.objects.values_list("failures", "suspect")) == {(0, False)}
    assert set(Job.objects.values_list("attempt", flat=True)) <= {1, 2}
    raised = set(Attempt.objects.values_list("exception", flat=True))
    assert raised == {"async_queue.exceptions.WorkerLost"}


def test_jobs_of_killed_workers_run_again_within_seconds(fleet):
    seconds = []
    for _ in range(ROUNDS):
        seconds.append(fleet.kill_one())
        fleet.add(1)
    fleet.end()

    note("kill -9 to all its jobs running again", seconds)
    assert_kept()
    assert_nobody_works()
    assert_lost_once_uncharged()
    assert median(seconds) <= MEDIAN, seconds
    assert max(seconds) <= WORST, seconds


@pytest.fixture
def children(tmp_path):
    """End what jobs have forked, which outlives their workers."""
    yield lambda: [int(path.read_text()) for path in tmp_path.glob("*/child-*")]
    for path in tmp_path.glob("*/child-*"):
        with suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)


def test_neither_a_query_nor_a_forked_child_keeps_a_killed_worker_alive(
    fleet, children
):
    cases = {f"during a {kind} query": ("query", sql) for kind, sql in QUERIES.items()}
    cases["with a forked child"] = ("fork",)
    worst = []
    for case, call in cases.items():
        seconds = []
        for _ in range(long(1, 10)):
            seconds.append(fleet.kill_one(*call))
            fleet.add(1)
        note(f"kill -9 {case} to all its jobs running again", seconds)
        worst.append(max(seconds))
    fleet.end()

    for child in children():
        os.kill(child, 0)  # still there, with all that it inherited
    assert_kept()
    assert_lost_once_uncharged()
    assert max(worst) <= WORST, worst


def test_worker_that_is_started_after_all_were_killed_runs_their_jobs_at_once(
    fleet, wait_until
):
    seconds = []
    for _ in range(long(1, 10)):
        folder = fleet.kill_all()
        lost = begun(folder, 1)
        fleet.add(1)
        run_again = partial(has_run_again, folder, lost)
        seconds.append(seconds_until(run_again, wait_until))
        (folder / "go").touch()
        wait_until(is_drained)
        fleet.add(2)
    fleet.end()

    note(
        "all workers killed: registration of a new one to all jobs running again",
        seconds,
    )
    assert not Worker.objects.filter(dead_at=None).exists()
    assert_kept()
    assert_lost_once_uncharged()
    assert max(seconds) <= WORST, seconds
