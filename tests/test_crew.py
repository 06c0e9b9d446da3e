import threading
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from queue import SimpleQueue
from threading import Event

import pytest
from django.db import OperationalError, connection
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from async_queue.context import RunningJob
from async_queue.crew import CallingThread, ThreadCrew
from async_queue.db import vendor
from tests.stepping import database_settings

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
trace = ContextVar("trace", default="clean")


def claimed(number):
    return RunningJob(
        alias="default",
        worker=1,
        id=number,
        function="tests.jobs.leave",
        args="[]",
        kwargs="{}",
        meta="{}",
        seal="",
        queue="default",
        rank=0,
        run_after=MOMENT,
        enqueued_at=MOMENT,
        attempt=1,
        failures=0,
        claimed_at=MOMENT,
    )


class Work:
    """Runs jobs; those of even ids stay until they may go on."""

    def __init__(self):
        self.begun = SimpleQueue()
        self.go_on = Event()
        self.done = SimpleQueue()

    def __call__(self, job):
        job.control.call(partial(self._call, job))

    def _call(self, job):
        self.begun.put((job.id, job.control.slot))
        if job.id % 2 == 0:
            assert self.go_on.wait(20)
        self.done.put(job.id)


@pytest.fixture
def work():
    made = Work()
    yield made
    made.go_on.set()


@pytest.fixture
def crew(work, wait_until):
    """Make a crew of so many threads; it is dismissed in the end."""
    crews = []

    def make(size, run=work, *, is_eager=False):
        crews.append(ThreadCrew("default", size, run, is_eager))
        return crews[-1]

    yield make
    work.go_on.set()
    for one in crews:
        one.dismiss(wait=True)
    wait_until(lambda: not names_of_threads())


def names_of_threads():
    return [one.name for one in threading.enumerate() if "async_queue-" in one.name]


def test_each_thread_runs_jobs_under_its_own_number(crew, work):
    two = crew(2)

    for number in (2, 4):
        two.hand(claimed(number))

    assert dict(work.begun.get(timeout=20) for _ in range(2)).keys() == {2, 4}
    work.go_on.set()
    assert {work.done.get(timeout=20) for _ in range(2)} == {2, 4}


@pytest.fixture
def connected():
    """The names of the threads that have opened a connection."""
    names = []

    def note(*, connection, **signal):
        names.append(threading.current_thread().name)

    connection_created.connect(note)
    yield names
    connection_created.disconnect(note)


@pytest.mark.django_db(transaction=True)
def test_eager_threads_connect_before_there_is_a_job(crew, connected, wait_until):
    crew(2, is_eager=True)

    wait_until(lambda: {"async_queue-1", "async_queue-2"} <= set(connected))


@pytest.mark.django_db(transaction=True)
def test_eager_threads_take_nothing_from_a_pool(crew, work, connected):
    """Others, such as requests, borrow from it, too."""
    with database_settings({"pool": True}):
        crew(1, is_eager=True).hand(claimed(3))

        assert work.done.get(timeout=20) == 3
    assert "async_queue-1" not in connected


def test_threads_that_cannot_connect_early_are_there_all_the_same(
    crew, work, monkeypatch
):
    def refuse(self):
        raise OperationalError("not yet")

    monkeypatch.setattr(BaseDatabaseWrapper, "ensure_connection", refuse)

    crew(1, is_eager=True).hand(claimed(3))

    assert work.done.get(timeout=20) == 3


def test_what_no_thread_has_begun_is_taken_back(crew, work):
    one = crew(1)
    waiting = claimed(3)
    one.hand(claimed(2))
    assert work.begun.get(timeout=20)[0] == 2
    one.hand(waiting)

    assert one.take_back() == [waiting]
    assert one.take_back() == []


def test_job_that_stands_in_line_is_taken_back_too(crew, work):
    """Only where jobs stand in line, behind one that may be long."""

    def stand_in_line(job):
        work.begun.put(job.id)
        assert work.go_on.wait(20)

    one, job = crew(1, stand_in_line), claimed(2)
    one.hand(job)
    assert work.begun.get(timeout=20) == 2

    has_line = vendor(connection).runs_one_job_at_a_time
    assert one.take_back() == ([job] if has_line else [])


def test_thread_that_hangs_is_replaced(crew, work):
    one, hung = crew(1), claimed(2)
    one.hand(hung)
    first = work.begun.get(timeout=20)

    assert one.replace(hung)
    one.hand(claimed(3))

    assert work.begun.get(timeout=20) == (3, first[1] + 1)
    assert one.lost == 1


def test_thread_that_comes_back_after_all_takes_no_more_jobs(crew, work, wait_until):
    one, hung = crew(1), claimed(2)
    one.hand(hung)
    work.begun.get(timeout=20)
    one.replace(hung)

    work.go_on.set()

    wait_until(lambda: one.lost == 0)
    one.hand(claimed(3))
    assert work.begun.get(timeout=20) == (3, 2)


def test_nobody_is_replaced_who_runs_another_job(crew, work):
    one = crew(1)
    one.hand(claimed(2))
    work.begun.get(timeout=20)

    assert not one.replace(claimed(2))
    assert one.lost == 0


def test_no_thread_at_the_end_of_the_interpreter_is_no_error(
    crew, work, caplog, monkeypatch
):
    one, hung = crew(1), claimed(2)
    one.hand(hung)
    work.begun.get(timeout=20)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert one.replace(hung)

    assert "no thread can be started" in caplog.text


def refuse(thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")


def test_thread_outlives_whatever_the_worker_raises(crew, caplog):
    done = SimpleQueue()

    def run(job):
        if job.id == 1:
            raise ZeroDivisionError
        done.put(job.id)

    one = crew(1, run)
    one.hand(claimed(1))
    one.hand(claimed(2))

    assert done.get(timeout=20) == 2
    assert "job 1: the worker itself failed" in caplog.text


def test_what_a_job_leaves_in_the_context_is_not_the_next_ones(crew):
    seen = SimpleQueue()

    def run(job):
        seen.put(trace.get())
        trace.set("dirty")

    one = crew(1, run)
    one.hand(claimed(1))
    one.hand(claimed(2))

    assert [seen.get(timeout=20) for _ in range(2)] == ["clean", "clean"]


def test_crew_that_is_dismissed_finishes_what_was_handed_to_it(crew, work):
    one = crew(1)
    for number in (1, 3):
        one.hand(claimed(number))

    one.dismiss(wait=True)

    assert [work.done.get_nowait() for _ in range(2)] == [1, 3]


def test_calling_thread_runs_at_once():
    seen = []
    caller = CallingThread(lambda job: seen.append((job.id, threading.get_ident())))

    caller.hand(claimed(1))

    assert seen == [(1, threading.get_ident())]
    assert caller.take_back() == []
    assert not caller.replace(claimed(1))
    caller.dismiss(wait=True)
    assert caller.lost == 0
