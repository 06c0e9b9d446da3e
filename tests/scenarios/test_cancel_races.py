"""A job that is cancelled or taken over while it runs: the fence decides, once."""

from collections.abc import Callable
from threading import Event
from typing import Any

import pytest
from django.db import connection
from django.db.models import F

from async_queue import cancel, deschedule, executor, hooks, schedule
from async_queue.db import vendor
from async_queue.models import Job, Status
from tests import misbehaving
from tests.factories import WorkerFactory
from tests.jobs import leave, leave_then_fail
from tests.models import Effect
from tests.stepping import (
    claim_next,
    elsewhere,
    exceptions_of,
    execute_next,
    flush,
    make_due,
)

pytestmark = pytest.mark.django_db(transaction=True)

while_it_runs = pytest.mark.skipif(
    vendor(connection).runs_one_job_at_a_time,
    reason="nobody else can write while a job's transaction is open",
)


def cancel_it(job: Job) -> int:
    return cancel(job, "no longer wanted")


def deschedule_it(job: Job) -> int:
    return deschedule(job.function)


def take_over(job: Job) -> int:
    """Do what a rescue by another worker and its claim come to."""
    row = Job.objects.filter(pk=job.pk, status=Status.RUNNING)
    return row.update(attempt=F("attempt") + 1, worker=WorkerFactory())


def release_it(job: Job) -> int:
    return Job.objects.filter(pk=job.pk).transition("release")


@while_it_runs
@pytest.mark.parametrize("function", [leave, misbehaving.leave_in_savepoints])
@pytest.mark.parametrize("act", [cancel_it, deschedule_it])
def test_cancel_before_the_fence_undoes_the_effects(act: Any, function: Any) -> None:
    job = schedule(function)
    counts = []

    with hooks.at("before_fence", lambda: counts.append(elsewhere(act, job).result())):
        outcome = execute_next()

    job.refresh_from_db()
    assert counts == [1]
    assert outcome.action == "lose"
    assert (job.status, job.failures) == (Status.CANCELLED, 0)
    assert not Effect.objects.exists()
    assert flush().outcomes == {}


@pytest.mark.parametrize("act", [cancel_it, deschedule_it])
def test_cancel_before_the_function_undoes_the_effects(act: Any) -> None:
    job = schedule(leave)
    running = claim_next()

    count = act(job)
    outcome = executor.execute(running)

    job.refresh_from_db()
    assert count == 1
    assert outcome.action == "lose"
    assert job.status == Status.CANCELLED
    assert not Effect.objects.exists()


@pytest.mark.parametrize("act", [cancel_it, deschedule_it])
def test_cancel_behind_the_fence_waits_and_finds_a_success(act: Any) -> None:
    job = schedule(leave)
    cancelling = []

    def begin_to_cancel() -> None:
        is_over = Event()
        future = elsewhere(act, job)
        future.add_done_callback(lambda future: is_over.set())
        cancelling.append(future)
        assert not is_over.wait(0.3), "it did not wait for the fence"

    with hooks.at("after_fence", begin_to_cancel):
        outcome = execute_next()

    assert cancelling[0].result(20) == 0
    job.refresh_from_db()
    assert outcome.action == "succeed"
    assert job.status == Status.SUCCESSFUL
    assert exceptions_of(job) == []
    assert Effect.objects.count() == 1


@while_it_runs
@pytest.mark.parametrize("function", [leave, misbehaving.cancel_itself])
def test_job_taken_over_before_its_fence_leaves_nothing(function: Any) -> None:
    job = schedule(function)

    with hooks.at("before_fence", lambda: _interfere(take_over, job)):
        outcome = execute_next()

    _assert_still_the_new_owners(job, outcome)


@pytest.mark.parametrize(
    "function",
    [
        leave,
        leave_then_fail,
        misbehaving.leave_in_savepoints,
        misbehaving.swallow_integrity_error,
        misbehaving.cancel_own_row,
        misbehaving.release_own_row,
        misbehaving.leave_then_exit_generator,
    ],
)
def test_job_taken_over_before_its_function_leaves_nothing(function: Any) -> None:
    job = schedule(function)
    running = claim_next()

    take_over(job)
    outcome = executor.execute(running)

    _assert_still_the_new_owners(job, outcome)


def _interfere(act: Callable[[Job], int], job: Job) -> None:
    # Only once: a job may be run again, and then nothing happens to it.
    if not Job.objects.filter(pk=job.pk, attempt=2).exists():
        assert elsewhere(act, job).result(20) == 1


def _assert_still_the_new_owners(job: Job, outcome: Any) -> None:
    job.refresh_from_db()
    assert outcome.action == "lose"
    assert (job.status, job.attempt, job.failures) == (Status.RUNNING, 2, 0)
    assert exceptions_of(job) == []
    assert not Effect.objects.exists()


@while_it_runs
def test_job_given_back_before_its_fence_is_run_by_the_next() -> None:
    job = schedule(leave)

    with hooks.at("before_fence", lambda: elsewhere(release_it, job).result()):
        outcome = execute_next()

    assert outcome.action == "lose"
    assert not Effect.objects.exists()
    assert flush().outcomes == {"succeed": 1}
    assert Effect.objects.count() == 1


@pytest.mark.parametrize(
    "function", [misbehaving.cancel_itself, misbehaving.deschedule_itself]
)
def test_job_that_cancels_itself_by_a_verb_is_left_out(function: Any) -> None:
    job = schedule(function)

    outcome = execute_next()

    job.refresh_from_db()
    assert outcome.action == "succeed"
    assert (job.status, job.return_value) == (Status.SUCCESSFUL, 0)
    assert Effect.objects.count() == 1


@pytest.mark.parametrize(
    "function",
    [
        misbehaving.cancel_own_row,
        misbehaving.release_own_row,
        misbehaving.delete_own_row,
    ],
)
def test_job_that_takes_its_own_row_away_fails(function: Any) -> None:
    job = schedule(function, meta={"max_attempts": 2})

    first = execute_next()
    make_due(job)
    flush()

    job.refresh_from_db()
    assert first.action == "retry"
    assert job.status == Status.FAILED
    assert exceptions_of(job) == ["ClaimLost", "ClaimLost"]
    assert not Effect.objects.exists()


def test_job_that_changes_its_row_otherwise_succeeds() -> None:
    job = schedule(misbehaving.move_own_row)

    execute_next()

    job.refresh_from_db()
    assert (job.status, job.queue) == (Status.SUCCESSFUL, "elsewhere")
    assert Effect.objects.count() == 1
