"""A process that runs jobs: claim, hand to a thread, see what came of it, stop.

`Worker` serves ``run_workers``, ``flush_queue`` and whoever starts one in a process of
their own. Its keeper does, in a thread, all that goes by the clock.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from datetime import timedelta

from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue import claims, conf, context, executor, hooks, maintenance, statements
from async_queue.bounds import Bounds
from async_queue.context import RunningJob
from async_queue.crew import CallingThread, Crew, ThreadCrew
from async_queue.db import private, vendor
from async_queue.executor import Unrecorded
from async_queue.flight import Flight
from async_queue.intake import Intake
from async_queue.keeper import Keeper
from async_queue.lone import execute_alone
from async_queue.outcomes import Finished, Outcome
from async_queue.places import Place, seated
from async_queue.processes import memory
from async_queue.recorder import Recorder
from async_queue.statements import Selection
from async_queue.threads import Thread

logger = logging.getLogger("async_queue")

# Seconds, at most, of a wait: a signal that comes just before it is heard at its end.
_HEARING = 0.5
# Seconds to wait for a lock: on SQLite a job holds one for as long as it runs.
_PATIENCE = 0.25
# Seconds for the keeper to end the runs of a worker that waits no longer.
_LAST = 5.0


class Worker:
    """Runs jobs on ``threads`` threads until it is stopped, or comes to its bounds.

    ``queues`` are names in the order in which they are looked at, ``b*`` for all that
    begin so, ``-c`` for not this one; none at all are all. Once it is to stop it begins
    no job, gives back what it has not begun, and waits for what runs, but no longer
    than ``shutdown_timeout`` (None: for ever): those are rolled back and run again.
    ``on_start`` is called with each job, in its thread; ``on_finish`` with each
    Finished, in the thread of `run`.
    """

    # Why it has ended or is about to: "stopped", "drained", "max_jobs", "max_memory",
    # "deadline", "failure", "threads lost", or "failed" by an error of its own.
    reason = ""
    failures = 0
    given_back = 0

    _keeper: Keeper | None = None
    _thread: Thread | None = None
    _suspect: RunningJob | None = None
    _failure: Exception | None = None
    _until = float("inf")
    _is_away = False
    _is_leaving = False

    def __init__(
        self,
        alias: str | None = None,
        *,
        threads: int | None = None,
        queues: Sequence[str] = (),
        selection: Selection | None = None,
        bounds: Bounds | None = None,
        shutdown_timeout: timedelta | None = None,
        on_start: Callable[[RunningJob], None] = lambda job: None,
        on_finish: Callable[[Finished], None] | None = None,
    ) -> None:
        settings = conf.settings()
        self._alias = alias or settings.database
        self._facts = vendor(connections[self._alias])
        self._is_alone = self._facts.is_single_connection(connections[self._alias])
        self._threads = 1 if self._is_alone else threads or settings.threads
        self._selection = selection or Selection(tuple(queues))
        self._bounds = bounds or Bounds()
        self._patience = shutdown_timeout
        self._on_start = on_start
        self._on_finish = on_finish
        self._place = Place(
            self._alias, queues=self._selection.queues, threads=self._threads
        )
        self._intake = self._new_intake()
        self._crew: Crew
        self._recorder = Recorder(self._alias, self._threads, self._note_end)
        self._flight = Flight(self._intake.few())
        # Claimed, and not to be begun any more.
        self._untouched: list[RunningJob] = []
        self._turned_at = time.monotonic()
        self.outcomes: Counter[str] = Counter()

    @property
    def number(self) -> int:
        """The worker's number in the database; 0 while it has none."""
        return self._place.number

    @property
    def has_begun(self) -> bool:
        """Whether it has come so far that it may have had jobs."""
        return self._keeper is not None and self._keeper.has_begun

    @property
    def is_live(self) -> bool:
        """Whether its loop turns; the database is not asked."""
        return time.monotonic() - self._turned_at < 10 * _HEARING

    @property
    def is_ready(self) -> bool:
        """Whether it has reached the database lately, and is not about to stop."""
        return not self.reason and self._keeper is not None and self._keeper.is_sure()

    def start(self) -> None:
        """Run once, in a thread of its own, until `stop`.

        `join` it before the process ends. Raises InsideTransaction in a job.
        """
        context.refuse_inside_job()
        # Whoever calls leaves no trace in its jobs, such as the language of a request.
        self._thread = Thread(
            target=Context().run, args=(self.run,), name="async_queue", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Wait until a worker that was started has stopped."""
        if self._thread is not None:
            self._thread.join()

    def stop(self, *, at_once: bool = False) -> None:
        """Begin no more jobs; may be called by any thread and by a signal's handler.

        With ``at_once`` those that run are not waited for.
        """
        self._end("stopped")
        self._is_leaving = self._is_leaving or at_once
        self._flight.look()

    def run(self) -> None:
        """Work; return when every job that was begun has its outcome, or was ended."""
        context.refuse_inside_job()
        if self._bounds.deadline is not None:
            self._until = time.monotonic() + self._bounds.deadline
        with private(self._alias) as connection:
            if changed := self._facts.prepare(connection):
                logger.warning("async_queue %s", changed)
        with private(self._alias, _PATIENCE) as connection:
            alone, in_threads = self._working_alone, self._working_in_threads
            with alone() if self._is_alone else in_threads():
                if self._bounds.only_due_now:
                    until = statements.now(connection)
                    self._intake.selection = self._selection._replace(until=until)
                self._work(connection)

    # What its keeper needs.

    def held(self) -> dict[tuple[int, int], RunningJob]:
        """Return the jobs that threads run or are about to, by id and attempt."""
        return self._flight.jobs()

    def look_for_work(self, *, suspects: bool = False, queue: str = "") -> None:
        """Claim as soon as there is room, from the ``queue`` first if all are empty."""
        self._intake.hear(queue, suspects=suspects)
        self._flight.look()

    def give_up(self, job: RunningJob) -> None:
        """Count a job as lost whose thread does not come back."""
        if not self._crew.replace(job):
            return
        self._note_end(Finished(job, Outcome("lose", job.control.cause), 0.0))
        if self._crew.lost > max(1, self._threads // 2):
            self._end("threads lost")

    # The loop.

    @contextmanager
    def _working_in_threads(self) -> Iterator[None]:
        self._keeper = Keeper(self._place, self)
        self._keeper.start()
        try:
            stays = not self._bounds.is_burst
            self._crew = ThreadCrew(self._alias, self._threads, self._run, stays)
            yield
        finally:
            self._end("failed")  # nothing more may begin, after an error either
            # Without a keeper nobody ends what hangs.
            self._crew.dismiss(wait=not (self._is_leaving or self._keeper.failure))
            self._keeper.stop()

    @contextmanager
    def _working_alone(self) -> Iterator[None]:
        self._crew = CallingThread(self._run)
        with seated(self._place):
            maintenance.rescue(self._alias)
            maintenance.promote(self._alias)
            yield

    def _new_intake(self) -> Intake:
        is_idle_at_times = not self._bounds.is_burst and conf.settings().notify
        return Intake(
            self._place,
            self._selection,
            self._threads,
            left=self._bounds.max_jobs,
            runs_one_at_a_time=self._facts.runs_one_job_at_a_time,
            wants_word=self._facts.listens and is_idle_at_times,
        )

    def _work(self, connection: BaseDatabaseWrapper) -> None:
        while not self._is_over():
            if self._keeper is not None:
                self._keeper.check()
            if self._intake.is_stuck(len(self._flight)):
                self._take_back()
            self._release()
            self._fill(connection)
            if self._is_done():
                self._end("drained")
            else:
                self._hear(self._intake.patience(_HEARING))
        self._wind_up()
        if self._failure is not None:
            raise self._failure

    def _is_over(self) -> bool:
        if time.monotonic() >= self._until:
            self._end("deadline")
        return bool(self.reason)

    def _end(self, reason: str) -> None:
        self.reason = self.reason or reason

    def _is_done(self) -> bool:
        if self._flight:
            return False
        intake = self._intake
        if intake.left == 0:
            self._end("max_jobs")
        is_drained = intake.is_dry and not intake.may_have_suspects
        return intake.left == 0 or (self._bounds.is_burst and is_drained)

    def _fill(self, connection: BaseDatabaseWrapper) -> None:
        """Claim until there is no room, or nothing to be had."""
        self._flight.few = self._intake.few()
        try:
            while room := self._room():
                if self._intake.is_dry:
                    break
                for job in self._intake.claim(connection, room):
                    self._hand(job)
            self._fill_lone_place()
        except Error as error:
            if self._facts.is_transient(error):
                return  # somebody holds a lock: it looks again soon
            if self._bounds.is_burst:
                raise
            # The keeper says so, and when the database is back.
            logger.debug("cannot claim: %s", error)
            self._is_away = True
            connection.close()

    def _room(self) -> int:
        if self._is_away or self._is_over() or not self._may_claim():
            return 0
        return self._intake.room(len(self._flight))

    def _may_claim(self) -> bool:
        if self._keeper is None or self._keeper.is_sure():
            return True
        if self._bounds.is_burst:
            # It does not wait for a database that is away, of which this tells.
            statements.now(connections[self._alias])
        return False

    def _fill_lone_place(self) -> None:
        """Take a suspect, of which one at a time runs, in a process of its own."""
        if self._suspect or not self._intake.may_have_suspects or not self._room():
            return
        for job in self._intake.claim_suspect():
            self._suspect = job
            self._hand(job)

    def _hand(self, job: RunningJob) -> None:
        self._flight.add(job)
        self._crew.hand(job)

    def _run(self, job: RunningJob) -> None:
        """Run the job in its thread, unless all was over before its turn came."""
        hooks.point("before_run")
        if self._is_over() or not self._may_begin(job):
            self._flight.end(job, None)
            return
        outcome: Outcome | Unrecorded = Outcome("lose")
        started_at = time.monotonic()
        try:
            run = execute_alone if job is self._suspect else executor.run
            outcome = run(job)
        finally:
            if isinstance(outcome, Outcome):
                seconds = time.monotonic() - started_at
                self._note_end(Finished(job, outcome, seconds))
        if isinstance(outcome, Unrecorded):
            self._recorder.put(outcome)

    def _note_end(self, finished: Finished) -> None:
        if finished.is_failure and self._bounds.stops_at_failure:
            # Here, because this thread begins the next before anybody hears of it.
            self._end("failure")
        is_usual = finished.outcome.action == "succeed" and not self._suspect
        is_urgent = not is_usual or self._on_finish is not None
        self._flight.end(finished.job, finished, is_urgent=is_urgent)

    def _may_begin(self, job: RunningJob) -> bool:
        if self._keeper is not None and not self._keeper.vouches_for(job):
            return False
        try:
            self._on_start(job)
        # Whose it is hears of it from `run`: such as a broken pipe.
        except Exception as error:
            self._failure = error
            self._end("failed")
            return False
        return True

    def _hear(self, seconds: float) -> None:
        """Wait for a word, and see to all that has ended."""
        self._turned_at = time.monotonic()
        seconds = max(0.0, min(seconds, self._until - self._turned_at))
        has_word = self._flight.wait(seconds)
        self._is_away = self._is_away and not has_word
        if has_word or self._intake.is_rested():
            self._intake.wake()
        for job, finished in self._flight.ended():
            if job is self._suspect:
                self._suspect = None
            if not self._flight:
                self._intake.is_dry = False  # before the end there is one more look
            if finished is None:
                self._untouched.append(job)
            else:
                self._count(finished)

    def _count(self, finished: Finished) -> None:
        self._intake.note_run(finished.seconds)
        self.outcomes[finished.outcome.action] += 1
        self.failures += finished.is_failure
        if finished.outcome.action == "release":  # Ctrl-C in the calling thread
            self.stop()
        most = self._bounds.max_memory
        if most is not None and memory() > most:
            self._end("max_memory")
        if self._on_finish is not None:
            self._on_finish(finished)

    # The end.

    def _wind_up(self) -> None:
        self._take_back()
        self._release()
        until = float("inf")
        if self._patience is not None and self.reason in ("stopped", "threads lost"):
            until = time.monotonic() + self._patience.total_seconds()
        while self._flight and not self._is_leaving and time.monotonic() < until:
            self._hear(_HEARING)
            self._release()
        if self._flight and self._keeper is not None:
            self._keeper.end_all("its worker shuts down, and could not wait for it")
            until = time.monotonic() + (0.0 if self._is_leaving else _LAST)
            while self._flight and time.monotonic() < until:
                self._hear(_HEARING)
            self._is_leaving = bool(self._flight)

    def _take_back(self) -> None:
        for job in self._crew.take_back():
            self._flight.remove(job)
            self._untouched.append(job)

    def _release(self) -> None:
        """Give back what was not begun; the keeper does what is left at the end."""
        if not self._untouched:
            return
        left = {job.id: job.attempt for job in self._untouched}
        try:
            self.given_back += claims.release(self._alias, self.number, left)
            self._untouched.clear()
        except Error as error:
            if self._bounds.is_burst and not self._facts.is_transient(error):
                raise
            logger.debug("cannot give back what has not begun: %s", error)
