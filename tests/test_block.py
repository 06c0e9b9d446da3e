"""A transaction begins with the end of the last, and nobody else comes into it."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from queue import SimpleQueue
from typing import Any

import pytest
from django.db import connection, connections, transaction
from django.db.utils import Error, OperationalError

from async_queue import (
    claims,
    crew,
    current_job,
    executor,
    lone,
    processes,
    schedule_many,
)
from async_queue.db import block, end_ahead, is_begun_ahead, libpq, vendor
from async_queue.db.block import Block
from async_queue.decorators import job
from async_queue.models import Job, Status
from async_queue.signals import job_finished, job_started
from async_queue.worker import Worker
from tests import jobs, misbehaving
from tests.factories import WorkerFactory
from tests.models import Effect
from tests.stepping import database_settings, elsewhere, flush
from tests.test_crew import claimed

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(connection.vendor == "sqlite", reason="a server's sessions"),
]
on_postgresql = pytest.mark.skipif(
    connection.vendor != "postgresql", reason="libpq's database"
)

SET_SERIALIZABLE = "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Expect a job to follow each that writes; note which were there when one came."""
    taken_up: list[bool] = []
    take_up = Block._take_up

    def note(made: Block) -> bool:
        taken_up.append(take_up(made))
        return taken_up[-1]

    expect = crew._JobThread
    monkeypatch.setattr(expect, "_is_followed", lambda thread, has_begun: has_begun)
    monkeypatch.setattr(Block, "_take_up", note)
    return taken_up


def run(
    *calls: Any, workers: int = 1, between: Callable[[], object] = bool
) -> Counter[str]:
    """Run the jobs one after the other in a thread; count their outcomes.

    They are claimed by so many workers in turn. ``between`` is called after each.
    """
    rows = schedule_many(call if isinstance(call, tuple) else (call,) for call in calls)
    numbers = [WorkerFactory().pk for _ in range(workers)]
    claimed = [
        job
        for _, number in zip(rows, cycle(numbers), strict=False)
        for job in claims.claim("default", number, 1)
    ]
    assert [job.id for job in claimed] == [row.pk for row in rows]
    waiting: SimpleQueue[Any] = SimpleQueue()
    for each in (*claimed, None):
        waiting.put(each)
    outcomes: Counter[str] = Counter()

    def execute(job: Any) -> None:
        outcomes[executor.execute(job).action] += 1
        between()

    thread = crew._JobThread("default", 1, waiting, execute, False)
    thread.start()
    thread.join(20)
    return outcomes


def labels() -> list[str]:
    return list(Effect.objects.order_by("id").values_list("label", flat=True))


def leave(label: str) -> tuple[Any, list[str]]:
    return jobs.leave, [label]


def test_jobs_that_write_follow_in_transactions_that_are_there(
    ahead: list[bool],
) -> None:
    assert run(leave("a"), leave("b"), leave("c")) == {"succeed": 3}

    assert labels() == ["a", "b", "c"]
    assert ahead == [False, True, True]


def test_jobs_that_fail_take_nothing_with_them(ahead: list[bool]) -> None:
    fail = (jobs.leave_then_fail, ["fails"])

    assert run(leave("a"), fail, leave("b"), fail) == {"succeed": 2, "retry": 2}

    assert labels() == ["a", "b"]
    assert ahead.count(True) == 2


def tell() -> None:
    Effect.objects.create(label="told")


def tell_in_a_block() -> None:
    with transaction.atomic():
        tell()


@pytest.mark.parametrize("write", [tell, tell_in_a_block])
def test_what_is_written_between_two_jobs_is_in_no_transaction_of_theirs(
    ahead: list[bool], write: Callable[[], None]
) -> None:
    run(leave("a"), (jobs.leave_then_fail, ["fails"]), leave("b"), between=write)

    assert labels() == ["a", "told", "told", "b", "told"]
    assert True not in ahead


@pytest.mark.parametrize("signal", [job_started, job_finished])
def test_nothing_is_begun_where_receivers_may_have_kept_a_cursor(
    ahead: list[bool], signal: Any
) -> None:
    def receive(**kwargs: Any) -> None:
        cursors[-1].execute("INSERT INTO tests_effect (label) VALUES ('received')")

    cursors.append(connections["default"].cursor())
    signal.connect(receive)
    try:
        run(keep_a_cursor, jobs.leave_then_fail)
    finally:
        signal.disconnect(receive)
        cursors.clear()

    assert labels().count("received") == 2
    assert True not in ahead


cursors: list[Any] = []


def keep_a_cursor() -> None:
    cursors.append(connection.cursor())
    cursors[-1].execute("SELECT 1")


def write_when_committed() -> None:
    keep_a_cursor()
    write = cursors.pop().execute
    sql = "INSERT INTO tests_effect (label) VALUES ('hook')"
    transaction.on_commit(lambda: write(sql))


