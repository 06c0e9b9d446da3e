"""A process that runs jobs: claim, hand to the pool, see what comes of it, stop.

`Flush` is one pass over what is due, for cron.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue import claims, context, executor, maintenance, statements
from async_queue.context import RunningJob
from async_queue.db import keep_connection, private, vendor
from async_queue.exceptions import Retry
from async_queue.keeper import registered
from async_queue.outcomes import Outcome
from async_queue.statements import ANYTHING, Selection
from async_queue.threads import ThreadPoolExecutor

logger = logging.getLogger("async_queue")

# Jobs claimed for each thread while jobs are so short that a claim would cost more.
_PREFETCH = 4
_SHORT = 0.02  # seconds
_REMEMBERED = 32  # of the latest runs
# A signal that comes just before a wait begins is heard when the wait ends: so none is
# long, in seconds.
_HEARING = 0.2


@dataclass(frozen=True, slots=True)
class Finished:
    """A job that a pass has run, what came of it, and how many seconds it took."""

    job: RunningJob
    outcome: Outcome
    seconds: float

    @property
    def is_failure(self) -> bool:
        """Whether the job raised what it should not, or will never succeed."""
        if self.outcome.action == "retry":
            return not isinstance(self.outcome.error, Retry)
        return self.outcome.action == "fail"


class Flush:
    """One pass through the jobs that are due when it begins, on ``threads`` threads.

    ``limit`` is the most jobs it may run, ``deadline`` the seconds after which none
    begins. Without ``keep_going`` none begins after one has failed. What is in flight
    then finishes, and the rest is given back. ``on_start`` is called with each job, in
    its thread; ``on_finish`` with each Finished, in the calling thread.
    """

    def __init__(
        self,
        alias: str,
        *,
        threads: int,
        selection: Selection = ANYTHING,
        limit: int | None = None,
        deadline: float | None = None,
        keep_going: bool = False,
        on_start: Callable[[RunningJob], None] = lambda job: None,
        on_finish: Callable[[Finished], None] = lambda finished: None,
    ) -> None:
        self._alias = alias
        self._threads = threads
        self._selection = selection
        self._left = limit
        self._deadline = None if deadline is None else time.monotonic() + deadline
        self._keep_going = keep_going
        self._on_start = on_start
        self._on_finish = on_finish
        self._in_flight: dict[Future[Finished | None], RunningJob] = {}
        # What has ended, or None for a call to stop: a signal's handler may put it here
        # because a SimpleQueue, unlike a future or an event, is reentrant.
        self._news: SimpleQueue[Future[Finished | None] | None] = SimpleQueue()
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)
        self._is_dry = False
        self._is_stopping = False
        self._is_leaving = False
        self.outcomes: Counter[str] = Counter()
        self.failures = 0
        self.given_back = 0

    def stop(self, *, at_once: bool = False) -> None:
        """Begin no more jobs; may be called by any thread and by a signal's handler.

        With ``at_once`` those that run are given back too: `run` returns while their
        threads still work at what will not commit, and the process should end.
        """
        self._is_stopping = True
        self._is_leaving = self._is_leaving or at_once
        self._news.put(None)

    def run(self) -> None:
        """Make the pass; return when every job that it began has its outcome."""
        context.refuse_inside_job()
        with private(self._alias) as connection:
            if changed := vendor(connection).prepare(connection):
                logger.warning("async_queue %s", changed)
            queues = self._selection.queues
            with registered(self._alias, queues=queues, threads=self._threads) as me:
                maintenance.rescue(self._alias, me)
                maintenance.promote(self._alias)
                # What is scheduled from here on is the next pass's.
                until = statements.now(connection)
                self._selection = self._selection._replace(until=until)
                pool = self._pool(connection)
                try:
                    self._drain(pool, me)
                finally:
                    # After an error, too, nothing more may begin; see `registered`.
                    pool.shutdown(wait=not self._is_leaving, cancel_futures=True)

    def _pool(self, connection: BaseDatabaseWrapper) -> Executor:
        facts = vendor(connection)
        if facts.is_single_connection(connection):
            self._most = 1
            return _CallingThread()
        # Jobs that exclude each other: one runs, one stands ready behind it.
        self._most = 2 if facts.runs_one_job_at_a_time else self._threads * _PREFETCH
        return ThreadPoolExecutor(
            self._threads,
            thread_name_prefix="async_queue",
            initializer=keep_connection,
            initargs=(self._alias,),
        )

    def _drain(self, pool: Executor, worker: int) -> None:
        while not self._is_leaving:
            if self._is_over():
                self._give_back(worker)
            for job in self._claim(worker):
                future = pool.submit(self._execute, job)
                self._in_flight[future] = job
                future.add_done_callback(self._news.put)
            if not self._in_flight:
                return
            if (ended := self._next()) in self._in_flight:
                self._see(ended, worker)

    def _is_over(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._is_stopping = True
        return self._is_stopping

    def _give_back(self, worker: int) -> None:
        waiting = [future for future in self._in_flight if future.cancel()]
        self._release(worker, [self._in_flight.pop(future) for future in waiting])

    def _release(self, worker: int, jobs: list[RunningJob]) -> None:
        if jobs:
            self.given_back += claims.release(self._alias, worker, jobs)

    def _claim(self, worker: int) -> Iterable[RunningJob]:
        room = self._room()
        if not room or (self._is_dry and self._in_flight):
            return ()
        jobs = claims.claim(self._alias, worker, room, self._selection)
        # Then there is no more, and one last look before the end is enough.
        self._is_dry = len(jobs) < room
        if self._left is not None:
            self._left -= len(jobs)
        return jobs

    def _room(self) -> int:
        """Return how many jobs to claim now."""
        if self._is_over():
            return 0
        most = self._most if self._are_short() else min(self._threads, self._most)
        room = most - len(self._in_flight)
        # While no thread idles it can wait: many at once cost hardly more than one.
        if len(self._in_flight) >= self._threads and room < most // 2:
            return 0
        return room if self._left is None else min(room, self._left)

    def _are_short(self) -> bool:
        return sum(self._recent) < _SHORT * len(self._recent)

    def _execute(self, job: RunningJob) -> Finished | None:
        """Run the job, unless the pass was over before its turn came."""
        if self._is_over():
            return None
        self._on_start(job)
        started_at = time.monotonic()
        outcome = executor.execute(job)
        finished = Finished(job, outcome, time.monotonic() - started_at)
        if finished.is_failure and not self._keep_going:
            # Here, because this thread begins the next before anybody hears of it.
            self._is_stopping = True
        return finished

    def _next(self) -> Future[Finished | None] | None:
        """Wait until a job has ended; return None if something else came first."""
        pause = _HEARING
        if self._deadline is not None and not self._is_stopping:
            pause = min(pause, max(0.0, self._deadline - time.monotonic()))
        try:
            return self._news.get(timeout=pause)
        except Empty:
            return None

    def _see(self, future: Future[Finished | None], worker: int) -> None:
        job = self._in_flight.pop(future)
        finished = future.result()
        if finished is None:
            self._release(worker, [job])
            return
        self._recent.append(finished.seconds)
        self.outcomes[finished.outcome.action] += 1
        self.failures += finished.is_failure
        if finished.outcome.action == "release":  # Ctrl-C in the calling thread
            self.stop()
        self._on_finish(finished)


class _CallingThread(Executor):
    """Runs what is submitted at once: an in-memory database has one connection."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future
