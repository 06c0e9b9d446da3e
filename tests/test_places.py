import os
import socket
from importlib.metadata import PackageNotFoundError

import pytest
from django.db import OperationalError, connection, connections

from async_queue import claims, executor, maintenance
from async_queue.db import private, vendor
from async_queue.exceptions import AsyncQueueError, JobCancelled
from async_queue.models import Job, Status, Worker
from async_queue.places import DeclaredDead, Place, seated
from tests.factories import JobFactory, WorkerFactory, now
from tests.fleet import uncommitted
from tests.stepping import claim_next, elsewhere, is_proved_dead, registered

pytestmark = pytest.mark.django_db(transaction=True)
has_sessions = pytest.mark.skipif(
    vendor(connection).runs_one_job_at_a_time, reason="a file has no sessions to end"
)
needs_row_locks = pytest.mark.usefixtures("row_locks")
NUMBER = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT connection_id()"}
END = {"postgresql": "SELECT pg_terminate_backend(%s)", "mysql": "KILL %s"}


def end_session(number):
    with connection.cursor() as cursor:
        cursor.execute(END[connection.vendor], [number])


def end_own_session():
    with connections["default"].cursor() as cursor:
        cursor.execute(NUMBER[connection.vendor])
        (number,) = cursor.fetchone()
    elsewhere(end_session, number).result(20)


def test_worker_has_a_row_while_it_lives():
    with registered("default", queues=["mail", "bulk"], threads=3) as number:
        row = Worker.objects.get()

    assert row.pk == number
    assert (row.host, row.pid) == (socket.gethostname(), os.getpid())
    assert (row.queues, row.threads, row.dead_at) == ("mail,bulk", 3, None)
    assert not Worker.objects.exists()


def test_worker_gives_back_at_the_end_what_it_holds():
    with registered("default") as number:
        mine = JobFactory(running=True, worker=Worker.objects.get(pk=number))
        done = JobFactory(successful=True)
        other = JobFactory(running=True)

    rows = Job.objects.in_bulk()
    assert rows[mine.pk].status == Status.READY
    assert rows[mine.pk].failures == 0
    assert rows[done.pk].status == Status.SUCCESSFUL
    assert rows[other.pk].status == Status.RUNNING


@pytest.fixture
def row_locks():
    if not connection.features.has_select_for_update_skip_locked:
        pytest.skip("rows cannot be locked one by one here")


@needs_row_locks
def test_worker_that_leaves_waits_for_nobodys_lock():
    place = Place("default", threads=1)
    place.take(connection)
    worker = Worker.objects.get(pk=place.number)
    held, free = (JobFactory(running=True, worker=worker) for _ in range(2))

    with uncommitted(lambda: lock(held)):
        assert not place.leave(connection)
        assert Worker.objects.exists()

    rows = Job.objects.in_bulk()
    assert rows[free.pk].status == Status.READY
    assert rows[held.pk].status == Status.RUNNING
    assert place.leave(connection)
    assert not Worker.objects.exists()


@needs_row_locks
def test_claims_are_given_back_but_for_those_that_somebody_has_locked():
    worker = WorkerFactory()
    held, free = (JobFactory(running=True, worker=worker) for _ in range(2))
    both = {held.pk: 1, free.pk: 1}

    with uncommitted(lambda: lock(held)):
        assert claims.release("default", worker.pk, both) == 1
        assert Job.objects.get(pk=free.pk).status == Status.READY

    assert claims.release("default", worker.pk, both) == 1


@needs_row_locks
def test_run_that_was_ended_is_recorded_when_its_row_can_be_had():
    JobFactory()
    job = claim_next()
    job.control.cause = JobCancelled("as intended")

    with uncommitted(lambda: lock(Job.objects.get())):
        assert not executor.end(job)
        assert Job.objects.get().status == Status.RUNNING

    assert executor.end(job)
    assert Job.objects.get().status == Status.CANCELLED


def lock(job):
    return list(Job.objects.select_for_update().filter(pk=job.pk))


def test_worker_signs_off_when_its_block_raises():
    with pytest.raises(ZeroDivisionError):
        raise_as_worker(
            lambda number: JobFactory(
                running=True, worker=Worker.objects.get(pk=number)
            )
        )

    assert Job.objects.get().status == Status.READY
    assert not Worker.objects.exists()


def test_nobody_proves_the_death_of_a_worker_that_lives():
    with registered("default") as number:
        assert not elsewhere(is_proved_dead, number).result(20)

    assert elsewhere(is_proved_dead, number).result(20)


def test_two_workers_of_one_process_tell_each_other_alive():
    with registered("default") as one:
        JobFactory(running=True, worker=Worker.objects.get(pk=one))

        assert elsewhere(rescue_as_another).result(20) == 0

        assert Job.objects.get().status == Status.RUNNING