def test_nothing_is_begun_where_hooks_may_have_kept_a_cursor(
    ahead: list[bool],
) -> None:
    assert run(write_when_committed, jobs.leave_then_fail).total() == 2

    assert labels() == ["hook"]
    assert True not in ahead


def test_nothing_is_begun_where_each_success_is_logged(
    ahead: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="async_queue"):
        run(leave("a"), leave("b"))

    assert ahead == [False, False]


def test_a_job_that_comes_late_has_a_transaction_of_its_own(
    ahead: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "_KEPT", -1.0)

    assert run(leave("a"), leave("b")) == {"succeed": 2}

    assert labels() == ["a", "b"]
    assert ahead == [False, False]


marks: list[tuple[int, int]] = []


def note_marks() -> None:
    jobs.leave()
    job = current_job()
    assert job is not None
    session = vendor(connection).session_of(connections["default"])
    marks.append((session.worker, job.worker))


def test_a_session_is_marked_for_the_worker_whose_job_it_runs(
    ahead: list[bool],
) -> None:
    marks.clear()

    run(note_marks, note_marks, workers=2)

    assert len(marks) == 2
    assert all(marked == worker for marked, worker in marks)


@job(atomic=False, max_attempts=1)
def leave_and_fail_outside() -> None:
    jobs.leave("outside")
    raise ValueError("as intended")


def test_a_job_that_is_not_atomic_writes_outside_of_it(ahead: list[bool]) -> None:
    assert run(leave("a"), leave_and_fail_outside) == {"succeed": 1, "fail": 1}

    assert labels() == ["a", "outside"]


def leave_as_serializable() -> None:
    misbehaving.execute(SET_SERIALIZABLE)
    jobs.leave("serializable")


def leave_isolation() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SHOW transaction_isolation")
        jobs.leave(*cursor.fetchone())


@on_postgresql
def test_nothing_goes_on_but_the_session(ahead: list[bool]) -> None:
    run(leave("a"), leave_as_serializable, leave_isolation)

    assert labels() == ["a", "serializable", "read committed"]
    assert ahead == [False, True, True]


def test_a_job_that_sends_nothing_in_it_succeeds(ahead: list[bool]) -> None:
    assert run(leave("a"), (jobs.add, [1, 2]), leave("b")) == {"succeed": 3}

    assert labels() == ["a", "b"]
    assert Job.objects.get(function="tests.jobs.add").return_value == 3
    # Elsewhere each job has a transaction, which the fence needs.
    assert ahead == [False, True, connection.vendor != "postgresql"]


def write_through_driver() -> None:
    connection.connection.execute("INSERT INTO tests_effect (label) VALUES ('driver')")


@on_postgresql
def test_what_a_job_writes_past_django_in_it_commits(ahead: list[bool]) -> None:
    assert run(leave("a"), write_through_driver) == {"succeed": 2}

    assert labels() == ["a", "driver"]


@on_postgresql
def test_a_session_that_ends_between_two_jobs_costs_neither(
    ahead: list[bool],
) -> None:
    def end_others() -> None:
        ended.extend(sessions_in_transaction())
        for number in ended:
            end(number)

    ended: list[int] = []
    # They ask on connections of their own.
    run(leave("a"), leave("b"), between=lambda: elsewhere(end_others).result(10))
    flush()

    assert ended
    assert labels() == ["a", "b"]
    assert set(Job.objects.values_list("status", "failures")) == {
        (Status.SUCCESSFUL, 0)
    }


def sessions_in_transaction() -> list[int]:
    """Return the numbers of the sessions that wait in one, but for this one."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
            "AND state = 'idle in transaction' AND pid <> pg_backend_pid()"
        )
        return [number for (number,) in cursor.fetchall()]


def end(number: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [number])


@on_postgresql
def test_a_thread_that_has_nothing_to_do_holds_no_transaction(
    ahead: list[bool], wait_until: Any
) -> None:
    worker = Worker(threads=2)
    worker.start()
    try:
        schedule_many((jobs.leave,) for _ in range(20))
        wait_until(lambda: Effect.objects.count() == 20)
        wait_until(lambda: not sessions_in_transaction())
    finally:
        worker.stop()
        worker.join()

    assert True in ahead


@on_postgresql
def test_a_session_that_ends_before_it_is_brought_back_is_opened_anew(
    begun: Any,
) -> None:
    elsewhere(lambda: [*map(end, sessions_in_transaction())]).result(10)

    assert sorted(labels()) == ["done", "kept"]
    assert is_autocommit_on(begun)


@pytest.fixture
def begun(ahead: list[bool]) -> Any:
    """This thread's connection, as a job has left it that another is to follow."""
    mine = connections["default"]
    conclude_one(mine)
    assert is_begun_ahead(mine)
    yield mine
    end_ahead(mine)


def conclude_one(mine: Any, close_at: float | None = None) -> None:
    jobs.leave("other")
    mine.close_at = close_at
    with vendor(mine).block(mine):
        jobs.leave("kept")
        conclude(mine, "done")


