"""Steps of a worker by hand, in the thread of the test."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import Any
from unittest.mock import patch

from django.db import connection, connections

from async_queue import claims, executor
from async_queue.bounds import Bounds
from async_queue.context import RunningJob
from async_queue.db import libpq, vendor
from async_queue.models import Attempt, Job
from async_queue.outcomes import Outcome
from async_queue.places import Place, seated
from async_queue.worker import Worker
from tests.factories import WorkerFactory, now


def claim_next() -> RunningJob:
    """Claim the next READY job for a worker of its own."""
    (job,) = claims.claim("default", WorkerFactory().pk, 1)
    return job


def execute_next() -> Outcome:
    return executor.execute(claim_next())


def one_pass(
    threads: int = 4,
    *,
    limit: int | None = None,
    deadline: float | None = None,
    keep_going: bool = False,
    **options: Any,
) -> Worker:
    """Return a worker that makes one pass, as ``flush_queue`` does."""
    bounds = Bounds(
        is_burst=True,
        only_due_now=True,
        max_jobs=limit,
        deadline=deadline,
        stops_at_failure=not keep_going,
    )
    return Worker("default", threads=threads, bounds=bounds, **options)


def flush(threads: int = 4) -> Worker:
    """Make one pass on threads; return it when it is over."""
    made = one_pass(threads, keep_going=True)
    made.run()
    return made


def make_due(job: Job) -> None:
    """Let the moment of a job that waits come."""
    Job.objects.filter(pk=job.pk).update(run_after=now())


def exceptions_of(job: Job) -> list[str]:
    """Return the names of what the attempts of ``job`` raised."""
    paths = Attempt.objects.filter(job=job).values_list("exception", flat=True)
    return [path.rpartition(".")[2] for path in paths]


def elsewhere(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Call ``function`` in another thread, on a connection of that thread."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
        finally:
            connections.close_all()

    Thread(target=call, daemon=True).start()
    return future


@contextmanager
def database_settings(options: dict[str, Any], **changes: Any) -> Iterator[None]:
    """Change the project's database settings, for new connections of every thread."""
    settings = connections.settings["default"]
    kept = dict(settings)
    connection.close()
    settings.update(changes, OPTIONS={**settings["OPTIONS"], **options})
    try:
        yield
    finally:
        connection.close()
        settings.update(kept)


@contextmanager
def wrapped(wrapper: Callable[..., Any]) -> Iterator[None]:
    """Pass all statements to the wrapper, also those that go past Django's cursors."""
    rows = libpq.rows

    def pass_on(connection: Any, sql: str, params: Any) -> Any:
        return wrapper(lambda *_: rows(connection, sql, params), sql, params, False, {})

    with connection.execute_wrapper(wrapper), patch.object(libpq, "rows", pass_on):
        yield


@contextmanager
def registered(
    alias: str = "default", *, queues: Sequence[str] = (), threads: int = 1
) -> Iterator[int]:
    """Be a worker, under a new number, until the block ends."""
    place = Place(alias, queues=queues, threads=threads)
    with seated(place):
        yield place.number


def is_proved_dead(number: int) -> bool:
    """Tell whether nobody holds the life of this worker; call it `elsewhere`."""
    mine = connections["default"]
    with vendor(mine).proof_of_death(mine, number) as is_dead:
        return is_dead
