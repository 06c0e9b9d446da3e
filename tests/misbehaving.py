"""Jobs that do to their transaction what no job should, and some that well may."""

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

from django.db import (
    Error,
    IntegrityError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.db.models import F

from async_queue import Retry, Snooze, cancel, current_job, deschedule, schedule
from async_queue.exceptions import InsideTransaction
from async_queue.models import Job
from async_queue.threads import Thread
from tests.jobs import begun, go_on, leave
from tests.models import Effect
from tests.stepping import elsewhere, one_pass

# What on_commit hooks did, and the statements that passed the queue's guard.
called: list[str] = []
sent: list[str] = []


def swallow_integrity_error() -> None:
    first = Effect.objects.create(label="first")
    with suppress(IntegrityError):
        Effect(pk=first.pk, label="second").save(force_insert=True)


def swallow_inner_rollback() -> None:
    with suppress(ValueError), transaction.atomic(savepoint=False):
        leave()
        raise ValueError


def set_rollback() -> None:
    leave()
    transaction.set_rollback(True)


def close_connection() -> None:
    leave()
    connection.close()


def close_all_connections() -> None:
    leave()
    connections.close_all()


def close_connection_then_leave() -> None:
    connection.close()
    with suppress(Error):
        leave()


# Kept, so that Python does not leave the block when it collects them.
_blocks: list[Any] = []


def leave_block_open() -> None:
    block = transaction.atomic()
    block.__enter__()
    _blocks.append(block)
    leave()


def leave_blocks_open_then_fail() -> None:
    leave_block_open()
    leave_block_open()
    raise ValueError("as intended")


def set_autocommit() -> None:
    leave()
    transaction.set_autocommit(True)


def commit_through_django() -> None:
    leave()
    transaction.commit()


def roll_back_through_django() -> None:
    leave()
    transaction.rollback()


def commit_through_driver() -> None:
    leave()
    connection.connection.commit()


def roll_back_through_driver() -> None:
    leave()
    connection.connection.rollback()


def swallow_raw_integrity_error() -> None:
    first = Effect.objects.create(label="first")
    sql = "INSERT INTO tests_effect (id, label) VALUES (%s, 'second')"
    with suppress(IntegrityError):
        execute(sql, [first.pk])


def swallow_rolling_back_conflict() -> None:
    first = Effect.objects.create(label="first")
    sql = "INSERT OR ROLLBACK INTO tests_effect (id, label) VALUES (%s, 'second')"
    with suppress(IntegrityError):
        execute(sql, [first.pk])
    leave("after")


def run_script() -> None:
    with connection.cursor() as cursor:
        cursor.executescript("INSERT INTO tests_effect (label) VALUES ('script')")


def leave_then_run_script() -> None:
    leave()
    run_script()


def execute(sql: str, params: Any = None) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)


def leave_then_execute(sql: str) -> None:
    """Leave a row, then send ``sql``, noting what comes through to the driver."""
    leave("before")
    with connection.execute_wrapper(_note):
        execute(sql)
    leave("after")


def leave_then_swallow_refusal(sql: str) -> None:
    with suppress(Exception):
        leave_then_execute(sql)


def _note(execute: Any, sql: str, *rest: Any) -> Any:
    sent.append(sql)
    return execute(sql, *rest)


def leave_in_savepoints() -> None:
    """Leave a row in a block that commits, none in one that does not."""
    with transaction.atomic():
        leave("kept")
    with suppress(ValueError), transaction.atomic():
        leave("undone")
        raise ValueError


def swallow_deadlock(mine: int, theirs: int) -> None:
    """Touch two rows, the second while somebody who has it waits for the first."""
    leave("before")
    touch(mine)
    begun.set()
    assert go_on.wait(20)
    with suppress(OperationalError):
        execute("UPDATE tests_effect SET label = 'touched' WHERE id = %s", [theirs])
    leave("after")


def swallow_lock_timeout(row: int) -> None:
    """Do without a row that somebody else has."""
    leave("before")
    with suppress(OperationalError):
        execute("SELECT id FROM tests_effect WHERE id = %s FOR UPDATE NOWAIT", [row])
    leave("after")


_DEADLOCK = {
    "postgresql": "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40P01'; END $$",
    "mysql": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213",
}


def meet_deadlock() -> None:
    """Be told what the loser of a deadlock is told."""
    leave()
    called.append("run")
    execute(_DEADLOCK[connection.vendor])


def meet_deadlock_when_cancelled() -> None:
    elsewhere(cancel, Job.objects.get(pk=_own_id())).result(20)
    meet_deadlock()


def touch(*rows: int) -> None:
    for row in rows:
        Effect.objects.filter(pk=row).update(label=F("label"))


def touch_then_leave(*rows: int) -> None:
    touch(*rows)
    leave("done")


def append_to_row(row: int) -> None:
    """Read a number and write its successor, as people do, and leave a row."""
    effect = Effect.objects.get(pk=row)
    effect.label = str(int(effect.label) + 1)
    effect.save()
    leave("done")


def count_with_expression(row: int) -> None:
    """Read the row, then let the database count, and leave a row."""
    Effect.objects.get(pk=row)
    Effect.objects.filter(pk=row).update(label="touched")
    leave("done")