def conclude(mine: Any, label: str) -> None:
    sql = "UPDATE tests_effect SET label = %s WHERE label <> 'kept' AND 1 = %s"
    assert vendor(mine).conclude(mine, sql, (label, 1), begins_next=True)


def test_whoever_comes_between_gets_the_session_without_the_transaction(
    begun: Any,
) -> None:
    assert begun.connection is None
    is_postgresql = connection.vendor == "postgresql"
    before = elsewhere(sessions_in_transaction).result(10) if is_postgresql else []

    assert sorted(labels()) == ["done", "kept"]

    assert not begun.in_atomic_block
    assert begun.get_autocommit()
    assert is_autocommit_on(begun)
    if is_postgresql:
        assert before == [begun.connection.info.backend_pid]
        assert not elsewhere(sessions_in_transaction).result(10)


def is_autocommit_on(mine: Any) -> bool:
    """Tell whether another session sees at once what this one writes."""
    jobs.leave("seen at once")
    return elsewhere(Effect.objects.filter(label="seen at once").count).result(10) == 1


@pytest.mark.skipif(connection.vendor != "mysql", reason="others commit before")
def test_a_commit_that_fails_is_rolled_back(
    ahead: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = connections["default"]

    def fail() -> None:
        raise OperationalError("as intended")

    monkeypatch.setattr(mine, "_commit", fail)
    with pytest.raises(OperationalError, match="as intended"):
        conclude_one(mine)

    assert not is_begun_ahead(mine)
    assert labels() == ["other"]
    assert is_autocommit_on(mine)


def test_closing_a_connection_between_two_jobs_does_no_harm(begun: Any) -> None:
    begun.close()
    begun.close_if_unusable_or_obsolete()

    assert sorted(labels()) == ["done", "kept"]


@on_postgresql
def test_what_fails_after_the_fence_leaves_what_was_committed(
    ahead: list[bool],
) -> None:
    mine = connections["default"]

    with pytest.raises(KeyboardInterrupt):
        conclude_and_raise(mine)

    assert not is_begun_ahead(mine)
    assert labels() == ["done"]
    assert libpq.is_idle(mine.connection)


def conclude_and_raise(mine: Any) -> None:
    mine.ensure_connection()
    mine.close_at = None
    with vendor(mine).block(mine):
        jobs.leave("other")
        conclude(mine, "done")
        raise KeyboardInterrupt


def test_a_connection_that_is_to_be_closed_begins_nothing_ahead(
    ahead: list[bool],
) -> None:
    mine = connections["default"]

    conclude_one(mine, close_at=time.monotonic())

    assert not is_begun_ahead(mine)


@on_postgresql
def test_levels_that_the_project_has_set_are_left_to_psycopg(
    ahead: list[bool],
) -> None:
    from psycopg import IsolationLevel

    with database_settings({"isolation_level": IsolationLevel.SERIALIZABLE}):
        run(leave("a"), leave_isolation)

    assert labels() == ["a", "serializable"]
    assert ahead == [False, False]


@on_postgresql
def test_a_commit_that_fails_begins_nothing(ahead: list[bool]) -> None:
    mine = connections["default"]
    misbehaving.execute(
        "ALTER TABLE tests_effect ADD CONSTRAINT once UNIQUE (label) "
        "DEFERRABLE INITIALLY DEFERRED"
    )
    try:
        with pytest.raises(Error, match="once"):
            conclude_twice_the_same(mine)
        assert not is_begun_ahead(mine)
        assert labels() == []
    finally:
        misbehaving.execute("ALTER TABLE tests_effect DROP CONSTRAINT once")


def conclude_twice_the_same(mine: Any) -> None:
    with vendor(mine).block(mine):
        jobs.leave("a")
        jobs.leave("b")
        conclude(mine, "the same")


def test_no_transaction_is_open_while_a_job_runs_alone(
    begun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def start(*args: Any) -> None:
        assert not is_begun_ahead(begun)
        raise Stop

    monkeypatch.setattr(processes, "start", start)

    with pytest.raises(Stop):
        lone.execute_alone(claimed(1))


@pytest.mark.parametrize(
    ("waiting", "has_begun", "expected"),
    [(8, True, False), (9, True, True), (9, False, False)],
)
def test_a_job_that_writes_is_expected_where_many_wait(
    waiting: int, has_begun: bool, expected: bool
) -> None:
    thread = idle_thread(waiting)

    assert thread._is_followed(has_begun) is expected


def test_none_is_expected_for_a_moment_after_one_without_a_transaction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thread = idle_thread(9)
    thread._is_followed(False)

    assert thread._is_followed(True) is False
    monkeypatch.setattr(crew, "_ALIKE", -1.0)
    assert thread._is_followed(True) is True


def idle_thread(waiting: int) -> Any:
    queue: SimpleQueue[Any] = SimpleQueue()
    for number in range(waiting):
        queue.put(claimed(number))
    return crew._JobThread("default", 1, queue, lambda job: None, False)
