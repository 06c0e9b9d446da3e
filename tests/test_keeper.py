import os
import socket

import pytest
from django.db import connection, connections, transaction

from async_queue import maintenance
from async_queue.db import private, vendor
from async_queue.exceptions import InsideTransaction
from async_queue.keeper import registered
from async_queue.models import Job, Status, Worker
from tests.factories import JobFactory, WorkerFactory
from tests.stepping import database_settings, elsewhere

pytestmark = pytest.mark.django_db(transaction=True)
has_sessions = pytest.mark.skipif(
    vendor(connection).runs_one_job_at_a_time, reason="a file has no sessions to end"
)
NUMBER = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT connection_id()"}
# How a project lets its idle sessions end, what tells, and what it is for a worker.
IDLE = {
    "postgresql": (
        {"options": "-c idle_session_timeout=500"},
        "SHOW idle_session_timeout",
        "0",
    ),
    "mysql": (
        {"init_command": "SET SESSION wait_timeout = 60"},
        "SELECT @@wait_timeout",
        365 * 24 * 3600,
    ),
}
END = {"postgresql": "SELECT pg_terminate_backend(%s)", "mysql": "KILL %s"}


def end_session(number):
    with connection.cursor() as cursor:
        cursor.execute(END[connection.vendor], [number])


def end_own_session():
    with connections["default"].cursor() as cursor:
        cursor.execute(NUMBER[connection.vendor])
        (number,) = cursor.fetchone()
    elsewhere(end_session, number).result(20)


def is_proved_dead(number):
    mine = connections["default"]
    with vendor(mine).proof_of_death(mine, number) as is_dead:
        return is_dead


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
        return maintenance.rescue("default", number)


@has_sessions
def test_worker_whose_session_was_ended_is_proved_dead():
    with private("default"), registered("default") as number:
        end_own_session()

        assert elsewhere(is_proved_dead, number).result(20)


@has_sessions
def test_worker_whose_session_was_ended_still_says_goodbye():
    with private("default"), registered("default") as number:
        elsewhere(
            JobFactory,
        ).result(20)
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


@has_sessions
def test_session_that_holds_a_workers_lock_may_idle():
    options, question, expected = IDLE[connection.vendor]

    with database_settings(options), private("default") as own, own.cursor() as cursor:
        cursor.execute(question)
        assert cursor.fetchone() == (expected,)


def test_private_connection_inside_a_transaction_is_refused():
    shared = connections["default"]

    with transaction.atomic(), pytest.raises(InsideTransaction), private("default"):
        pass

    assert connections["default"] is shared
