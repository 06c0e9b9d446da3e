"""The functions that the tests schedule."""

import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event

from django.db import connection

from async_queue import Cancel, Retry, Snooze, current_job, job, schedule
from tests.models import Effect

# Set by a test, or by a job for the test that waits for it.
begun = Event()
go_on = Event()


def add(a: int, b: int) -> int:
    return a + b


def echo(value: object, *, leaves: bool = False) -> object:
    if leaves:
        leave()
    return value


def leave(label: str = "effect") -> None:
    """Leave one row."""
    Effect.objects.create(label=label)


def leave_then_fail(label: str = "effect") -> None:
    Effect.objects.create(label=label)
    raise ValueError("as intended")


def leave_then_wait(label: str = "effect") -> None:
    """Leave one row, say so, and return when the test says so."""
    Effect.objects.create(label=label)
    begun.set()
    # In pieces: an interrupt comes between them.
    for _ in range(2000):
        if go_on.wait(0.01):
            return
    raise TimeoutError("the test does not let it go on")


def leave_then_retry(delay: float | None = None) -> None:
    leave()
    raise Retry("once more", delay=delay)


def leave_then_snooze(delay: float) -> None:
    leave()
    raise Snooze(delay, "later")


def leave_then_cancel() -> None:
    leave()
    raise Cancel("not needed")


def leave_then_exit() -> None:
    leave()
    raise SystemExit(3)


def number_of_current_job() -> int:
    current = current_job()
    assert current is not None
    return current.id


async def leave_asynchronously(label: str = "effect") -> str:
    await Effect.objects.acreate(label=label)
    return label


@job(queue="mail", priority=7, max_attempts=2, backoff="constant")
def send(address: str, *, subject: str = "hello") -> str:
    return f"{address}: {subject}"


class Shop:
    @staticmethod
    def open() -> str:
        return "open"

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    def close(self) -> None: ...


class Branch(Shop): ...


def take(*args: object, **kwargs: object) -> None:
    """Do nothing with whatever is passed."""


shortcut = sum  # of another module: a re-export
half = partial(add, 1)


def backoff_of_a_minute_each(failures: int) -> timedelta:
    return timedelta(minutes=failures)


def last(seconds: float, label: str = "effect") -> None:
    """Leave one row, and take so long."""
    leave(label)
    Event().wait(seconds)


def leave_or_fail(number: int) -> None:
    """Leave one row, and raise one time in ten."""
    leave(str(number))
    if number % 10 == 0:
        raise ValueError("as intended")


def leave_then_await(path: str, label: str = "effect") -> None:
    """Leave one row, and return when there is a file: for tests in other processes.

    Another file, beside it, tells that it has begun.
    """
    leave(label)
    Path(f"{path}-{label}").touch()
    for _ in range(6000):
        if Path(path).exists():
            return
        Event().wait(0.01)
    raise TimeoutError(f"there is no {path}")


def leave_number_of_session() -> None:
    """Leave a row that names this connection as the server does."""
    sql = {"postgresql": "pg_backend_pid()", "mysql": "connection_id()"}
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {sql[connection.vendor]}")
        leave(str(cursor.fetchone()[0]))
    Event().wait(0.01)


def schedule_itself(seconds: float | None) -> None:
    delay = None if seconds is None else timedelta(seconds=seconds)
    schedule(schedule_itself, [seconds], run_after=delay)


@job
def login(user: str, password: str) -> None: ...


def take_time(label: str, seconds: float) -> None:
    """Leave one row, and take so long."""
    leave(label)
    Event().wait(seconds)


def await_file(label: str, path: str) -> None:
    """Leave one row, and return when there is a file."""
    leave_then_await(path, label)


def leave_number_of_process() -> None:
    leave(str(os.getpid()))


def count_until_file(label: str, path: str) -> None:
    """Leave one row, and tell all the time how far it is, until there is a file."""
    job = current_job()
    assert job is not None
    leave(label)
    for number in range(6000):
        job.progress(number)
        if Path(path).exists():
            return
        Event().wait(0.01)
    raise TimeoutError(f"there is no {path}")
