"""Rows in the state in which a test wants them, without running the queue."""

from datetime import timedelta
from typing import Any

import factory
from django.db import connection

from async_queue import codec, statements
from async_queue.db import vendor
from async_queue.models import Attempt, Job, Status, Worker


def now() -> Any:
    return statements.now(connection)


class WorkerFactory(factory.django.DjangoModelFactory[Worker]):
    class Meta:
        model = Worker

    host = "host"
    pid = 1
    version = "1"
    queues = ""
    threads = 4
    seen_at = factory.LazyFunction(now)

    class Params:
        dead = factory.Trait(dead_at=factory.LazyFunction(now))


_lives: set[int] = set()


def living(**columns: Any) -> Worker:
    """Return a worker that shows signs of life, until `let_die`."""
    worker = WorkerFactory(**columns)
    facts = vendor(connection)
    if not facts.has_heartbeat and facts.take_life(connection, worker.pk):
        _lives.add(worker.pk)
    return worker


def let_die() -> None:
    """Take their lives from the workers of `living`."""
    while _lives:
        vendor(connection).drop_life(connection, _lives.pop())


class JobFactory(factory.django.DjangoModelFactory[Job]):
    """A READY job with a true seal, of ``tests.jobs.leave`` if nothing else is said."""

    class Meta:
        model = Job

    class Params:
        waiting = factory.Trait(
            status=Status.WAITING,
            run_after=factory.LazyFunction(lambda: now() + timedelta(hours=1)),
        )
        running = factory.Trait(
            status=Status.RUNNING,
            attempt=1,
            worker=factory.SubFactory(WorkerFactory),
            started_at=factory.LazyFunction(now),
        )
        # Its worker has died without anybody having noticed.
        orphaned = factory.Trait(running=True)
        finished = factory.Trait(
            attempt=1,
            started_at=factory.LazyFunction(now),
            finished_at=factory.LazyFunction(now),
        )
        successful = factory.Trait(finished=True, status=Status.SUCCESSFUL)
        failed = factory.Trait(finished=True, status=Status.FAILED, failures=1)
        cancelled = factory.Trait(finished=True, status=Status.CANCELLED)

    function = "tests.jobs.leave"
    args = "[]"
    kwargs = "{}"
    meta = "{}"
    seal = factory.LazyAttribute(
        lambda row: codec.seal(row.function, row.args, row.kwargs, row.meta)
    )
    identity = factory.LazyAttribute(
        lambda row: codec.identity(row.function, row.args, row.kwargs)
    )
    status = Status.READY
    run_after = factory.LazyFunction(now)
    enqueued_at = factory.LazyFunction(now)


class AttemptFactory(factory.django.DjangoModelFactory[Attempt]):
    class Meta:
        model = Attempt

    job = factory.SubFactory(JobFactory, failed=True)
    number = 1
    started_at = factory.LazyFunction(now)
    finished_at = factory.LazyFunction(now)
    exception = "builtins.ValueError"
    message = "as intended"
    traceback = "Traceback ..."
