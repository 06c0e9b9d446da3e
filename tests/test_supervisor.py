import json
import logging
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from time import monotonic

import pytest

from async_queue import probes, processes
from async_queue.supervisor import CODES, Supervisor
from tests.long import bound

HERE = "tests.test_supervisor"


class Sound:
    def is_live(self):
        return True

    def is_ready(self):
        return True


def work(folder, heartbeat):
    """Be a worker that stops when it is told to, and not otherwise."""
    over = Event()
    processes.when_told(lambda word: (_leave(folder, word or "orphaned"), over.set()))
    _leave(folder, "begun")
    if heartbeat:
        with probes.heartbeat(Path(heartbeat), Sound(), 0.01):
            over.wait(60)
    over.wait(60)
    sys.exit(CODES["stopped"])


def hang(folder, heartbeat):
    """Be a worker that hears nothing."""
    _leave(folder, "begun")
    Event().wait(60)


def end(given, heartbeat):
    """Be a worker that ends with the next of the codes, the last one for ever."""
    codes, folder = json.loads(given)
    _leave(folder, "begun")
    ended = len(list(Path(folder).glob("begun-*")))
    os._exit(codes[min(ended, len(codes)) - 1])


def work_or_fail(folder, heartbeat):
    """Be a worker of which the first to come cannot start."""
    try:
        (Path(folder) / "first").touch(exist_ok=False)
    except FileExistsError:
        work(folder, heartbeat)
    sys.exit(CODES["cannot start"])


def supervise(folder):
    Supervisor(2, f"{HERE}:work", folder, shutdown_timeout=timedelta(0)).run()


def _leave(folder, word):
    (Path(folder) / f"{word}-{os.getpid()}").touch()


def pids(folder, word="begun"):
    return {int(path.name.partition("-")[2]) for path in folder.glob(f"{word}-*")}


class Running:
    """A supervisor that runs in a thread of the test."""

    def __init__(self, entry, options, count=1, seconds=20, **more):
        timeout = timedelta(seconds=seconds)
        self.supervisor = Supervisor(
            count, f"{HERE}:{entry}", str(options), shutdown_timeout=timeout, **more
        )
        self._thread = Thread(target=self.supervisor.run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.supervisor.stop(at_once=True)
        self.join()

    def stop(self, **how):
        self.supervisor.stop(**how)
        self.join()

    def join(self):
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def reason(self):
        return self.supervisor.reason


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "async_queue")
    return lambda: [record.getMessage() for record in caplog.records]


def test_all_are_started_and_told_to_stop(tmp_path, wait_until, lines):
    with Running("work", tmp_path, count=3) as running:
        wait_until(lambda: len(pids(tmp_path)) == 3)
        running.stop()

    assert running.reason == "stopped"
    assert pids(tmp_path, "stop") == pids(tmp_path)
    assert not pids(tmp_path, "orphaned")
    assert lines() == []


def test_all_are_told_to_stop_at_once(tmp_path, wait_until):
    with Running("work", tmp_path, count=2) as running:
        wait_until(lambda: len(pids(tmp_path)) == 2)
        running.stop(at_once=True)

    assert pids(tmp_path, "now") == pids(tmp_path)


def test_stop_that_comes_while_they_start_is_heard(tmp_path):
    with Running("work", tmp_path, count=2) as running:
        running.stop()

    assert running.reason == "stopped"


def test_process_that_was_killed_is_replaced_quickly(tmp_path, wait_until, lines):
    with Running("work", tmp_path) as running:
        wait_until(lambda: pids(tmp_path))
        (first,) = pids(tmp_path)
        killed_at = monotonic()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(pids(tmp_path)) == 2)
        assert monotonic() - killed_at < bound(5)
        running.stop()

    (line,) = lines()
    assert f"worker process 1 (pid {first}) was killed by SIGKILL" in line
    assert line.endswith("another starts in 0.2 s")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGSEGV, "crashed in native code (SIGSEGV)"),
        (signal.SIGABRT, "was aborted by native code (SIGABRT)"),
        (signal.SIGUSR1, "was ended by SIGUSR1"),
        (signal.SIGRTMIN + 1, "was ended by signal"),
    ],
)
def test_death_is_told_of_in_words(
    tmp_path, wait_until, lines, number, words, monkeypatch
):
    monkeypatch.setattr("async_queue.supervisor._MARGIN", 0.2)

    with Running("hang", tmp_path, seconds=0) as running:
        wait_until(lambda: pids(tmp_path))
        os.kill(*pids(tmp_path), number)
        wait_until(lines)
        running.supervisor.stop(at_once=True)

        assert words in lines()[0]


