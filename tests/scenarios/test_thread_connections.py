"""Whatever threads do, the server is left with no session of theirs."""

import gc
from threading import Barrier, current_thread

import pytest
from django.db import connection
from django.db.backends.signals import connection_created

from async_queue.threads import Thread, ThreadPoolExecutor

THREADS = 8
CALLS = 200
SESSIONS_BESIDE_THIS_ONE = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "mysql": "SELECT count(*) FROM information_schema.processlist"
    " WHERE db = DATABASE() AND id <> connection_id()",
}
pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(params=[0, 60, None, "pool"], ids=lambda age: f"max_age_{age}")
def persistence(request, monkeypatch):
    """CONN_MAX_AGE, or psycopg's pool; the wrappers of all threads share it."""
    if request.param != "pool":
        monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", request.param)
        yield request.param
        return
    if not hasattr(connection, "close_pool"):
        pytest.skip(f"Django has no connection pool for {connection.display_name}")
    options = connection.settings_dict["OPTIONS"]
    connection.close()
    with monkeypatch.context() as patch:
        pool = {"min_size": 0, "max_size": THREADS + 2}
        patch.setitem(connection.settings_dict, "OPTIONS", {**options, "pool": pool})
        yield request.param
        connection.close()
        connection.close_pool()


@pytest.fixture
def opened():
    """The wrappers that opened a session, once for each session."""
    wrappers = []

    def note(connection, **_):
        wrappers.append(connection)

    connection_created.connect(note)
    yield wrappers
    connection_created.disconnect(note)


@pytest.fixture
def sessions(second_connection, persistence, opened, wait_until):
    """Count the sessions of threads: in the server, where there is one.

    A connection that was not given back outlives psycopg's pool, so closing the pool
    leaves exactly those.
    """

    def count():
        connection.close()
        if persistence == "pool":
            connection.close_pool()
        if not second_connection.features.test_db_allows_multiple_connections:
            return len([used for used in opened if used.connection is not None])
        with second_connection.cursor() as cursor:
            cursor.execute(SESSIONS_BESIDE_THIS_ONE[second_connection.vendor])
            return cursor.fetchone()[0]

    wait_until(lambda: count() == 0)
    opened.clear()
    return count


def query(_=None):
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def test_many_threads_leave_no_session(sessions, opened, wait_until):
    threads = [Thread(target=query) for _ in range(THREADS * 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(opened) == len(threads)
    wait_until(lambda: sessions() == 0)


def test_threads_that_raise_leave_no_session(sessions, monkeypatch, wait_until):
    uncaught = []
    monkeypatch.setattr("threading.excepthook", lambda args: uncaught.append(args[0]))

    def query_and_leave():
        query()
        raise SystemExit

    threads = [Thread(target=query_and_leave) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert uncaught == [SystemExit] * THREADS
    wait_until(lambda: sessions() == 0)


def test_pool_leaves_no_session(sessions, wait_until):
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(query, range(CALLS)))

    wait_until(lambda: sessions() == 0)


def test_pool_opens_no_more_sessions_than_it_has_threads(sessions, persistence):
    if persistence in (0, "pool"):
        pytest.skip("without CONN_MAX_AGE a call gives its session back when it ends")
    together = Barrier(THREADS)

    def query_together(_):
        query()
        together.wait(20)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(query_together, range(THREADS * 10)))
        during = sessions()

    assert during == THREADS


def test_pools_that_are_forgotten_leave_no_session(sessions, wait_until):
    threads = []
    for _ in range(THREADS):
        pool = ThreadPoolExecutor(1, initializer=query)
        threads.append(pool.submit(current_thread).result())
    del pool
    gc.collect()
    for thread in threads:
        thread.join(20)

    wait_until(lambda: sessions() == 0)


def test_initializers_that_fail_leave_no_session(sessions, wait_until):
    def query_and_fail():
        query()
        raise ValueError("no")

    for _ in range(THREADS):
        with ThreadPoolExecutor(1, initializer=query_and_fail) as pool:
            assert pool.submit(query).exception() is not None

    wait_until(lambda: sessions() == 0)
