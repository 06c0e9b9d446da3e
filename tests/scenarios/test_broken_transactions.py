"""A job may do anything to its transaction: it never succeeds without its effects."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError, connection, transaction
from django.http import HttpRequest, HttpResponse
from django.test import Client
from django.urls import path

from async_queue import schedule
from async_queue.db import Vendor, vendor
from async_queue.models import Job, Status
from async_queue.outcomes import Outcome
from tests import misbehaving
from tests.jobs import begun, go_on, leave
from tests.misbehaving import leave_then_execute
from tests.models import Effect
from tests.stepping import elsewhere, exceptions_of, execute_next, flush, make_due

pytestmark = pytest.mark.django_db(transaction=True)

undoes_by_itself = pytest.mark.skipif(
    not vendor(connection).rolls_back(connection, OperationalError(1213, "")),
    reason="a deadlock does not undo a transaction in silence here",
)
has_scripts = pytest.mark.skipif(
    not hasattr(getattr(connection.Database, "Cursor", None), "executescript"),
    reason="only SQLite's driver has scripts, and conflicts that roll back",
)
knows_its_transaction = pytest.mark.skipif(
    type(vendor(connection)).is_inside_transaction is Vendor.is_inside_transaction,
    reason="the driver does not tell of its transaction",
)
commits_at_ddl = pytest.mark.skipif(
    connection.features.can_rollback_ddl, reason="tables are part of the transaction"
)
aborts_at_errors = connection.vendor == "postgresql"


def labels() -> list[str]:
    return list(Effect.objects.order_by("id").values_list("label", flat=True))


def assert_failed_without_effects(job: Job, outcome: Outcome, exception: str) -> None:
    job.refresh_from_db()
    assert outcome.action == "retry"
    assert (job.status, job.failures) == (Status.WAITING, 1)
    assert exceptions_of(job) == [exception]
    assert labels() == []
    assert not connection.in_atomic_block


@pytest.mark.parametrize(
    "function",
    [
        misbehaving.swallow_integrity_error,
        misbehaving.swallow_inner_rollback,
        misbehaving.set_rollback,
        misbehaving.close_connection,
        misbehaving.close_all_connections,
        misbehaving.close_connection_then_leave,
        misbehaving.leave_block_open,
        misbehaving.leave_around_a_forgotten_generator,
    ],
)
def test_job_whose_transaction_cannot_commit_fails(function: Any) -> None:
    job = schedule(function)

    outcome = execute_next()

    assert_failed_without_effects(job, outcome, "TransactionBroken")


def test_job_that_leaves_blocks_open_and_fails_harms_no_other() -> None:
    job = schedule(misbehaving.leave_blocks_open_then_fail)

    outcome = execute_next()

    assert_failed_without_effects(job, outcome, "ValueError")
    schedule(leave)
    assert execute_next().action == "succeed"
    assert labels() == ["effect"]


@pytest.mark.parametrize(
    "function",
    [
        misbehaving.set_autocommit,
        misbehaving.commit_through_django,
        misbehaving.roll_back_through_django,
    ],
)
def test_job_that_ends_its_transaction_through_django_fails(function: Any) -> None:
    job = schedule(function)

    outcome = execute_next()

    assert_failed_without_effects(job, outcome, "TransactionManagementError")


def test_swallowed_error_of_a_cursor_loses_no_effect_of_a_success() -> None:
    job = schedule(misbehaving.swallow_raw_integrity_error)

    outcome = execute_next()

    if aborts_at_errors:
        assert_failed_without_effects(job, outcome, "TransactionBroken")
    else:
        assert outcome.action == "succeed"
        assert labels() == ["first"]


@undoes_by_itself
def test_swallowed_deadlock_of_a_cursor_is_run_again_whole() -> None:
    begun.clear()
    go_on.clear()
    mine, theirs = (Effect.objects.create(label="row") for _ in range(2))
    schedule(misbehaving.swallow_deadlock, [mine.pk, theirs.pk])

    rival = elsewhere(_touch_in_the_opposite_order, mine.pk, theirs.pk)
    outcome = execute_next()

    rival.result(20)
    assert outcome.action == "succeed"
    assert sorted(labels()) == ["after", "before", "row", "touched", *["weight"] * 50]
    assert Job.objects.get().failures == 0


@undoes_by_itself
def test_lock_timeout_that_a_job_handles_is_its_own_affair() -> None:
    row = Effect.objects.create(label="row").pk
    schedule(misbehaving.swallow_lock_timeout, [row])

    with transaction.atomic():
        misbehaving.touch(row)
        outcome = elsewhere(execute_next).result(20)

    assert outcome.action == "succeed"
    assert labels() == ["row", "before", "after"]


def _touch_in_the_opposite_order(first: int, second: int) -> None:
    with transaction.atomic():
        # InnoDB spares whoever has written more.
        Effect.objects.bulk_create(Effect(label="weight") for _ in range(50))
        misbehaving.touch(second)
        go_on.set()
        assert begun.wait(20)
        misbehaving.touch(first)


ENDINGS = [
    "COMMIT",
    "commit work",
    "END",
    "end transaction",
    "ROLLBACK",
    "rollback work",
    "Rollback And Chain",
    "ABORT",
    "BEGIN",
    "begin immediate",
    "START TRANSACTION",
    "start  transaction read only",
    "PREPARE TRANSACTION 'x'",
    "  \n\tCOMMIT;",
    "-- a comment\nCOMMIT",
    "/* a comment */ COMMIT",
    "/* one */ -- two\n /* three */commit",
    "SELECT 1; COMMIT",
    "SELECT 1;commit",
    "SELECT ';'; -- a comment\n rollback",
    "SELECT 'x' ;/* ; */ END; SELECT 2",
    "COMMIT; SELECT 1",
    ";COMMIT",
    "SELECT 1 /* ; */; ; COMMIT",
    "SELECT CASE WHEN 1 = 1 THEN 1 END; COMMIT",
    'SELECT 1 AS "begin"; COMMIT',
    "SELECT 1 AS case; COMMIT",
    "CREATE TEMPORARY TABLE made (id integer); COMMIT",
]


@pytest.mark.parametrize("sql", ENDINGS)
def test_statement_that_ends_the_transaction_is_never_sent(sql: str) -> None:
    misbehaving.sent.clear()
    job = schedule(leave_then_execute, [sql])

    outcome = execute_next()

    assert_failed_without_effects(job, outcome, "StatementRefused")
    assert misbehaving.sent == []


@pytest.mark.parametrize("sql", ["COMMIT", "SELECT 1; ROLLBACK"])
def test_swallowed_refusal_has_changed_nothing(sql: str) -> None:
    schedule(misbehaving.leave_then_swallow_refusal, [sql])

    outcome = execute_next()

    assert outcome.action == "succeed"
    assert labels() == ["before"]


HARMLESS = [
    "SELECT ';commit'",
    "SELECT 'it''s; rollback'",
    "SELECT 1 -- ; commit",
    "SELECT 1 /* ; commit */",
    "SELECT 'commit'",
    "SELECT 1 AS committed",
    "SELECT 1;",
    "SAVEPOINT mine",
    "CREATE TEMPORARY TABLE made (id integer)",
]


@pytest.mark.parametrize("sql", HARMLESS)
def test_harmless_statement_is_sent(sql: str) -> None:
    misbehaving.sent.clear()
    schedule(leave_then_execute, [sql])

    outcome = execute_next()

    assert outcome.action == "succeed"
    assert misbehaving.sent == [sql]
    assert labels() == ["before", "after"]
    connection.close()  # and with it the temporary table


def test_savepoints_of_nested_blocks_work() -> None:
    schedule(misbehaving.leave_in_savepoints)

    outcome = execute_next()

    assert outcome.action == "succeed"
    assert labels() == ["kept"]


IMPLICIT_COMMITS = [
    "CREATE TABLE made (id integer)",
    "create index made on tests_effect (label)",
    "DROP TABLE IF EXISTS made",
    "ALTER TABLE tests_effect COMMENT 'x'",
    "TRUNCATE TABLE made",
    "RENAME TABLE made TO made2",
    "LOCK TABLES tests_effect WRITE",
    "UNLOCK TABLES",
    "ANALYZE TABLE tests_effect",
    "SET autocommit = 1",
    "SET @@session.autocommit=1",
    "SET foreign_key_checks=1, autocommit=1",
    "SET `autocommit`=1",
    "SET @x=1, autocommit=1",
    "EXECUTE IMMEDIATE 'COMMIT'",
    "SET STATEMENT max_statement_time=1 FOR COMMIT",
    "SET PASSWORD = PASSWORD('')",
    "SET DEFAULT ROLE NONE",
    "BACKUP STAGE START",
    "XA START 'x'",
    "/*!50000 COMMIT */",
    "/*M!100100 COMMIT */",
    "SELECT 1; # a comment\n COMMIT",
]


@commits_at_ddl
@pytest.mark.parametrize("sql", IMPLICIT_COMMITS)
def test_statement_that_commits_by_itself_is_never_sent(sql: str) -> None:
    misbehaving.sent.clear()
    job = schedule(leave_then_execute, [sql])

    outcome = execute_next()

    assert_failed_without_effects(job, outcome, "StatementRefused")
    assert misbehaving.sent == []


@commits_at_ddl
@pytest.mark.parametrize(
    "sql",
    [
        "CREATE OR REPLACE TEMPORARY TABLE made (id integer)",
        "ANALYZE SELECT 1",
        "SET @x = 1",
    ],
)
def test_statement_that_only_resembles_one_that_commits_is_sent(sql: str) -> None:
    schedule(misbehaving.leave_then_swallow_refusal, [sql])

    outcome = execute_next()

    assert outcome.action == "succeed"
    assert labels() == ["before", "after"]
    connection.close()  # and with it the temporary table


@knows_its_transaction
@pytest.mark.parametrize(
    "function",
    [misbehaving.commit_through_driver, misbehaving.roll_back_through_driver],
)
def test_job_that_ends_its_transaction_through_the_driver_fails(function: Any) -> None:
    job = schedule(function)

    outcome = execute_next()

    job.refresh_from_db()
    assert outcome.action == "retry"
    assert job.status == Status.WAITING
    assert exceptions_of(job) == ["TransactionBroken"]


@has_scripts
@pytest.mark.parametrize(
    "function", [misbehaving.run_script, misbehaving.leave_then_run_script]
)
def test_script_that_commits_makes_no_success(function: Any) -> None:
    job = schedule(function)

    execute_next()

    assert exceptions_of(job) == ["TransactionBroken"]


@has_scripts
def test_conflict_that_rolls_everything_back_makes_no_success() -> None:
    job = schedule(misbehaving.swallow_rolling_back_conflict)

    execute_next()

    assert exceptions_of(job) == ["TransactionBroken"]
    assert not Effect.objects.exists()


def test_hooks_that_raise_change_no_success_and_stop_no_other(caplog: Any) -> None:
    misbehaving.called.clear()
    job = schedule(misbehaving.register_hooks)

    made = flush(1)

    job.refresh_from_db()
    assert made.outcomes == {"succeed": 1}
    assert (job.status, job.attempt, job.failures) == (Status.SUCCESSFUL, 1, 0)
    assert misbehaving.called == ["first", "last"]
    assert caplog.text.count("an on_commit hook of job") == 3
    assert exceptions_of(job) == []
    assert flush().outcomes == {}
    assert labels() == ["effect"]


def test_hook_of_a_job_may_schedule() -> None:
    schedule(misbehaving.register_hook_that_schedules)

    assert execute_next().action == "succeed"
    assert execute_next().action == "succeed"
    assert labels() == ["effect", "from a hook"]


@pytest.fixture(params=["a job", "a pass"])
def inner(request: Any) -> int | None:
    """The job that another one tries to run, or None for a pass over all of them."""
    waiting = schedule(leave, run_after=timedelta(hours=1))
    return waiting.pk if request.param == "a job" else None


@pytest.mark.parametrize(
    "function", [misbehaving.nest, misbehaving.nest_in_thread], ids=lambda f: f.__name__
)
def test_job_that_runs_others_inside_itself_fails(
    function: Any, inner: int | None
) -> None:
    job = schedule(function, [inner])

    outcome = elsewhere(execute_next).result(20)

    assert outcome.action == "retry"
    assert exceptions_of(job) == ["InsideTransaction"]


def test_hook_that_runs_other_jobs_is_refused(caplog: Any, inner: int | None) -> None:
    schedule(misbehaving.nest_in_hook, [inner])

    outcome = elsewhere(execute_next).result(20)

    assert outcome.action == "succeed"
    assert "InsideTransaction" in caplog.text
    assert labels() == ["effect"]
    assert Job.objects.filter(status=Status.WAITING).count() == 1


def test_job_that_fails_runs_none_of_its_hooks() -> None:
    misbehaving.called.clear()
    schedule(misbehaving.register_hooks_then_fail)

    execute_next()

    assert misbehaving.called == []


def test_job_that_fails_succeeds_later_with_one_effect() -> None:
    misbehaving.called.clear()
    job = schedule(misbehaving.fail_the_first_time)

    first = execute_next()
    make_due(job)
    second = flush()

    assert first.action == "retry"
    assert second.outcomes == {"succeed": 1}
    assert labels() == ["effect"]


def test_rolled_back_transaction_leaves_no_job() -> None:
    with transaction.atomic():
        schedule(leave)
        transaction.set_rollback(True)

    assert not Job.objects.exists()


def test_rolled_back_savepoint_leaves_no_job() -> None:
    with transaction.atomic():
        kept = schedule(leave, ["kept"])
        with transaction.atomic():
            schedule(leave, ["undone"])
            transaction.set_rollback(True)

    assert list(Job.objects.values_list("pk", flat=True)) == [kept.pk]


def test_job_that_fails_leaves_no_job_that_it_scheduled() -> None:
    job = schedule(misbehaving.schedule_then_fail)

    execute_next()

    assert Job.objects.get() == job


def schedule_then_fail(request: HttpRequest) -> HttpResponse:
    schedule(leave)
    raise ValueError("of the view")


def schedule_then_answer(request: HttpRequest) -> HttpResponse:
    return HttpResponse(schedule(leave).pk)


urlpatterns = [
    path("fail", schedule_then_fail),
    path("answer", schedule_then_answer),
]


@pytest.fixture
def atomic_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)


@pytest.mark.urls(__name__)
@pytest.mark.usefixtures("atomic_requests")
def test_view_that_fails_leaves_no_job(client: Client) -> None:
    with pytest.raises(ValueError, match="of the view"):
        client.get("/fail")

    assert not Job.objects.exists()


@pytest.mark.urls(__name__)
@pytest.mark.usefixtures("atomic_requests")
def test_view_that_answers_leaves_its_job(client: Client) -> None:
    response = client.get("/answer")

    assert Job.objects.get().pk == int(response.content)
