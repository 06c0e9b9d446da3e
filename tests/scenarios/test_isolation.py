"""Projects on REPEATABLE READ and SERIALIZABLE, deadlocks: nothing lost or doubled."""

from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest
from django.db import connection, connections, transaction
from django.db.models import Count

from async_queue import cancel, hooks, schedule, schedule_many
from async_queue.db import private
from async_queue.models import Attempt, Job, Status
from tests import misbehaving
from tests.factories import now
from tests.jobs import leave
from tests.models import Effect
from tests.stepping import (
    database_settings,
    elsewhere,
    exceptions_of,
    execute_next,
    flush,
)

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(
        not connection.features.has_select_for_update,
        reason="one writer at a time: there is nothing to isolate",
    ),
]


def _postgresql() -> Iterator[Any]:
    from psycopg import IsolationLevel

    for level in (IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE):
        default = f"-c default_transaction_isolation={level.name.lower()}"
        default = default.replace("_read", r"\ read")
        yield pytest.param({"isolation_level": level}, id=f"project, {level.name}")
        yield pytest.param({"options": default}, id=f"server, {level.name}")


def _mysql() -> Iterator[Any]:
    for level in ("repeatable read", "serializable"):
        yield pytest.param({"isolation_level": level}, id=level)
        snapshots = "SET SESSION innodb_snapshot_isolation = ON"
        yield pytest.param(
            {"isolation_level": level, "init_command": snapshots},
            id=f"{level}, snapshots",
        )


# Otherwise PostgreSQL waits a second before it looks for a deadlock.
IMPATIENT = {"options": "-c deadlock_timeout=10ms"}
LEVELS = {"postgresql": _postgresql, "mysql": _mysql}
ISOLATION = {
    "postgresql": "SHOW transaction_isolation",
    "mysql": "SELECT LOWER(REPLACE(@@tx_isolation, '-', ' '))",
}


@pytest.fixture(params=list(LEVELS.get(connection.vendor, lambda: iter([None]))()))
def strict_project(request: pytest.FixtureRequest) -> Iterator[None]:
    with database_settings(request.param):
        yield


def isolation() -> str:
    with connections["default"].cursor() as cursor:
        cursor.execute(ISOLATION[connection.vendor])
        return str(cursor.fetchone()[0])


def isolation_of_a_transaction() -> str:
    with transaction.atomic():
        return isolation()


@pytest.mark.usefixtures("strict_project")
def test_connections_of_the_queue_are_read_committed() -> None:
    of_the_project = isolation_of_a_transaction()
    with private("default"):
        of_the_queue = {isolation(), isolation_of_a_transaction()}

    assert of_the_project in ("repeatable read", "serializable")
    assert of_the_queue == {"read committed"}


@pytest.mark.usefixtures("strict_project")
def test_many_jobs_at_the_same_rows_all_succeed_uncharged() -> None:
    rows = [Effect.objects.create(label="0").pk for _ in range(3)]
    schedule_many(
        (misbehaving.append_to_row, [rows[number % 3]]) for number in range(60)
    )

    flush_to_the_end(4)

    _assert_all_succeeded_once(60)


@pytest.mark.usefixtures("strict_project")
def test_cancel_before_the_fence_undoes_the_effects() -> None:
    job = schedule(leave)
    counts = []

    with hooks.at(
        "before_fence", lambda: counts.append(elsewhere(cancel, job).result(20))
    ):
        outcome = execute_next()

    job.refresh_from_db()
    assert counts == [1]
    assert outcome.action == "lose"
    assert (job.status, job.failures, job.attempt) == (Status.CANCELLED, 0, 1)
    assert not Effect.objects.exists()


@pytest.mark.usefixtures("strict_project")
def test_cancel_behind_the_fence_waits_and_finds_a_success() -> None:
    job = schedule(leave)
    cancelling: list[Future[int]] = []

    def begin_to_cancel() -> None:
        cancelling.append(elsewhere(cancel, job))
        assert not wait(cancelling, 0.3).done, "it did not wait for the fence"

    with hooks.at("after_fence", begin_to_cancel):
        outcome = execute_next()

    assert [future.result(20) for future in cancelling] == [0]
    job.refresh_from_db()
    assert (outcome.action, job.status) == ("succeed", Status.SUCCESSFUL)
    assert (job.failures, exceptions_of(job)) == (0, [])
    assert Effect.objects.count() == 1


def test_jobs_that_deadlock_all_succeed_uncharged() -> None:
    first, second = (Effect.objects.create(label="row").pk for _ in range(2))
    orders = ([first, second], [second, first])
    schedule_many(
        (misbehaving.touch_then_leave, orders[number % 2]) for number in range(100)
    )

    with database_settings(IMPATIENT if connection.vendor == "postgresql" else {}):
        flush_to_the_end(8)

    _assert_all_succeeded_once(100)


def test_job_that_meets_nothing_but_deadlocks_is_put_off_uncharged() -> None:
    misbehaving.called.clear()
    job = schedule(misbehaving.meet_deadlock)

    outcome = execute_next()

    job.refresh_from_db()
    assert misbehaving.called == ["run"] * 4
    assert outcome.action == "snooze"
    assert (job.status, job.failures) == (Status.WAITING, 0)
    assert not Effect.objects.exists()


def test_job_that_lost_its_claim_is_not_run_again_after_a_deadlock() -> None:
    misbehaving.called.clear()
    job = schedule(misbehaving.meet_deadlock_when_cancelled)

    outcome = execute_next()

    job.refresh_from_db()
    assert misbehaving.called == ["run"]
    assert outcome.action == "lose"
    assert job.status == Status.CANCELLED


def flush_to_the_end(threads: int) -> None:
    """Make passes until none is left; there may be some that were put off."""
    while (waiting := Job.objects.live()).exists():
        assert not waiting.filter(attempt__gt=5).exists()
        waiting.update(run_after=now())
        flush(threads)


def _assert_all_succeeded_once(jobs: int) -> None:
    found = Job.objects.values_list("status", "failures").annotate(Count("pk"))
    assert list(found) == [(Status.SUCCESSFUL, 0, jobs)]
    assert Effect.objects.filter(label="done").count() == jobs
    assert set(Attempt.objects.values_list("exception", flat=True)) <= {
        "django.db.utils.OperationalError"
    }