def register_hooks() -> None:
    """Leave a row and five on_commit hooks; all but the first and last raise."""
    leave()
    transaction.on_commit(partial(called.append, "first"))
    transaction.on_commit(partial(_raise, ValueError("of a hook")))
    transaction.on_commit(partial(_raise, SystemExit(3)))
    transaction.on_commit(partial(_raise, ValueError("robust")), robust=True)
    transaction.on_commit(partial(called.append, "last"))


def register_hook_that_schedules() -> None:
    leave()
    transaction.on_commit(partial(schedule, leave, ["from a hook"]))


def _raise(error: BaseException) -> None:
    raise error


def cancel_itself() -> int:
    leave()
    return cancel(Job.objects.get(pk=_own_id()))


def deschedule_itself() -> int:
    leave()
    return deschedule(deschedule_itself)


def cancel_own_row() -> None:
    leave()
    Job.objects.filter(pk=_own_id()).transition("cancel")


def release_own_row() -> None:
    leave()
    Job.objects.filter(pk=_own_id()).transition("release")


def delete_own_row() -> None:
    leave()
    Job.objects.filter(pk=_own_id()).delete()


def move_own_row() -> None:
    leave()
    Job.objects.filter(pk=_own_id()).update(queue="elsewhere")


def _own_id() -> int:
    job = current_job()
    assert job is not None
    return job.id


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


def raise_unspeakable() -> None:
    leave()
    raise Unspeakable


def raise_with_huge_traceback() -> None:
    leave()
    _recurse(300, "x" * 1000)


def _recurse(depth: int, text: str) -> None:
    try:
        if depth:
            _recurse(depth - 1, text)
        raise ValueError(text + "\0\udcff")
    except ValueError as error:
        raise RuntimeError(text) from error


def leave_then_interrupt() -> None:
    leave()
    raise KeyboardInterrupt


def leave_around_a_forgotten_generator() -> None:
    """Close one that another thread has left open, as the garbage collector does."""

    def suspended() -> Iterator[None]:
        with transaction.atomic():
            yield

    generator = suspended()
    elsewhere(next, generator).result()
    leave("before")
    generator.close()
    leave("after")


def leave_then_exit_generator() -> None:
    leave()
    raise GeneratorExit


def leave_then_return_model() -> Effect:
    return Effect.objects.create(label="result")


def leave_then_return_too_much() -> str:
    leave()
    return "x" * 300_000


def execute_another(job: int) -> Any:
    return Job.objects.get(pk=job).execute()


def broken_backoff(failures: int) -> Any:
    raise ValueError(f"of the backoff after {failures}")


def backoff_of_no_duration(failures: int) -> Any:
    return failures


def register_hooks_then_fail() -> None:
    register_hooks()
    raise ValueError("as intended")


def fail_the_first_time() -> None:
    leave()
    called.append("run")
    if len(called) == 1:
        raise ValueError("as intended")


def schedule_then_fail() -> None:
    schedule(leave)
    raise ValueError("as intended")


def backoff_without_end(failures: int) -> timedelta:
    return timedelta.max


def end_session_the_first_time(failures: int) -> timedelta:
    """End the session in which the outcome is about to be recorded."""
    if not called:
        called.append("ended")
        end_own_session()
    return timedelta(minutes=1)


def end_own_session() -> None:
    """End this thread's session from another one, as an operator would."""
    connection.ensure_connection()
    driver = connection.connection
    if connection.vendor == "postgresql":
        sql = f"SELECT pg_terminate_backend({driver.info.backend_pid}, 5000)"
    else:
        sql = f"KILL {driver.thread_id()}"
    other = connection.copy()
    with other.cursor() as cursor:
        cursor.execute(sql)
    other.close()


class BareRetry(Retry):
    def __init__(self, code: int) -> None:
        self.code = code


class BareSnooze(Snooze):
    def __init__(self, code: int) -> None:
        self.code = code


def leave_then_raise_bare_retry() -> None:
    leave()
    raise BareRetry(3)


def leave_then_raise_bare_snooze() -> None:
    leave()
    raise BareSnooze(3)


def raise_in_other_letters() -> None:
    raise ValueError("fünf \N{SNOWMAN}")


def make_pass() -> None:
    one_pass(threads=1).run()


def nest(job: int | None) -> None:
    """Run another job, or a pass over all of them."""
    if job is None:
        make_pass()
    else:
        execute_another(job)


def nest_in_hook(job: int | None) -> None:
    leave()
    transaction.on_commit(partial(nest, job))


def nest_in_thread(job: int | None) -> None:
    raised: list[InsideTransaction] = []
    thread = Thread(target=_catch, args=(raised, partial(nest, job)), daemon=True)
    thread.start()
    thread.join(10)
    raise raised[0]


def _catch(raised: list[InsideTransaction], act: Any) -> None:
    try:
        act()
    except InsideTransaction as error:
        raised.append(error)


def fork(error: str | None) -> int:
    """Return how the child ended, which returns from here as if it were the job."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if error:
        raise RuntimeError(error)
    return 99
