import gc
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import weakref
from concurrent import futures
from concurrent.futures.thread import BrokenThreadPool
from contextvars import ContextVar, copy_context
from pathlib import Path
from threading import Barrier, Event

import pytest
from django.db import connection, connections, transaction

from async_queue.threads import Thread, ThreadPoolExecutor
from tests import stdlib_threads

ROOT = Path(__file__).parent.parent
request_id = ContextVar("request_id", default="none")
pytestmark = pytest.mark.django_db(transaction=True)


class Ledger:
    """The connections that threads used, and which of them are open."""

    def __init__(self):
        self.used = []

    def query(self):
        """Use the calling thread's connection and note it."""
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        self.used.append(connections["default"])
        return connections["default"]

    @property
    def still_open(self):
        # Django keeps the closed session of an unfinished transaction, and says so.
        return [
            used
            for used in self.used
            if used.connection is not None and not used.closed_in_transaction
        ]


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture(params=[0, 60, None], ids=lambda age: f"max_age_{age}")
def max_age(request, monkeypatch):
    """Settings are shared by the wrappers of all threads, so this reaches them all."""
    monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", request.param)


@pytest.fixture
def persistent(monkeypatch):
    monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", None)


@pytest.fixture
def uncaught(monkeypatch):
    """What `threading.excepthook` was given."""
    caught = []
    monkeypatch.setattr(
        threading, "excepthook", lambda args: caught.append(args.exc_value)
    )
    return caught


def run(thread):
    thread.start()
    thread.join()


@pytest.mark.usefixtures("max_age")
def test_thread_that_ends_has_closed_its_connection(ledger):
    run(Thread(target=ledger.query))

    assert len(ledger.used) == 1
    assert ledger.still_open == []


@pytest.mark.usefixtures("persistent")
@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1)], ids=repr)
def test_thread_that_raises_has_closed_its_connection(ledger, uncaught, error):
    def fail():
        ledger.query()
        raise error

    run(Thread(target=fail))

    assert ledger.still_open == []
    assert uncaught == [error]


@pytest.mark.usefixtures("persistent")
def test_thread_subclass_with_its_own_run_closes_its_connection(ledger):
    class Querying(Thread):
        def run(self):
            ledger.query()

    run(Querying(daemon=True))

    assert len(ledger.used) == 1
    assert ledger.still_open == []


@pytest.mark.usefixtures("persistent")
def test_thread_whose_instance_was_given_a_run_keeps_it(ledger):
    thread = Thread()
    thread.run = ledger.query

    run(thread)

    assert thread.run == ledger.query
    assert ledger.still_open == []


@pytest.mark.usefixtures("persistent")
def test_thread_leaves_the_connection_of_the_caller_alone(ledger):
    used = ledger.query()
    session = used.connection

    with transaction.atomic():
        run(Thread(target=ledger.query))

    assert used.connection is session
    assert len({id(each) for each in ledger.used}) == 2


def test_thread_start_does_not_touch_a_connection_of_the_caller_that_is_stale(ledger):
    used = ledger.query()
    used.close_at = 0

    run(Thread(target=int))

    assert used.connection is not None


def test_thread_run_called_directly_is_a_plain_call(ledger):
    Thread(target=ledger.query).run()

    assert ledger.still_open == [connections["default"]]


def test_thread_sees_the_context_of_the_caller_of_start():
    seen = []
    thread = Thread(target=lambda: seen.append(request_id.get()))

    token = request_id.set("abc")
    run(thread)
    request_id.reset(token)

    assert seen == ["abc"]


def test_thread_leaves_the_context_of_the_caller_alone():
    run(Thread(target=request_id.set, args=["changed"]))

    assert request_id.get() == "none"


@pytest.mark.skipif(sys.version_info < (3, 14), reason="an argument of Python 3.14")
def test_thread_with_a_context_of_its_own_runs_in_that():
    context = copy_context()
    context.run(request_id.set, "chosen")
    seen = []

    run(Thread(target=lambda: seen.append(request_id.get()), context=context))

    assert seen == ["chosen"]


def test_thread_started_twice_is_refused_and_runs_once():
    ended, calls = Event(), []
    thread = Thread(target=lambda: calls.append(ended.wait(20)))

    thread.start()
    with pytest.raises(RuntimeError, match="only be started once"):
        thread.start()
    ended.set()
    thread.join()
    with pytest.raises(RuntimeError, match="only be started once"):
        thread.start()

    assert calls == [True]
    assert "run" not in vars(thread)


def test_thread_without_its_constructor_is_refused():
    class Careless(Thread):
        def __init__(self):
            pass

    thread = Careless()

    with pytest.raises(RuntimeError, match="__init__"):
        thread.start()
    assert "run" not in vars(thread)