def test_pauses_grow_while_it_crashes(tmp_path, wait_until, lines):
    """Exit code 0 is no good news, but what a job gives that calls os._exit(0)."""
    with Running("end", json.dumps([[0, 3], str(tmp_path)])):
        wait_until(lambda: len(lines()) == 3)

    first, second, third = lines()[:3]
    assert "ended by itself with exit code 0; another starts in 0.2 s" in first
    assert "ended by itself with exit code 3; another starts in 0.4 s" in second
    assert third.endswith("another starts in 0.8 s")


def test_process_that_has_done_its_share_is_replaced_at_once(tmp_path, lines):
    codes = [CODES[reason] for reason in ("max_jobs", "max_memory", "code changed")]

    with Running(
        "end", json.dumps([[*codes, 1, CODES["drained"]], str(tmp_path)])
    ) as r:
        r.join()

    assert r.reason == "drained"
    assert ["another takes its place" in line for line in lines()] == [True] * 3 + [
        False
    ]
    assert lines()[3].endswith("another starts in 0.2 s")


def test_process_that_somebody_stops_is_replaced(tmp_path, wait_until):
    codes = [CODES["stopped"], CODES["drained"]]

    with Running("end", json.dumps([codes, str(tmp_path)])) as running:
        running.join()

    assert len(pids(tmp_path)) == 2


def test_all_are_done_when_each_is_drained(tmp_path, lines):
    with Running("end", json.dumps([[CODES["drained"]], str(tmp_path)]), count=2) as r:
        r.join()

    assert r.reason == "drained"
    assert len(pids(tmp_path)) == 2
    assert lines() == []


def test_one_that_cannot_start_at_first_stops_all(tmp_path):
    with Running("work_or_fail", tmp_path, count=2) as running:
        running.join()

    assert running.reason == "cannot start"


def test_process_that_does_not_stop_is_killed(tmp_path, wait_until, lines, monkeypatch):
    monkeypatch.setattr("async_queue.supervisor._MARGIN", 0.2)

    with Running("hang", tmp_path, seconds=0) as running:
        wait_until(lambda: pids(tmp_path))
        running.stop()

    assert "does not end: killing it" in lines()[0]
    assert "was killed by SIGKILL" in lines()[1]


def test_no_process_where_the_system_has_none_left(tmp_path, lines, monkeypatch):
    """It goes on trying."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))

    with Running("work", tmp_path) as running:
        while len(lines()) < 2:
            Event().wait(0.01)
        monkeypatch.undo()
        while not pids(tmp_path):
            Event().wait(0.01)
        running.stop()

    assert "no worker process: " in lines()[0]


def test_probes_tell_how_the_processes_are(tmp_path, wait_until):
    more = {"folder": tmp_path, "interval": 0.01}

    with Running("work", tmp_path, count=2, **more) as running:
        assert running.supervisor.is_live()
        assert not running.supervisor.is_ready()
        wait_until(running.supervisor.is_ready)
        running.stop()

    assert not list(tmp_path.glob("worker-*"))


def test_process_whose_loop_stands_is_not_live(tmp_path, wait_until, monkeypatch):
    monkeypatch.setattr("async_queue.supervisor._FIRST_BEAT", 0.0)
    more = {"folder": tmp_path, "interval": 0.01, "seconds": 0}

    with Running("hang", tmp_path, **more) as running:
        wait_until(lambda: pids(tmp_path))

        assert not running.supervisor.is_live()

        os.kill(*pids(tmp_path), signal.SIGKILL)


def test_processes_stop_when_their_supervisor_is_killed(tmp_path, wait_until):
    with processes.start(f"{HERE}:supervise", str(tmp_path)) as supervisor:
        wait_until(lambda: len(pids(tmp_path)) == 2)

        supervisor.kill()

        wait_until(lambda: pids(tmp_path, "orphaned") == pids(tmp_path))
