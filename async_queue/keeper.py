"""A worker's place in the database: its row, and the lock that proves it alive."""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from django.db import Error, connections, transaction

from async_queue.db import Now, vendor
from async_queue.exceptions import AsyncQueueError
from async_queue.models import Job, Status, Worker

logger = logging.getLogger("async_queue")


@contextmanager
def registered(
    alias: str, *, queues: Sequence[str] = (), threads: int = 1
) -> Iterator[int]:
    """Be a worker, under a new number, until the block ends; on a private connection.

    Jobs that are still the worker's then are given back, and its row goes. If it
    cannot say goodbye, whoever finds its lock free rescues them.
    """
    number = _register(alias, queues, threads)
    try:
        yield number
    finally:
        try:
            _unregister(alias, number)
        except Error:
            logger.warning(
                "worker %s could not sign off; what it held will be rescued", number
            )


def _register(alias: str, queues: Sequence[str], threads: int) -> int:
    connection = connections[alias]
    facts = vendor(connection)
    with facts.turn(connection), transaction.atomic(using=alias):
        worker = Worker.objects.using(alias).create(
            host=socket.gethostname(),
            pid=os.getpid(),
            version=_version(),
            queues=",".join(queues),
            threads=threads,
            seen_at=Now(),
        )
        # Before the commit: nobody may see a worker that has no lock.
        is_alone = facts.is_single_connection(connection)
        if not (is_alone or facts.take_life(connection, worker.pk)):
            raise AsyncQueueError(
                f"somebody holds the lock of worker {worker.pk}, which is new: do two "
                "databases share their names or their files?"
            )
    return worker.pk


def _unregister(alias: str, number: int) -> None:
    connection = connections[alias]
    facts = vendor(connection)
    # Whoever was cut off meanwhile says goodbye in a new session.
    if connection.connection is not None and not connection.is_usable():
        connection.close()
    try:
        with facts.turn(connection), transaction.atomic(using=alias):
            held = Job.objects.using(alias).filter(
                status=Status.RUNNING, worker_id=number
            )
            held.transition("release")
            Worker.objects.using(alias).filter(pk=number).delete()
    finally:
        facts.drop_life(connection, number)


def _version() -> str:
    try:
        return version("async_queue")
    except PackageNotFoundError:  # used from a checkout that is not installed
        return "unknown"