def test_thread_that_ended_is_freed_without_the_collector():
    gc.disable()
    try:
        thread = Thread(target=int)
        run(thread)
        reference = weakref.ref(thread)
        del thread

        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("persistent")
def test_thread_closes_a_connection_left_in_a_transaction(ledger):
    def leave_open():
        transaction.atomic().__enter__()
        ledger.query()

    run(Thread(target=leave_open))

    assert ledger.still_open == []


@pytest.mark.usefixtures("persistent")
def test_thread_does_not_close_a_connection_lent_to_it(ledger):
    lent = ledger.query()
    lent.inc_thread_sharing()

    def borrow():
        connections["default"] = lent
        ledger.query()

    run(Thread(target=borrow))
    lent.dec_thread_sharing()

    assert lent.is_usable()


def test_thread_whose_cleanup_fails_raises_its_own_error(ledger, uncaught, caplog):
    error = ValueError("the function's own")

    def fail():
        break_close(ledger.query())
        raise error

    run(Thread(target=fail))

    assert uncaught == [error]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.usefixtures("max_age")
def test_pool_that_is_shut_down_has_closed_the_connections_of_its_threads(ledger):
    together = Barrier(3)

    def query():
        together.wait(20)
        ledger.query()

    with ThreadPoolExecutor(3) as pool:
        for _ in range(6):
            pool.submit(query)

    assert len({id(used) for used in ledger.used}) == 3
    assert ledger.still_open == []


@pytest.mark.usefixtures("persistent")
def test_pool_thread_keeps_a_healthy_persistent_connection_between_calls(ledger):
    with ThreadPoolExecutor(1) as pool:
        sessions = [pool.submit(lambda: ledger.query().connection).result()]
        sessions += [pool.submit(lambda: ledger.query().connection).result()]

    assert sessions[0] is sessions[1]


def test_pool_thread_drops_its_connection_after_the_call_without_max_age(ledger):
    with ThreadPoolExecutor(1) as pool:
        used = pool.submit(ledger.query).result()

        assert used.connection is None


@pytest.mark.usefixtures("persistent")
def test_pool_thread_drops_a_connection_that_got_stale_while_idle(ledger):
    with ThreadPoolExecutor(1) as pool:
        used = pool.submit(ledger.query).result()
        used.close_at = 0

        assert pool.submit(lambda: used.connection).result() is None


@pytest.mark.usefixtures("persistent")
def test_pool_call_never_runs_in_a_transaction_that_another_left_open(ledger):
    def leave_open():
        transaction.atomic().__enter__()
        return ledger.query()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(leave_open).result()
        used = pool.submit(ledger.query).result()

        assert not used.in_atomic_block
        assert used.get_autocommit()
    assert ledger.still_open == []


@pytest.mark.usefixtures("persistent")
def test_pool_empties_the_query_log_before_and_after_each_call(ledger, settings):
    settings.DEBUG = True

    def queries_seen():
        seen = len(connection.queries)
        return seen, ledger.query()

    with ThreadPoolExecutor(1, initializer=ledger.query) as pool:
        first, used = pool.submit(queries_seen).result()
        log_after = len(used.queries_log)
        second, used = pool.submit(queries_seen).result()

    assert (first, log_after, second) == (0, 0, 0)


@pytest.mark.usefixtures("persistent")
def test_pool_leaves_connection_and_query_log_of_the_caller_alone(ledger, settings):
    settings.DEBUG = True
    used = ledger.query()
    used.close_at = 0
    logged = len(used.queries_log)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: ledger.query(), range(4)))

    assert used.connection is not None
    assert len(used.queries_log) == logged


def test_pool_call_sees_the_context_of_the_caller_of_submit():
    with ThreadPoolExecutor(1) as pool:
        token = request_id.set("first")
        first = pool.submit(request_id.get)
        request_id.set("second")
        mapped = pool.map(lambda _: request_id.get(), range(2))
        request_id.reset(token)
        outside = pool.submit(request_id.get)

        assert first.result() == "first"
        assert list(mapped) == ["second", "second"]
        assert outside.result() == "none"


def test_pool_call_takes_every_keyword_argument():
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(dict, self=1, fn=2, context=3, args=4)

        assert future.result() == {"self": 1, "fn": 2, "context": 3, "args": 4}


def test_pool_call_whose_cleanup_fails_gives_its_result_and_its_error(ledger, caplog):
    def fail():
        raise ValueError("the function's own")

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(lambda: break_close(ledger.query())).result()
        error = pool.submit(fail).exception()

    assert result == "broken"
    assert str(error) == "the function's own"
    assert caplog.records


@pytest.mark.usefixtures("persistent")
def test_initializer_runs_in_the_thread_and_its_connection_is_closed(ledger):
    with ThreadPoolExecutor(1, initializer=ledger.query) as pool:
        used = pool.submit(ledger.query).result()

    assert ledger.used == [used, used]
    assert ledger.still_open == []