def rescue_as_another():
    with registered("default") as number:
        for other in Worker.objects.exclude(pk=number):
            maintenance.bury("default", other.pk)
        return maintenance.rescue("default")


@has_sessions
def test_worker_whose_session_was_ended_is_proved_dead():
    with private("default"), registered("default") as number:
        end_own_session()

        assert elsewhere(is_proved_dead, number).result(20)


@has_sessions
def test_worker_whose_session_was_ended_still_says_goodbye():
    with private("default"), registered("default") as number:
        elsewhere(JobFactory).result(20)
        Job.objects.update(status=Status.RUNNING, worker_id=number)
        end_own_session()

    assert Job.objects.get().status == Status.READY
    assert not Worker.objects.exists()


def test_worker_that_cannot_sign_off_hides_no_error_and_frees_its_life(caplog):
    try:
        with pytest.raises(ZeroDivisionError):
            raise_as_worker(lambda number: rename("async_queue_worker", "elsewhere"))
    finally:
        rename("elsewhere", "async_queue_worker")

    assert "could not sign off" in caplog.text
    assert elsewhere(is_proved_dead, Worker.objects.get().pk).result(20)


def raise_as_worker(first):
    with registered("default") as number:
        first(number)
        raise ZeroDivisionError


def rename(table, name):
    with connection.schema_editor() as editor:
        editor.execute(f"ALTER TABLE {table} RENAME TO {name}")


def test_numbers_of_workers_are_not_used_again():
    with registered("default") as first:
        pass

    with registered("default") as second:
        assert second > first
    assert WorkerFactory().pk > second


@pytest.fixture
def own():
    """The connection of this thread as a keeper has it."""
    with private("default") as made:
        yield made


def test_place_that_has_lost_its_session_is_taken_again(own):
    place = Place("default", threads=1)
    place.take(own)
    number = place.number
    own.close()

    place.take(own)

    assert place.number == number
    assert place.has_lock
    assert not elsewhere(is_proved_dead, number).result(20)
    assert place.leave(own)


def test_registration_that_does_not_commit_leaves_no_lock(own, monkeypatch):
    def fail():
        raise OperationalError("database is locked")

    place = Place("default", threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(own, "commit", fail)
        with pytest.raises(OperationalError):
            place.take(own)

    assert (place.number, place.has_lock) == (0, False)
    assert not Worker.objects.exists()
    place.take(own)
    assert place.has_lock
    assert place.leave(own)


def test_worker_that_was_found_dead_goes_on_under_a_new_number(own):
    place = Place("default", threads=1)
    place.take(own)
    first = place.number
    Worker.objects.update(dead_at=now())

    with pytest.raises(DeclaredDead, match=f"worker {first} was found dead"):
        place.beat(own, None)
    place.lose()
    assert place.number == 0
    place.take(own)

    assert place.number > first
    assert place.beat(own, None).is_registered
    assert elsewhere(is_proved_dead, first).result(20)
    assert place.leave(own)


@has_sessions
def test_lock_that_somebody_tries_is_taken_with_the_next_beat(own, second_connection):
    place = Place("default", threads=1)
    place.take(own)
    own.close()
    other = vendor(second_connection)

    with other.proof_of_death(second_connection, place.number):
        place.take(own)
        assert not place.has_lock

    place.beat(own, None)
    assert place.has_lock
    assert place.leave(own)


def test_lock_of_a_new_worker_that_somebody_holds_is_an_error(own, second_connection):
    """Two databases share their names, say."""
    number = WorkerFactory().pk + 1
    other = vendor(second_connection)
    assert other.take_life(second_connection, number)

    with pytest.raises(AsyncQueueError, match="somebody holds the lock of worker"):
        Place("default", threads=1).take(own)

    other.drop_life(second_connection, number)
    assert Worker.objects.count() == 1


@has_sessions
def test_place_is_not_left_while_somebody_has_locked_a_job(own, second_connection):
    place = Place("default", threads=1)
    place.take(own)
    job = JobFactory(running=True, worker=Worker.objects.get())

    second_connection.set_autocommit(False)
    with second_connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM async_queue_job FOR UPDATE")
        assert not place.leave(own)
        second_connection.rollback()

    assert place.has_lock
    assert place.leave(own)
    assert Job.objects.get(pk=job.pk).status == Status.READY
    assert not Worker.objects.exists()


def test_worker_of_a_checkout_that_is_not_installed_has_no_version(own, monkeypatch):
    monkeypatch.setattr("async_queue.places.version", raise_not_found)

    with seated(Place("default", threads=1)):
        assert Worker.objects.get().version == "unknown"


def raise_not_found(name):
    raise PackageNotFoundError(name)
