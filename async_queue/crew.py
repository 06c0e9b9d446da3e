"""The threads of a worker that run its jobs; one that hangs is replaced.

Called by the worker's dispatcher and by its keeper. A queue and a handful of threads
are enough: a pool of the standard library can neither take back what has not begun
nor do without a thread that never returns.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Protocol

from django.db import connections

from async_queue.context import RunningJob
from async_queue.db import end_ahead, keep_connection, vendor
from async_queue.exceptions import WorkerStopping
from async_queue.threads import Thread, refresh_connections

logger = logging.getLogger("async_queue")

Run = Callable[[RunningJob], None]

# With more than so many jobs at hand a thread that is done has the next one at once.
_PLENTY = 8
# Seconds for which others are expected to be like a job that needed no transaction.
_ALIKE = 1.0


class Crew(Protocol):
    """Whoever runs the jobs of a worker."""

    def hand(self, job: RunningJob) -> None:
        """Let the next free thread run the job."""

    def take_back(self) -> list[RunningJob]:
        """Return the jobs that no thread has begun."""

    def replace(self, job: RunningJob) -> bool:
        """Start a new thread for one that hangs in the job; False if none does."""

    def dismiss(self, *, wait: bool) -> None:
        """Let the threads end when they have nothing to do; and wait for that."""

    @property
    def lost(self) -> int:
        """How many threads were replaced and hang still."""


class ThreadCrew:
    """``size`` threads, each with a connection that it keeps.

    Those that are eager open it before there is a job, which then need not wait for it.
    """

    def __init__(self, alias: str, size: int, run: Run, is_eager: bool = False) -> None:
        self._alias = alias
        self._run = run
        self._is_eager = is_eager
        # Threads may have to wait for the jobs of others before they begin theirs.
        self._has_line = vendor(connections[alias]).runs_one_job_at_a_time
        self._jobs: SimpleQueue[RunningJob | None] = SimpleQueue()
        self._lock = Lock()
        self._members: dict[int, _JobThread] = {}
        self._lost: list[_JobThread] = []
        self._slots = 0
        for _ in range(size):
            self._start()

    def hand(self, job: RunningJob) -> None:
        self._jobs.put(job)

    def take_back(self) -> list[RunningJob]:
        jobs = []
        with suppress(Empty):
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    jobs.append(job)
        return jobs + (self._prevented() if self._has_line else [])

    def _prevented(self) -> list[RunningJob]:
        cause = WorkerStopping("its worker shuts down before it has begun")
        jobs = [member.job for member in list(self._members.values())]
        return [job for job in jobs if job is not None and job.control.prevent(cause)]

    def replace(self, job: RunningJob) -> bool:
        with self._lock:
            for slot, member in self._members.items():
                if member.job is job:
                    member.is_lost = True
                    self._lost.append(self._members.pop(slot))
                    break
            else:
                return False
            self._start()
        return True

    def dismiss(self, *, wait: bool) -> None:
        members = list(self._members.values())
        for _ in members:
            self._jobs.put(None)
        for member in members if wait else ():
            # One that was prevented may stand in line for long.
            if (job := member.job) is None or not job.control.is_ended:
                member.join()

    @property
    def lost(self) -> int:
        self._lost = [member for member in self._lost if member.is_alive()]
        return len(self._lost)

    def _start(self) -> None:
        self._slots += 1
        member = _JobThread(
            self._alias, self._slots, self._jobs, self._run, self._is_eager
        )
        try:
            member.start()
        except RuntimeError:  # at the end of the interpreter
            logger.warning("no thread can be started in place of one that is lost")
            return
        self._members[self._slots] = member


class _JobThread(Thread):
    """A thread that takes one job after the other; see its class for connections."""

    def __init__(
        self,
        alias: str,
        slot: int,
        jobs: "SimpleQueue[RunningJob | None]",
        run: Run,
        is_eager: bool,
    ) -> None:
        # A thread that hangs must not keep the process from ending.
        super().__init__(name=f"async_queue-{slot}", daemon=True)
        self._alias = alias
        self._slot = slot
        self._jobs = jobs
        self._run_job = run
        self._is_eager = is_eager
        self._began_none_at = -_ALIKE
        self.job: RunningJob | None = None
        self.is_lost = False

    def run(self) -> None:
        keep_connection(self._alias)
        if self._is_eager:
            self._connect()
        try:
            self._run_jobs()
        finally:
            end_ahead(connections[self._alias])

    def _run_jobs(self) -> None:
        while not self.is_lost and (job := self._next()) is not None:
            job.control.slot = self._slot
            job.control.is_followed = self._is_followed
            self.job = job
            try:
                # What a job leaves in the context is not the next one's.
                copy_context().run(self._run_job, job)
            except BaseException:  # the thread must outlive whatever this is
                with suppress(Exception):
                    logger.exception("job %s: the worker itself failed", job.id)
            finally:
                self.job = None
                refresh_connections()

    def _is_followed(self, has_begun: bool) -> bool:
        now = time.monotonic()
        if not has_begun:
            self._began_none_at = now
        has_plenty = self._jobs.qsize() > _PLENTY
        return has_plenty and now - self._began_none_at > _ALIKE

    def _connect(self) -> None:
        connection = connections[self._alias]
        # What a pool has lent, others have not.
        if not connection.settings_dict["OPTIONS"].get("pool"):
            with suppress(Exception):  # it is tried again for a job
                connection.ensure_connection()

    def _next(self) -> RunningJob | None:
        try:
            return self._jobs.get_nowait()
        except Empty:
            end_ahead(connections[self._alias])
            job = self._jobs.get()
            refresh_connections()  # which may have become stale meanwhile
            return job


class CallingThread:
    """Runs what it is handed at once: an in-memory database has one connection."""

    lost = 0

    def __init__(self, run: Run) -> None:
        self._run = run

    def hand(self, job: RunningJob) -> None:
        copy_context().run(self._run, job)

    def take_back(self) -> list[RunningJob]:
        return []

    def replace(self, job: RunningJob) -> bool:
        return False

    def dismiss(self, *, wait: bool) -> None: ...