@pytest.mark.usefixtures("persistent")
def test_initializer_that_fails_breaks_the_pool_and_leaves_no_connection(ledger):
    def fail():
        ledger.query()
        raise ValueError("no")

    with ThreadPoolExecutor(1, initializer=fail) as pool:
        with pytest.raises(BrokenThreadPool):
            pool.submit(int).result()
        with pytest.raises(BrokenThreadPool):
            pool.submit(int)

    assert len(ledger.used) == 1
    assert ledger.still_open == []


@pytest.mark.usefixtures("persistent")
def test_shutdown_that_cancels_waits_for_the_running_call_alone(ledger):
    begun, released = Event(), Event()

    def query_slowly():
        begun.set()
        released.wait(20)
        return ledger.query()

    pool = ThreadPoolExecutor(1)
    running, pending = pool.submit(query_slowly), pool.submit(ledger.query)
    begun.wait(20)
    pool.shutdown(wait=False, cancel_futures=True)
    released.set()
    pool.shutdown()

    assert pending.cancelled()
    assert ledger.used == [running.result()]
    assert ledger.still_open == []


@pytest.mark.usefixtures("persistent")
def test_pool_that_is_forgotten_ends_its_threads_and_their_connections(ledger):
    pool = ThreadPoolExecutor(1)
    thread = pool.submit(lambda: ledger.query() and threading.current_thread()).result()
    reference = weakref.ref(pool)
    del pool
    gc.collect()
    thread.join(20)

    assert reference() is None
    assert not thread.is_alive()
    assert ledger.still_open == []


def test_pool_is_the_standard_one_where_it_is_asked():
    with ThreadPoolExecutor(1, "jobs") as pool:
        name = pool.submit(lambda: threading.current_thread().name).result()

        assert isinstance(pool, futures.ThreadPoolExecutor)
        assert name == "jobs_0"


def test_this_python_still_starts_pool_threads_where_we_close_connections():
    """The one private place that we lean on: said plainly if a Python changes it."""
    standard = futures.ThreadPoolExecutor._adjust_thread_count
    python = f"Python {sys.version.split()[0]}"

    assert "_worker" in standard.__code__.co_names, (
        f"{python}: ThreadPoolExecutor._adjust_thread_count no longer starts _worker; "
        "async_queue.threads must find another place to close a thread's connections"
    )
    assert standard.__closure__ is None, f"{python}: _adjust_thread_count is a closure"
    assert standard.__defaults__ is None, f"{python}: _adjust_thread_count has defaults"


AT_EXIT = """
import threading
from django.conf import settings
settings.configure(DATABASES={"default": {
    "ENGINE": "django.db.backends.sqlite3", "NAME": %r, "CONN_MAX_AGE": None}})
from django.db import connection
from django.db.backends.sqlite3.base import DatabaseWrapper
from async_queue.threads import Thread, ThreadPoolExecutor

close = DatabaseWrapper._close
def announce(self):
    print("closed in", threading.current_thread().name, flush=True)
    close(self)
DatabaseWrapper._close = announce

pool = ThreadPoolExecutor(1, "pool")
pool.submit(lambda: connection.ensure_connection()).result()
started, ended = threading.Event(), threading.Event()
def wait():
    connection.ensure_connection()
    started.set()
    threading.main_thread().join()
Thread(target=wait, name="one-shot").start()
started.wait(20)
"""


def test_interpreter_that_exits_has_closed_the_connections_of_its_threads(tmp_path):
    code = AT_EXIT % str(tmp_path / "exit.db")

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    closed = set(done.stdout.splitlines())
    assert closed == {"closed in pool_0", "closed in one-shot"}
    assert done.stderr == ""


@pytest.mark.skipif(
    connection.vendor != "sqlite", reason="they use no database; once is enough"
)
@pytest.mark.parametrize(
    ("module", "at_least"),
    [("test.test_threading", 55), ("test.test_concurrent_futures", 40)],
)
def test_pythons_own_tests_pass_with_ours_in_place(module, at_least):
    if not is_shipped(module):
        pytest.skip(f"{sys.executable} ships no {module}")

    done = subprocess.run(
        [sys.executable, "-m", stdlib_threads.__name__, module],
        cwd=ROOT,
        # These tests compare what threads leave behind: no one else may be there.
        env={k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")},
        capture_output=True,
        text=True,
        timeout=85,
        check=False,
    )

    report = json.loads((done.stdout.splitlines() or ["{}"])[-1])
    assert report.get("failed") == [], done.stderr
    assert report["ran"] >= at_least


def is_shipped(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Debian's python3 has no `test` package at all
        return False


def break_close(used):
    """Make closing fail once, as a session does that the server ended."""
    close = used._close

    def fail_once():
        used._close = close
        close()
        raise OSError("the session is gone")

    used._close = fail_once
    return "broken"
