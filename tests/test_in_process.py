"""A worker inside a web server: where it runs, and what becomes of it at the end."""

import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import pytest
from django.core.signals import request_started
from django.db import connection

from async_queue import hooks, in_process
from async_queue.db import vendor
from async_queue.models import Job, Status, Worker
from tests.factories import JobFactory
from tests.jobs import leave_then_await
from tests.models import Effect
from tests.process import finished
from tests.proxy import proxy
from tests.sites import site
from tests.workers import children

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(os.name != "posix", reason="these servers fork"),
]
# What a server says when it serves no more, and Python is about to end.
ENDING = {"gunicorn": "Worker exiting", "uvicorn": "Finished server process"}
AWAY = "no jobs run in this process, trying again: "
pytest.importorskip("gunicorn")
pytest.importorskip("uvicorn")


@pytest.fixture
def wait_until(wait_until):
    """Wait for longer: a server takes its time to start."""
    return partial(wait_until, seconds=60)


def numbers_of_workers():
    return sorted(Worker.objects.values_list("pid", flat=True))


def labels():
    return list(Effect.objects.values_list("label", flat=True))


def statuses():
    return list(Job.objects.order_by("id").values_list("status", flat=True))


def assert_nothing_is_left():
    assert not Worker.objects.exists()
    assert not Job.objects.filter(status=Status.RUNNING).exists()


@pytest.mark.parametrize("kind", ["runserver", "reloading", "threads", "uvicorn"])
def test_job_of_a_view_runs_in_the_process_that_serves(kind, tmp_path, wait_until):
    with site(kind, tmp_path) as served:
        wait_until(served.is_up)
        assert not Worker.objects.exists()
        number = served.get("schedule")
        wait_until(labels)
        assert numbers_of_workers() == [number]
        served.stop()

    assert labels() == [str(number)]
    assert_nothing_is_left()


@pytest.mark.parametrize("kind", ["gunicorn", "processes"])
def test_each_process_that_serves_has_a_worker(kind, tmp_path, wait_until):
    with site(kind, tmp_path) as served:
        wait_until(served.is_up)
        seen = set()
        wait_until(lambda: seen.add(served.get("schedule")) or len(seen) == 2)
        wait_until(lambda: set(numbers_of_workers()) == seen)
        assert seen <= set(children(served.process.pid))
        wait_until(lambda: set(statuses()) == {"SUCCESSFUL"})
        served.stop()

    assert set(labels()) <= set(map(str, seen))
    assert_nothing_is_left()


class WaitingJob:
    """A job that waits until the test lets it go on."""

    def __init__(self, folder, function="await_file"):
        self._path = folder / "go"
        args = json.dumps([str(self._path)])
        JobFactory(function=f"tests.test_in_process.{function}", args=args)

    def has_begun(self):
        return Path(f"{self._path}-begun").exists()

    def go_on(self):
        self._path.touch()


def await_file(path):
    Path(f"{path}-begun").touch()
    leave_then_await(path)


@pytest.mark.parametrize("kind", ["gunicorn", "uvicorn"])
def test_job_that_runs_when_the_server_is_to_stop_finishes(kind, tmp_path, wait_until):
    job = WaitingJob(tmp_path)

    with site(kind, tmp_path) as served:
        wait_until(served.is_up)
        served.get("number")
        wait_until(job.has_begun)
        served.tell(signal.SIGTERM)
        wait_until(lambda: ENDING[kind] in served.said)
        assert statuses() == ["RUNNING"]
        job.go_on()
        served.process.wait(30)

    assert statuses() == ["SUCCESSFUL"]
    assert_nothing_is_left()


def await_in_pool(path):
    """Return when there is a file, which a thread of its own has to find."""
    await_file(path)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(Path(path).exists).result(20)


@pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 3), reason="no thread can begin any more"
)
def test_job_may_start_threads_while_the_server_ends(tmp_path, wait_until):
    job = WaitingJob(tmp_path, "await_in_pool")

    with site("gunicorn", tmp_path) as served:
        wait_until(served.is_up)
        served.get("number")
        wait_until(job.has_begun)
        served.tell(signal.SIGTERM)
        wait_until(lambda: "Worker exiting" in served.said)
        job.go_on()
        served.process.wait(30)

    assert statuses() == ["SUCCESSFUL"]


@pytest.mark.parametrize("kind", ["runserver", "gunicorn", "uvicorn"])
def test_job_that_runs_for_too_long_is_given_back(kind, tmp_path, wait_until):
    job = WaitingJob(tmp_path)

    with site(kind, tmp_path, SHUTDOWN_TIMEOUT=0) as served:
        wait_until(served.is_up)
        served.get("number")
        wait_until(job.has_begun)
        served.stop()

    (row,) = Job.objects.all()
    assert (row.status, row.attempt, row.failures) == (Status.READY, 1, 0)
    assert labels() == []
    assert_nothing_is_left()


def rename(table, name):
    with connection.schema_editor() as editor:
        editor.execute(f"ALTER TABLE {table} RENAME TO {name}")


@pytest.fixture
def unmigrated():
    """Let there be no table for workers; what is yielded makes it."""
    rename("async_queue_worker", "elsewhere")
    is_away = True

    def migrate():
        nonlocal is_away
        rename("elsewhere", "async_queue_worker")
        is_away = False

    yield migrate
    if is_away:
        migrate()


