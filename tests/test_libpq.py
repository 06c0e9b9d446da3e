"""A job's transaction on PostgreSQL goes past the cursors, and nobody can tell."""

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.utils import (
    DataError,
    IntegrityError,
    OperationalError,
)

from async_queue import claims, executor, schedule, schedule_many
from async_queue.db import libpq, private
from async_queue.models import Job, Status
from tests import jobs, misbehaving
from tests.factories import WorkerFactory
from tests.models import Effect
from tests.stepping import (
    claim_next,
    database_settings,
    exceptions_of,
    execute_next,
    flush,
)

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(connection.vendor != "postgresql", reason="libpq's database"),
]

TRICKY = ["it's", 'say "so"', "back\\slash", "{curly, braces}", "naïve ☃", None, 1]


@pytest.fixture
def concluded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The UPDATEs that were sent together with COMMIT."""
    seen: list[str] = []
    conclude = libpq.conclude

    def note(connection: Any, sql: str, *params: Any) -> bool:
        seen.append(sql)
        return conclude(connection, sql, *params)

    monkeypatch.setattr(libpq, "conclude", note)
    return seen


@pytest.mark.parametrize("value", TRICKY, ids=repr)
def test_any_result_is_stored_as_it_is(value: Any, concluded: list[str]) -> None:
    writes = schedule(jobs.echo, [value], {"leaves": True})
    writes_nothing = schedule(jobs.echo, [value])

    flush()

    for job in (writes, writes_nothing):
        job.refresh_from_db()
        assert (job.status, job.return_value) == (Status.SUCCESSFUL, value)
    assert len(concluded) == 1


def test_results_of_jobs_that_are_recorded_together_stay_apart() -> None:
    rows = schedule_many((jobs.echo, [value]) for value in TRICKY)

    flush()

    for row, value in zip(rows, TRICKY, strict=True):
        row.refresh_from_db()
        assert row.return_value == value


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"prepare_threshold": 1}, id="psycopg prepares"),
        pytest.param({"server_side_binding": True}, id="server binds"),
    ],
)
def test_jobs_commit_whatever_the_project_has_set(options: dict[str, Any]) -> None:
    with database_settings(options):
        run_twenty()


def discard(driver: Any) -> None:
    driver.execute("DISCARD ALL")
    driver.commit()


def test_sessions_of_a_pool_may_be_reset(concluded: list[str]) -> None:
    pool = {"max_size": 8, "reset": discard}
    with database_settings({"pool": pool}, CONN_MAX_AGE=0):
        try:
            run_twenty()
        finally:
            connection.copy().close_pool()

    assert concluded == []


def run_twenty() -> None:
    schedule_many((jobs.leave,) for _ in range(20))

    assert flush().outcomes == {"succeed": 20}
    assert Effect.objects.count() == 20


def test_statements_of_psycopg_and_of_the_queue_do_not_meet(
    concluded: list[str],
) -> None:
    with database_settings({"prepare_threshold": 1}):
        schedule(jobs.leave)
        flush()

    assert concluded == []


def test_claim_is_never_prepared_for_it_would_keep_its_plan() -> None:
    worker = WorkerFactory().pk
    schedule_many((jobs.leave,) for _ in range(3))

    with database_settings({"prepare_threshold": 0}), private("default") as own:
        found = [claims.claim("default", worker, 1) for _ in range(3)]
        with own.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_prepared_statements")
            assert cursor.fetchone() == (0,)

    assert all(found)


@pytest.mark.parametrize("sql", ["DEALLOCATE ALL", "DISCARD PLANS"])
def test_job_that_drops_what_is_prepared_runs_once_more(
    sql: str, concluded: list[str]
) -> None:
    drop = (misbehaving.leave_then_execute, [sql])
    schedule_many([(jobs.leave,), drop, drop, (jobs.leave,)])

    assert flush(threads=1).outcomes == {"succeed": 4}

    assert Effect.objects.count() == 6
    # Once is enough to know the session better.
    assert len(concluded) == (2 if sql == "DEALLOCATE ALL" else 4)


def prepared() -> list[str]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT name FROM pg_prepared_statements")
        return [name for (name,) in cursor.fetchall()]


def test_statement_is_prepared_anew_after_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The table that it was planned for may have been empty.
    schedule_many((jobs.leave,) for _ in range(3))

    execute_next()
    (first,) = prepared()
    execute_next()
    assert prepared() == [first]

    monkeypatch.setattr(libpq, "_FRESH", 0.0)
    execute_next()
    (other,) = prepared()
    assert other != first


def test_claim_that_is_lost_commits_nothing(concluded: list[str]) -> None:
    job = schedule(jobs.leave)
    running = claim_next()
    Job.objects.filter(pk=job.pk).update(attempt=7)

    outcome = executor.execute(running)

    assert outcome.action == "lose"
    assert len(concluded) == 1
    assert not Effect.objects.exists()
    assert connection.get_autocommit()


@pytest.fixture
def _deferred() -> Iterator[None]:
    """A constraint that is looked at when the transaction commits."""
    table = Effect._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(
            f"CREATE FUNCTION refuse() RETURNS trigger AS "
            f"'BEGIN PERFORM 1 / 0; RETURN NULL; END' LANGUAGE plpgsql; "
            f"CREATE CONSTRAINT TRIGGER late AFTER INSERT ON {table} "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
    yield
    with connection.cursor() as cursor:
        cursor.execute(f"DROP TRIGGER late ON {table}; DROP FUNCTION refuse()")


@pytest.mark.usefixtures("_deferred")
def test_error_of_the_commit_is_the_jobs_and_not_a_lost_claim(
    concluded: list[str],
) -> None:
    job = schedule(jobs.leave, meta={"max_attempts": 1})

    outcome = execute_next()

    assert len(concluded) == 1
    assert outcome.action == "fail"
    assert exceptions_of(job) == ["DataError"]
    assert not Effect.objects.exists()


def test_hooks_run_once_it_has_committed() -> None:
    misbehaving.called.clear()
    schedule(misbehaving.register_hooks)

    assert execute_next().action == "succeed"

    assert misbehaving.called


def test_job_in_a_testcase_leaves_its_transaction_open(concluded: list[str]) -> None:
    schedule(jobs.leave)
    running = claim_next()

    with transaction.atomic():
        transaction.get_connection().atomic_blocks[-1]._from_testcase = True
        assert executor.execute(running).action == "succeed"
        transaction.set_rollback(True)

    assert concluded == []
    assert not Effect.objects.exists()


def test_execute_by_hand_can_be_interrupted(concluded: list[str]) -> None:
    schedule(jobs.leave).execute()

    assert concluded == []
    assert Effect.objects.count() == 1


def leave_pipeline_open() -> None:
    driver: Any = connection.connection
    kept[:] = [driver.pipeline()]
    kept[0].__enter__()
    driver.cursor().execute("INSERT INTO tests_effect (label) VALUES ('piped')")


def test_pipeline_that_is_left_open_is_no_success_without_its_effect() -> None:
    job = schedule(leave_pipeline_open)

    flush(threads=1)

    job.refresh_from_db()
    assert (job.status == Status.SUCCESSFUL) == Effect.objects.exists()


def roll_back_then_leave() -> None:
    jobs.leave()
    connection.connection.rollback()  # type: ignore[attr-defined]
    jobs.leave()


def roll_back_then_insert_many() -> None:
    jobs.leave()
    driver: Any = connection.connection
    driver.rollback()
    with driver.cursor() as cursor:
        sql = "INSERT INTO tests_effect (label) VALUES (%s)"
        cursor.executemany(sql, [("a",), ("b",)])
    assert 1 / 0


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (roll_back_then_leave, "TransactionBroken"),
        (roll_back_then_insert_many, "ZeroDivisionError"),
    ],
)
def test_nothing_commits_alone_after_a_rollback_through_the_driver(
    function: Any, error: str
) -> None:
    job = schedule(function)

    execute_next()

    assert exceptions_of(job) == [error]
    assert not Effect.objects.exists()


def lock_and_read() -> int:
    jobs.leave()
    return len(list(Effect.objects.select_for_update().iterator()))


def insert_in_pipeline() -> None:
    driver: Any = connection.connection
    with driver.pipeline():
        driver.cursor().execute("INSERT INTO tests_effect (label) VALUES ('piped')")


@pytest.mark.parametrize("function", [lock_and_read, insert_in_pipeline])
def test_all_that_a_session_can_do_works_in_a_job(function: Any) -> None:
    schedule(function)

    assert execute_next().action == "succeed"

    assert Effect.objects.count() == 1


kept: list[Any] = []


def leave_block_of_the_driver_open() -> None:
    driver: Any = connection.connection
    kept[:] = [driver.transaction()]
    kept[0].__enter__()
    jobs.leave()


def test_block_of_the_driver_that_is_left_open_is_no_success() -> None:
    job = schedule(leave_block_of_the_driver_open)

    assert execute_next().action != "succeed"

    job.refresh_from_db()
    assert job.status != Status.SUCCESSFUL
    assert not Effect.objects.exists()
    connection.close()


def test_long_reads_and_many_rows_at_once_come_through() -> None:
    with libpq.Block(transaction.get_connection()):
        Effect.objects.bulk_create(Effect(label=str(n)) for n in range(300))
        with connection.cursor() as cursor:
            sql = "INSERT INTO tests_effect (label) VALUES (%s)"
            cursor.executemany(sql, [("a",), ("b",)])
    with libpq.Block(transaction.get_connection()):
        read = list(Effect.objects.order_by("pk").iterator(chunk_size=10))

    assert len(read) == 302


def test_select_for_update_and_savepoints_come_first_as_well() -> None:
    with libpq.Block(transaction.get_connection()):
        with transaction.atomic():
            Effect.objects.create()
        assert Effect.objects.select_for_update().count() == 1

    assert Effect.objects.count() == 1


def test_block_ends_as_atomic_does_after_an_error() -> None:
    Effect.objects.create(pk=1)

    with pytest.raises(IntegrityError), libpq.Block(transaction.get_connection()):
        Effect.objects.create(pk=1)

    assert connection.get_autocommit()
    assert not connection.in_atomic_block


def test_block_commits_what_was_not_concluded() -> None:
    with libpq.Block(transaction.get_connection()):
        Effect.objects.create()

    assert Effect.objects.count() == 1
    assert connection.get_autocommit()


def test_errors_are_djangos_and_have_their_code() -> None:
    connection.ensure_connection()
    with pytest.raises(DataError) as caught:
        libpq.pairs(connection, "SELECT 1 / (%s::bigint[])[1], 1", [[0]])
    assert caught.value.__cause__.sqlstate == "22012"  # type: ignore[union-attr]

    connection.connection.close()  # type: ignore[attr-defined]
    with pytest.raises(OperationalError):
        libpq.pairs(connection, "SELECT (%s::bigint[])[1], 1", [[0]])
    connection.close()
