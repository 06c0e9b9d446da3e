"""The thread that keeps a worker alive and its jobs in order.

It registers the worker, holds the lock that proves it alive, beats, rescues what the
dead left, promotes what is due, ends runs that are too long or were cancelled, and
passes on the word that there is work. Every worker has one and none is the leader.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue import claims, conf, executor, hooks, maintenance, statements
from async_queue.context import RunningJob
from async_queue.db import private, vendor
from async_queue.exceptions import JobCancelled, JobStopped, JobTimeout, WorkerStopping
from async_queue.notifier import Notifier
from async_queue.peers import Peers
from async_queue.places import DeclaredDead, Place
from async_queue.statements import CLOCK, Tick

logger = logging.getLogger("async_queue")

Step = Callable[[], object]
Held = Mapping[tuple[int, int], RunningJob]  # by id and attempt: one may be there twice

# Seconds for which the keeper waits for a lock of somebody else's: others count on it.
_PATIENCE = 0.5
# While jobs run, seconds between two looks at how long they do.
_WATCH = 0.2
# A job that looks at its deadline itself has so many seconds to end in good order.
_COURTESY = 0.3
# Seconds after its end in which a thread must come back, or is replaced; and where its
# worker was cut off, of which TCP tells its session late.
_RETURN, _RETURN_FROM_AFAR = 1.0, 20.0
# Seconds before the first try to reconnect, and at most, with as much at random.
_RECONNECT = (0.05, 1.0)
# Seconds for which it tries to sign off while somebody holds a lock.
_LEAVING = 3.0
# Seconds between two rounds of pruning.
_PRUNE = 60.0


class Watched(Protocol):
    """What a keeper needs of its worker; all may be called by any thread."""

    def held(self) -> Held:
        """Return the jobs that threads run or are about to."""

    def look_for_work(self, *, suspects: bool = False, queue: str = "") -> None:
        """Say that there may be READY jobs, in the ``queue`` if told, or suspects."""

    def give_up(self, job: RunningJob) -> None:
        """Do without the thread that hangs in ``job``."""


class Keeper:
    """Keeps the worker of `place` until it is stopped."""

    def __init__(self, place: Place, watched: Watched) -> None:
        self._place = place
        self._watched = watched
        settings = conf.settings()
        self._interval = settings.poll_interval.total_seconds()
        # So old, in seconds, a proof of life may be: before others may doubt it.
        self._trust = settings.stall_after.total_seconds() / 2
        self._peers = Peers(place.alias, self._interval)
        self._notifier = Notifier()
        self._is_over = False
        self._leaves_until = float("inf")
        self._end_all_for: str | None = None
        # Whether it has rescued and promoted what there was: nothing is claimed before.
        self.has_begun = False
        self.failure: BaseException | None = None
        self._tick_at = 0.0
        self._due_at = float("inf")
        # The moment, by the monotonic clock, of the last proof that it lives.
        self._proved_at = -float("inf")
        self._is_away = False
        # Rows of ours that no thread runs, and since when they have been seen.
        self._orphans: dict[tuple[int, int], float] = {}
        self._ended: dict[tuple[int, int], tuple[RunningJob, float]] = {}
        self._unrecorded: list[RunningJob] = []
        self._pruned: int | None = 0
        self._prune_at = time.monotonic() + _PRUNE * random.random()
        self._told: set[str] = set()
        self._thread = threading.Thread(
            target=self._run, name="async_queue-keeper", daemon=True
        )

    def start(self) -> None:
        """Register the worker and keep it, in a thread; see `check`."""
        self._thread.start()

    def check(self) -> None:
        """Raise what has ended the keeper, or prevented it from beginning."""
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Give back what the worker still holds, sign off, and return."""
        self._is_over, self._leaves_until = True, time.monotonic() + _LEAVING
        self._notifier.wake()
        self._thread.join()
        self._notifier.close()

    def end_all(self, reason: str) -> None:
        """End all runs, uncharged; those that do not come back are given up."""
        self._end_all_for = reason
        self._notifier.wake()

    def is_sure(self) -> bool:
        """Tell whether the worker was alive just now, as far as others can see."""
        return self.has_begun and time.monotonic() - self._proved_at < self._trust

    def vouches_for(self, job: RunningJob) -> bool:
        """Tell whether a job that was claimed may still be begun."""
        return job.worker == self._place.number and self.is_sure()

    def _run(self) -> None:
        try:
            self._stay_connected()
        except BaseException as error:  # see `check`
            self.failure = error
            self._watched.look_for_work()
        finally:
            self._proved_at = -float("inf")
            self._place.vacate()

    def _stay_connected(self) -> None:
        pause, longest = _RECONNECT
        while True:
            try:
                with private(self._place.alias, _PATIENCE) as connection:
                    pause = _RECONNECT[0]
                    self._keep(connection)
                return
            except Error as error:
                self._note_loss(error)
            if self._is_over and time.monotonic() > self._leaves_until:
                return
            time.sleep(pause * (1 + random.random()))
            self._replace_hung()
            pause = min(2 * pause, longest / 2)

    def _note_loss(self, error: Error) -> None:
        facts = vendor(connection := connections[self._place.alias])
        # Once the worker has a row, whoever cuts its session does not prevent it.
        is_cut = self._place.number and facts.is_session_lost(connection, error)
        if not (self.has_begun or is_cut or facts.is_transient(error)):
            raise error
        self._proved_at = -float("inf")
        if not self._is_away:
            reason = str(error).strip().partition("\n")[0]
            logger.warning("the database is away; trying again: %s", reason)
        self._is_away = True

    def _keep(self, connection: BaseDatabaseWrapper) -> None:
        self._take_place(connection)
        while not self._is_over:
            self._turn(connection)
            self._hear(self._notifier.wait(connection, self._pause()))
        self._manage(connection, partial(self._end_runs, connection))
        hooks.point("before_unregister")
        while not self._place.leave(connection):
            if time.monotonic() > self._leaves_until:
                logger.warning("jobs whose rows somebody has locked will be rescued")
                return
            time.sleep(_WATCH)

    def _take_place(self, connection: BaseDatabaseWrapper) -> None:
        self._place.take(connection)
        self._notifier.listen(connection)
        self._tick_at = 0.0

    def _turn(self, connection: BaseDatabaseWrapper) -> None:
        try:
            if time.monotonic() >= min(self._tick_at, self._due_at):
                self._manage(connection, partial(self._tick, connection))
            self._manage(connection, partial(self._end_runs, connection))
        except DeclaredDead as error:
            self._proved_at = -float("inf")  # nothing more is begun, or claimed
            logger.error("%s", error)
            self._lose_all(connection, str(error))
            self._place.lose()
            self._take_place(connection)

    def _manage(self, connection: BaseDatabaseWrapper, step: Step) -> None:
        """Do the step, or leave it to the next tick where somebody holds a lock.

        What comes after it must not suffer.
        """
        try:
            step()
        except Error as error:
            if not vendor(connection).is_transient(error):
                raise
            logger.debug("the keeper tries again: %s", error)

    def _pause(self) -> float:
        until = min(self._tick_at, self._due_at) - time.monotonic()
        is_watching = self._watched.held() or self._ended or self._unrecorded
        return max(0.0, min(until, _WATCH) if is_watching else until)

    def _hear(self, said: list[str]) -> None:
        if CLOCK in said:  # something has changed: look at the clock, and at the jobs
            self._tick_at = 0.0
        for queue in filter(self._place.serves, {*said} - {CLOCK}):
            self._watched.look_for_work(queue=queue)

    # What happens with each tick.

    def _tick(self, connection: BaseDatabaseWrapper) -> None:
        at = time.monotonic()
        self._tick_at = at + self._interval
        # Before the look: what is claimed meanwhile must not seem to be an orphan.
        held = self._watched.held()
        tick = self._place.beat(connection, self._notifier.echo())
        self._proved_at = at
        hooks.point("after_beat")
        self._tell_of_work(tick)
        self._note_due(tick, at)
        self._manage(connection, partial(self._look_after_all, connection, tick, at))
        self._manage(connection, partial(self._compare, connection, tick, held))
        self._manage(connection, partial(self._write_progress, held))
        self._advise(held)
        self._manage(connection, self._prune)

    def _tell_of_work(self, tick: Tick) -> None:
        if self._is_away:
            logger.warning("the database is back")
        if tick.has_ready or self._is_away:
            self._watched.look_for_work()
        if tick.has_suspect:
            self._watched.look_for_work(suspects=True)
        self._is_away = False

    def _note_due(self, tick: Tick, at: float) -> None:
        self._due_at = float("inf")
        if tick.next_due is not None and tick.next_due > tick.now:
            self._due_at = at + (tick.next_due - tick.now).total_seconds()

    def _look_after_all(
        self, connection: BaseDatabaseWrapper, tick: Tick, at: float
    ) -> None:
        is_due = tick.next_due is not None and tick.next_due <= tick.now
        if is_due and maintenance.promote(self._place.alias):
            self._watched.look_for_work()
            self._tick_at = 0.0  # it does not know yet when the next one is due
        self._look_after_others(connection, tick, at)
        if not self.has_begun:
            self.has_begun = True
            self._watched.look_for_work()

    def _look_after_others(
        self, connection: BaseDatabaseWrapper, tick: Tick, at: float
    ) -> None:
        found = self._peers.look(tick.others, at, trusts_locks=self._place.has_lock)
        if (found or tick.has_lost) and maintenance.rescue(self._place.alias):
            self._watched.look_for_work(suspects=True)
            # There may be more of them than this worker has room for.
            statements.announce(connection, {CLOCK})

    def _compare(self, connection: BaseDatabaseWrapper, tick: Tick, held: Held) -> None:
        """Compare what the threads run with what the rows say that they run."""
        if not (tick.running or held):
            return
        rows = statements.running(connection, self._place.number)
        for job in held.values():
            if rows.get(job.id) != job.attempt and job.fencing_token not in self._ended:
                self._cancel(connection, job)
        unrecorded = [job.fencing_token for job in self._unrecorded]
        known = {*held, *self._watched.held(), *unrecorded}
        now = time.monotonic()
        # Seen for the time of a tick: the answer to a claim may be on its way.
        self._orphans = {
            claim: self._orphans.get(claim, now)
            for claim in rows.items()
            if claim not in known
        }
        left = dict(
            claim
            for claim, since in self._orphans.items()
            if now - since >= self._interval
        )
        if left and (
            released := claims.release(self._place.alias, self._place.number, left)
        ):
            logger.warning("gave back %s jobs that no thread runs", released)
            self._watched.look_for_work()

    def _write_progress(self, held: Held) -> None:
        controls = {job.id: job.control for job in held.values()}
        reports = {
            number: report
            for number, control in controls.items()
            if (report := control.take_report())
        }
        if not reports:
            return
        try:
            maintenance.write_progress(self._place.alias, reports)
        except Error:
            for number, report in reports.items():
                controls[number].keep_report(report)
            raise

    def _advise(self, held: Held) -> None:
        """Say once for each function that its jobs hold a transaction for long."""
        facts = vendor(connections[self._place.alias])
        for job in held.values():
            began_at = job.control.began_at
            if began_at is None or not job.control.is_atomic:
                continue
            seconds = time.monotonic() - began_at
            if seconds > facts.long_transaction and job.function not in self._told:
                self._told.add(job.function)
                logger.warning(
                    "job %s %s has held a transaction for %.0f s, which keeps %s: let "
                    "it do its work in pieces, or with @job(atomic=False)",
                    job.id,
                    job.function,
                    seconds,
                    facts.harm_of_long_transactions,
                )

    def _prune(self) -> None:
        if time.monotonic() < self._prune_at:
            return
        self._pruned = maintenance.prune(self._place.alias, self._pruned or 0)
        if self._pruned is None:
            maintenance.prune_workers(self._place.alias)
            self._prune_at = time.monotonic() + _PRUNE

    # What ends a run from outside.

    def _end_runs(self, connection: BaseDatabaseWrapper) -> None:
        now = time.monotonic()
        for job in self._running():
            deadline = job.control.deadline
            if deadline is not None and now >= deadline + _COURTESY:
                text = f"job {job.id} has run for longer than {job.control.timeout} s"
                self._end(connection, job, JobTimeout(text))
            if self._end_all_for is not None:
                self._end(connection, job, WorkerStopping(self._end_all_for))
        self._record_ended()
        self._replace_hung()

    def _running(self) -> list[RunningJob]:
        held = list(self._watched.held().values())
        return [job for job in held if not job.control.is_ended]

    def _cancel(self, connection: BaseDatabaseWrapper, job: RunningJob) -> None:
        cause = JobCancelled(f"job {job.id} was cancelled while it ran")
        if job.control.is_atomic:
            self._end(connection, job, cause)
        else:
            # What it does cannot be undone, so it is only asked to stop.
            job.control.cause = cause

    def _lose_all(self, connection: BaseDatabaseWrapper, reason: str) -> None:
        for job in self._running():
            self._end(connection, job, WorkerStopping(reason))
        until = time.monotonic() + _RETURN_FROM_AFAR
        self._ended = {token: (job, until) for token, (job, _) in self._ended.items()}
        self._record_ended()

    def _end(
        self, connection: BaseDatabaseWrapper, job: RunningJob, cause: JobStopped
    ) -> None:
        cause.add_note(job.control.stack())
        if not job.control.stop(cause):
            return
        job.control.interrupt()
        self._ended[job.fencing_token] = (job, time.monotonic() + _RETURN)
        self._unrecorded.append(job)
        if job.control.cut_off is not None:
            job.control.cut_off(connection)

    def _record_ended(self) -> None:
        for job in self._unrecorded.copy():
            if executor.end(job):
                self._unrecorded.remove(job)

    def _replace_hung(self) -> None:
        held = self._watched.held()
        for job, until in list(self._ended.values()):
            if job.fencing_token not in held:
                del self._ended[job.fencing_token]
            elif time.monotonic() > until:
                del self._ended[job.fencing_token]
                self._watched.give_up(job)
