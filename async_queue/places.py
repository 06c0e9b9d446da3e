"""A worker's place in the database: its row, and the lock that proves it alive."""

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version

from django.db import Error, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue import claims, hooks, statements
from async_queue.db import Now, vendor
from async_queue.exceptions import AsyncQueueError
from async_queue.models import Job, Status, Worker
from async_queue.statements import Tick

logger = logging.getLogger("async_queue")

# Seconds before the lock is tried again: who looks whether we are dead holds it.
_AGAIN = (0.02, 0.1, 0.2)


class DeclaredDead(AsyncQueueError):
    """Another worker has found this one dead and has taken its jobs."""


class Place:
    """The place of one worker, under its number; a new one each time it is lost."""

    def __init__(self, alias: str, *, queues: Sequence[str] = (), threads: int) -> None:
        self.alias = alias
        self.has_lock = False
        self._number: int | None = None
        self._queues = tuple(queues)
        self._threads = threads
        # The names that a look for READY jobs can be restricted to.
        self._exact = self._queues if claims.are_names(self._queues) else ()
        self.is_pooled = False

    @property
    def number(self) -> int:
        """The worker's number; 0, which is nobody's, while it has none."""
        return self._number or 0

    def serves(self, queue: str) -> bool:
        """Tell whether jobs of this queue are the worker's."""
        return claims.serves(self._queues, queue)

    def take(self, connection: BaseDatabaseWrapper) -> None:
        """Take the place, or the lock of it again in a new session."""
        facts = vendor(connection)
        self._note_pooler(facts.has_lasting_sessions(connection))
        if self._number is None:
            self._register(connection)
        # Without a heart the lock is the process's, and has outlasted the session.
        elif facts.has_heartbeat or not self.has_lock:
            self.has_lock = not self.is_pooled and self._lock(connection)
        hooks.point("after_register")

    def beat(self, connection: BaseDatabaseWrapper, echo: str | None) -> Tick:
        """Beat; raise DeclaredDead if somebody has found that this worker is dead."""
        if not (self.has_lock or self.is_pooled):
            # The server has not noticed yet that our former session has ended.
            self.has_lock = self._lock(connection)
        tick = statements.tick(connection, self.number, self._exact, echo)
        if not tick.is_registered:
            raise DeclaredDead(
                f"worker {self._number} was found dead by another, and its jobs were "
                "taken; it goes on under a new number"
            )
        return tick

    def lose(self) -> None:
        """Have no place any more, until one is taken."""
        connection = connections[self.alias]
        if self.has_lock:
            vendor(connection).drop_life(connection, self.number)
        self._number, self.has_lock = None, False

    def leave(self, connection: BaseDatabaseWrapper) -> bool:
        """Give back the jobs that still are the worker's, and remove its row.

        False if it is to be done again, because somebody has locked a job's row.
        """
        facts = vendor(connection)
        alias, number = self.alias, self.number
        jobs = Job.objects.using(alias)
        held = jobs.filter(status=Status.RUNNING, worker_id=number)
        has_left = True
        try:
            with facts.turn(connection), transaction.atomic(using=alias):
                free = list(held.order_by("id").unlocked().values_list("pk", flat=True))
                jobs.filter(pk__in=free).transition("release")
                has_left = not held.exists()
                if has_left:
                    Worker.objects.using(alias).filter(pk=number).delete()
        finally:
            if self.has_lock and has_left:
                facts.drop_life(connection, number)
                self.has_lock = False
        return has_left

    def vacate(self) -> None:
        """Let nobody take the worker for alive, now that its session is over."""
        # Without a heart the lock is the process's, and would outlast the session.
        if self.has_lock and not vendor(connections[self.alias]).has_heartbeat:
            self.lose()

    def _register(self, connection: BaseDatabaseWrapper) -> None:
        facts = vendor(connection)
        worker = Worker(
            host=socket.gethostname(),
            pid=os.getpid(),
            version=_version(),
            queues=",".join(self._queues),
            threads=self._threads,
            has_lock=not self.is_pooled,
            seen_at=Now(),
        )
        try:
            with facts.turn(connection), transaction.atomic(using=self.alias):
                worker.save(using=self.alias, force_insert=True)
                # Before the commit: nobody may see a worker that has no lock.
                is_alone = facts.is_single_connection(connection)
                if not (is_alone or self.is_pooled):
                    self._take_life(connection, worker.pk)
        except BaseException:
            # SQLite gives the number of a row that is rolled back again.
            if self.has_lock:
                with suppress(Error):  # the session is gone, and the lock with it
                    facts.drop_life(connection, worker.pk)
                self.has_lock = False
            raise
        self._number = worker.pk

    def _take_life(self, connection: BaseDatabaseWrapper, number: int) -> None:
        if not vendor(connection).take_life(connection, number):
            raise AsyncQueueError(
                f"somebody holds the lock of worker {number}, which is new: "
                "do two databases share their names or their files?"
            )
        self.has_lock = True

    def _lock(self, connection: BaseDatabaseWrapper) -> bool:
        facts = vendor(connection)
        for pause in (*_AGAIN, None):
            if facts.take_life(connection, self.number):
                return True
            if pause is not None:
                time.sleep(pause)
        return False

    def _note_pooler(self, has_lasting_sessions: bool) -> None:
        if not has_lasting_sessions and not self.is_pooled:
            logger.warning(
                "the database is behind a transaction pooler, where a lock can outlive "
                "its owner: a dead worker is known by its heart alone, after "
                "STALL_AFTER, and new jobs are looked for every POLL_INTERVAL"
            )
        self.is_pooled = not has_lasting_sessions


@contextmanager
def seated(place: Place) -> Iterator[None]:
    """Have the place until the block ends.

    If it cannot say goodbye, whoever finds its lock free rescues its jobs.
    """
    place.take(connections[place.alias])
    try:
        yield
    finally:
        connection = connections[place.alias]
        # Whoever was cut off meanwhile says goodbye in a new session.
        if connection.connection is not None and not connection.is_usable():
            connection.close()
        try:
            place.leave(connection)
        except Error:
            logger.warning(
                "worker %s could not sign off; what it held will be rescued",
                place.number,
            )


def _version() -> str:
    try:
        return version("async_queue")
    except PackageNotFoundError:  # used from a checkout that is not installed
        return "unknown"
