"""Jobs that take too long, or as long as a test wants, in workers beside the test."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event, Lock, get_ident
from typing import Any

from django.db import connection, transaction

from async_queue import current_job, schedule
from async_queue.exceptions import JobStopped
from tests.jobs import leave
from tests.models import Effect

FOR_LONG = 60  # seconds
SESSION = {
    "sqlite": "SELECT 0",
    "postgresql": "SELECT pg_backend_pid()",
    "mysql": "SELECT connection_id()",
}
QUERY = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
    "SELECT count(*) FROM n",
    "postgresql": f"SELECT pg_sleep({FOR_LONG})",
    "mysql": f"SELECT SLEEP({FOR_LONG})",
}


def session() -> str:
    """Return the number that the server has given to this connection."""
    with connection.cursor() as cursor:
        cursor.execute(SESSION[connection.vendor])
        return str(cursor.fetchone()[0])


def say(folder: str, name: str, *words: object) -> None:
    """Leave a file for the test to find, with these words in it."""
    path = Path(folder) / name
    # Jobs may say the same at the same time.
    own = path.with_suffix(f".{os.getpid()}.{get_ident()}")
    own.write_text(" ".join(map(str, words)))
    own.rename(path)


def await_file(folder: str, name: str, check: Callable[[], object] = bool) -> None:
    """Return when the test has left a file of this name."""
    for _ in range(10 * 100 * FOR_LONG):
        check()
        if (Path(folder) / name).exists():
            return
        Event().wait(0.01)
    raise TimeoutError(f"there is no {name}")


def read_from_nobody() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.recv(1)


def acquire_twice() -> None:
    lock = Lock()
    lock.acquire()
    lock.acquire(timeout=FOR_LONG)


def query() -> None:
    with connection.cursor() as cursor:
        cursor.execute(QUERY[connection.vendor])


def lock_row() -> None:
    """Wait for a row that the test holds."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT id FROM tests_effect WHERE label = 'held' FOR UPDATE")


def be_stubborn() -> None:
    until = time.monotonic() + FOR_LONG
    while time.monotonic() < until:
        with suppress(BaseException):
            while time.monotonic() < until:
                Event().wait(0.05)


KINDS: dict[str, Callable[[], object]] = {
    "sleep": partial(time.sleep, FOR_LONG),
    "socket": read_from_nobody,
    "lock": acquire_twice,
    "query": query,
    "row": lock_row,
    "stubborn": be_stubborn,
}


def hang(kind: str, folder: str) -> None:
    """Leave one row, say since when, and do not come back."""
    leave(kind)
    say(folder, kind, session(), time.time())
    KINDS[kind]()


def meet(folder: str, count: int) -> None:
    """Return when so many are in here at the same time."""
    job = current_job()
    assert job is not None
    say(folder, f"met-{job.id}")
    for _ in range(100 * FOR_LONG):
        if len(list(Path(folder).glob("met-*"))) >= count:
            return
        Event().wait(0.01)
    raise TimeoutError("the others have not come")


def look_for_cancel(folder: str, label: str = "effect") -> None:
    """Leave one row, and end as soon as there is a reason, which is told."""
    job = current_job()
    assert job is not None
    leave(label)
    left = None if job.deadline is None else job.deadline - time.monotonic()
    say(folder, "begun", session(), left)
    try:
        await_file(folder, "go", job.check_cancelled)
    except JobStopped as error:
        say(folder, "stopped", type(error).__name__)
        raise


def take(folder: str, label: str, seconds: float) -> None:
    """Leave one row, say so, and take so long."""
    leave(label)
    say(folder, f"begun-{label}")
    Event().wait(seconds)


def wait_for_go(folder: str, label: str = "effect") -> None:
    """Leave one row, and return when the test says so."""
    job = current_job()
    assert job is not None
    leave(label)
    say(folder, f"begun-{label}", session(), *job.fencing_token)
    await_file(folder, "go")
    say(folder, f"ended-{label}")


def report_progress(folder: str) -> None:
    """Report, wait, report again, and wait again."""
    job = current_job()
    assert job is not None
    leave()
    job.progress(3, 10, "a third")
    say(folder, "begun")
    await_file(folder, "more")
    job.progress(9, 10)
    await_file(folder, "go")


def wait_untouched(folder: str) -> None:
    """Read one row, and nothing more, until the test says so."""
    say(folder, "begun", session())
    await_file(folder, "go")


def wait_touched(folder: str) -> None:
    """Leave one row, and return when the test says so."""
    leave()
    say(folder, "begun", session())
    await_file(folder, "go")


def schedule_and_wait(folder: str) -> None:
    """Hold a lock of the table of jobs until the test says so."""
    schedule(leave, ["scheduled"])
    say(folder, "begun")
    await_file(folder, "go")


def leave_open_transaction(label: str) -> None:
    """Begin what nobody commits."""
    begin = "BEGIN" if connection.vendor != "mysql" else "START TRANSACTION"
    with connection.cursor() as cursor:
        cursor.execute(begin)
    leave(label)


def leave_then_lose_session(label: str, *, goes_on: bool) -> None:
    """Leave one row, and have the session ended as if by somebody else."""
    leave(label)
    end_own_session()
    if goes_on:
        return
    leave("not reached")


def end_own_session() -> None:
    other: Any = connection.copy()
    end = {"postgresql": "SELECT pg_terminate_backend(%s)", "mysql": "KILL %s"}
    number = int(session())
    try:
        with other.cursor() as cursor:
            cursor.execute(end[connection.vendor], [number])
    finally:
        other.close()


def leave_in_pieces(folder: str, label: str) -> None:
    """Leave rows in short transactions, slowly, as a job with atomic=False should."""
    for number in range(3):
        with transaction.atomic():
            Effect.objects.create(label=f"{label}-{number}")
        say(folder, f"{label}-{number}")
        Event().wait(0.3)


def die_between_hooks() -> None:
    """Leave one row, commit, and die with a hook left to call."""
    leave("committed")
    transaction.on_commit(partial(os.kill, os.getpid(), 9))
    transaction.on_commit(partial(leave, "hook"))


def leave_clock(label: str) -> None:
    """Leave one row that tells what this process takes for the time."""
    leave(f"{label} {time.time():.0f}")