@pytest.mark.parametrize("kind", ["threads", "uvicorn"])
def test_tables_that_are_missing_are_waited_for(kind, tmp_path, unmigrated, wait_until):
    JobFactory()

    with site(kind, tmp_path) as served:
        wait_until(served.is_up)
        served.get("number")
        wait_until(lambda: AWAY in served.said)
        unmigrated()
        wait_until(lambda: statuses() == ["SUCCESSFUL"])
        served.stop()

    assert served.said.count(AWAY) == 1
    assert_nothing_is_left()


def test_server_stops_that_has_no_worker_yet(tmp_path, unmigrated, wait_until):
    with site("threads", tmp_path) as served:
        wait_until(served.is_up)
        served.get("number")
        wait_until(lambda: AWAY in served.said)

        assert served.stop() == 0


@pytest.mark.skipif(
    vendor(connection).runs_one_job_at_a_time, reason="a file has no server"
)
def test_database_that_is_away_is_waited_for(tmp_path, wait_until):
    settings = connection.settings_dict
    JobFactory()

    with proxy(settings["HOST"], int(settings["PORT"])) as way:
        way.refuse()
        with site("threads", tmp_path, database={"PORT": way.port}) as served:
            wait_until(served.is_up)
            served.get("number")
            wait_until(lambda: AWAY in served.said)
            way.admit()
            wait_until(lambda: statuses() == ["SUCCESSFUL"])
            served.stop()

    assert_nothing_is_left()


CHANGING = """
import threading
from http.client import HTTPException
from pathlib import Path
from tests.jobs import leave

def work(path):
    Path(path).touch()
    while not threading._SHUTTING_DOWN:
        threading.Event().wait(0.01)
    leave({label!r})
"""


def test_change_of_code_lets_what_runs_finish(tmp_path, wait_until):
    module, begun = tmp_path / "changing.py", tmp_path / "begun"
    module.write_text(CHANGING.format(label="old"))
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    JobFactory(function="changing.work", args=json.dumps([str(begun)]))

    with site("reloading", tmp_path, environment=environment) as served:
        wait_until(served.is_up)
        first = served.get("number")
        wait_until(begun.exists)
        module.write_text(CHANGING.format(label="new"))
        wait_until(lambda: has_changed(module) and statuses() == ["SUCCESSFUL"])
        wait_until(lambda: number_of(served) not in (None, first))
        wait_until(numbers_of_workers)
        served.stop()

    assert labels() == ["old"]
    assert Job.objects.get().attempt == 1
    assert_nothing_is_left()


def has_changed(module):
    """Make the file younger still: whoever watches may not have seen the first."""
    moment = module.stat().st_mtime + 1
    os.utime(module, (moment, moment))
    return True


def number_of(served):
    with suppress(OSError, HTTPException, ValueError):  # while it starts anew
        return served.get("number")


def test_settings_that_are_wrong_let_the_site_serve(tmp_path, wait_until):
    with site("uvicorn", tmp_path, THREADS=0) as served:
        wait_until(served.is_up)
        number = served.get("number")

        assert served.get("number") == number
        assert "no jobs run in this process" in served.said
        served.stop()


REQUEST = """
import threading
from django.test import Client
answer = Client().get("/number/", HTTP_HOST="127.0.0.1")
print(answer.status_code, *[thread.name for thread in threading.enumerate()])
"""


def test_test_client_of_a_command_starts_no_worker():
    settings = {"AQ_TEST_SETTINGS": json.dumps({"IN_PROCESS": True})}

    ended = finished("shell", "-v0", "-c", REQUEST, environment=settings)

    assert ended.stdout.split() == ["200", "MainThread"], ended.stderr


def test_live_server_of_a_test_starts_no_worker(settings, live_server):
    settings.ASYNC_QUEUE = {"IN_PROCESS": True}
    in_process.serve_with_requests()

    try:
        with urlopen(f"{live_server.url}/number/", timeout=20) as answer:
            assert int(answer.read()) == os.getpid()
    finally:
        request_started.disconnect(dispatch_uid="async_queue.in_process")

    assert threads() == []


def threads():
    return [one.name for one in threading.enumerate() if "async_queue" in one.name]


@pytest.fixture
def inside():
    made = in_process.Inside()
    yield made
    made.stop()


def test_worker_inside_starts_and_stops(inside, wait_until):
    inside.start()
    wait_until(numbers_of_workers)

    assert numbers_of_workers() == [os.getpid()]
    inside.stop()

    assert threads() == []
    assert_nothing_is_left()


def test_forked_child_stops_nothing(inside, wait_until):
    inside.start()
    wait_until(numbers_of_workers)
    connection.close()

    child = os.fork()
    if child == 0:
        try:
            inside.stop()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

    assert numbers_of_workers() == [os.getpid()]
    assert "async_queue-in-process" in threads()


def test_worker_that_fails_is_followed_by_another(inside, wait_until, caplog):
    with hooks.at("after_register", fail):
        inside.start()
        wait_until(lambda: "the worker of this process has failed" in caplog.text)

    wait_until(lambda: any(thread == "async_queue-1" for thread in threads()))
    wait_until(numbers_of_workers)


def fail():
    raise ZeroDivisionError


def test_worker_that_ends_is_followed_by_another(inside, wait_until, caplog):
    inside.start()
    wait_until(numbers_of_workers)
    (first,) = Worker.objects.values_list("id", flat=True)

    inside._worker.stop()

    wait_until(lambda: Worker.objects.exclude(pk=first).exists())
    assert "trying again: the worker has ended: stopped" in caplog.text
