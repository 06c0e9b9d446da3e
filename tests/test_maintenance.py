from datetime import timedelta

import pytest
from django.db import OperationalError, connection, transaction

from async_queue import maintenance, schedule_many
from async_queue.models import Attempt, Job, Status, Worker
from tests.factories import JobFactory, WorkerFactory, now
from tests.stepping import elsewhere, exceptions_of, registered

pytestmark = pytest.mark.django_db(transaction=True)


def statuses():
    return list(Job.objects.order_by("id").values_list("status", flat=True))


def rescue():
    with registered("default") as number:
        return rescue_as(number)


def rescue_as(number):
    for other in Worker.objects.filter(dead_at=None).exclude(pk=number):
        maintenance.bury("default", other.pk)
    return maintenance.rescue("default")


def test_promote_makes_ready_what_is_due():
    due = JobFactory(waiting=True, run_after=now() - timedelta(seconds=1))
    later = JobFactory(waiting=True)

    assert maintenance.promote("default") == 1

    assert Job.objects.get(pk=due.pk).status == Status.READY
    assert Job.objects.get(pk=later.pk).status == Status.WAITING


def test_promote_changes_nothing_else():
    for state in ("running", "successful", "failed", "cancelled"):
        JobFactory(**{state: True}, run_after=now() - timedelta(seconds=1))
    before = statuses()

    assert maintenance.promote("default") == 0

    assert statuses() == before


def test_promote_takes_as_many_batches_as_it_needs():
    schedule_many([("tests.jobs.leave",)] * 1201)
    Job.objects.update(status=Status.WAITING)

    assert maintenance.promote("default") == 1201

    assert set(statuses()) == {Status.READY}


@pytest.mark.parametrize("act", [maintenance.promote, maintenance.rescue])
def test_error_in_a_batch_leaves_no_transaction_to_the_garbage_collector(act):
    """It would end that of a job, in whose thread it happens to run."""
    JobFactory(waiting=True, run_after=now() - timedelta(seconds=1))
    JobFactory(running=True, worker=WorkerFactory(dead=True))

    def refuse_updates(execute, sql, params, many, context):
        if sql.startswith("UPDATE"):
            raise OperationalError("as intended")
        return execute(sql, params, many, context)

    with (
        connection.execute_wrapper(refuse_updates),
        pytest.raises(OperationalError) as caught,
    ):
        act("default")

    assert not connection.in_atomic_block, f"while {caught.value} is remembered"


@pytest.mark.parametrize(
    ("states", "act"),
    [
        ({"waiting": True, "run_after": "due"}, lambda: maintenance.promote("default")),
        ({"orphaned": True}, rescue),
    ],
    ids=["promote", "rescue"],
)
def test_rows_that_somebody_holds_are_passed_by(states, act):
    if not connection.features.has_select_for_update_skip_locked:
        pytest.skip("rows cannot be locked one by one here")
    if "run_after" in states:
        states = {**states, "run_after": now() - timedelta(seconds=1)}
    held, free = JobFactory(**states), JobFactory(**states)

    with transaction.atomic():
        Job.objects.select_for_update().get(pk=held.pk)
        assert elsewhere(act).result(20) == 1

    assert Job.objects.get(pk=held.pk).status != Status.READY
    assert Job.objects.get(pk=free.pk).status == Status.READY
    assert act() == 1


def test_rescue_makes_the_jobs_of_the_dead_ready_and_charges_nothing():
    lost = JobFactory(orphaned=True, attempt=3, failures=1)
    dead = lost.worker_id

    assert rescue() == 1

    row = Job.objects.get()
    assert (row.status, row.worker_id) == (Status.READY, None)
    assert (row.attempt, row.failures) == (3, 1)
    attempt = Attempt.objects.get()
    assert (attempt.job_id, attempt.number, attempt.worker_id) == (row.pk, 3, dead)
    assert exceptions_of(row) == ["WorkerLost"]
    assert Worker.objects.get(pk=dead).dead_at is not None


def test_rescue_takes_the_jobs_of_a_worker_whose_row_is_gone():
    lost = JobFactory(orphaned=True)
    Worker.objects.filter(pk=lost.worker_id).delete()

    assert rescue() == 1

    assert statuses() == ["READY"]


def test_rescue_takes_the_jobs_of_one_that_somebody_else_has_found_dead():
    JobFactory(running=True, worker=WorkerFactory(dead=True))

    assert rescue() == 1


def test_rescue_leaves_alone_who_lives():
    with registered("default") as number:
        JobFactory(running=True, worker=Worker.objects.get(pk=number))

        assert elsewhere(rescue).result(20) == 0

        assert statuses() == ["RUNNING"]
        assert not Attempt.objects.exists()


def test_rescue_leaves_alone_its_own_jobs():
    with registered("default") as number:
        JobFactory(running=True, worker=Worker.objects.get(pk=number))

        assert rescue_as(number) == 0

        assert statuses() == ["RUNNING"]


def test_two_who_rescue_at_once_rescue_each_job_once():
    rows = JobFactory.create_batch(20, orphaned=True)

    both = [elsewhere(rescue), elsewhere(rescue)]

    assert sum(each.result(20) for each in both) == len(rows)
    assert Attempt.objects.count() == len(rows)
    assert set(statuses()) == {"READY"}
