"""Recording, many at a time, the successes of jobs that have written nothing.

Called by the threads of a worker. Their transactions are empty, so nothing has to
commit with the record of them: see "Jobs that write nothing" in ``docs/guarantee.rst``.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock

from django.db import connections

from async_queue import executor
from async_queue.db import awake
from async_queue.executor import Unrecorded
from async_queue.outcomes import Finished, Outcome

logger = logging.getLogger("async_queue")

# Jobs, for each thread, that are not recorded yet; and how few once whoever records
# has taken longer than so many seconds: see decisions 16 and 18.
_MOST, _FEW = 16, 4
_COMMIT = 0.01
# Seconds to wait for whoever records, when too many are open.
_PATIENCE = 1.0
# Times that one thread goes on recording others while a locked row is left to it.
_ROUNDS = 2


class Recorder:
    """What ``threads`` threads have not recorded yet, a few jobs each.

    Those are all that a kill lets run again. ``note_end`` is called with each job once
    it has its outcome, by whichever thread has recorded it.
    """

    def __init__(
        self, alias: str, threads: int, note_end: Callable[[Finished], None]
    ) -> None:
        self._alias = alias
        self._threads = threads
        self._note_end = note_end
        self._lock = Lock()
        self._open: deque[Unrecorded] = deque()
        self._writing = 0
        self._began_at = 0.0

    def put(self, unrecorded: Unrecorded) -> None:
        """Record it, or leave it to a thread that is just recording others."""
        self._open.append(unrecorded)
        # Whoever records looks again when it is done, so nothing is left behind.
        while left := self._record_open(unrecorded):
            # Somebody may have locked their rows: nobody else is to wait for that.
            for run in left:
                self._end(run, executor.record, Outcome("lose"))

    def _record_open(self, own: Unrecorded) -> list[Unrecorded]:
        """Record while there are any, or some are left; return those."""
        left: list[Unrecorded] = []
        rounds = 0
        while self._open and rounds < _ROUNDS and self._acquire(own):
            left += self._record_all(own.job.control.slot)
            rounds += bool(left)
        return left

    def _acquire(self, own: Unrecorded) -> bool:
        """Take the right to record; wait for it only if too many are open."""
        are_many = self._are_many()
        if self._lock.acquire(timeout=_PATIENCE if are_many else 0):
            return True
        if are_many:
            # Whoever records hangs. Somebody may just take this one, too.
            with suppress(ValueError, IndexError):
                self._open.remove(own)
                self._end(own, executor.record, Outcome("lose"))
        return False

    def _are_many(self) -> bool:
        each = (len(self._open) + self._writing) / self._threads
        is_late = each > _FEW and time.monotonic() - self._began_at > _COMMIT
        return is_late or each > _MOST

    def _record_all(self, slot: int) -> list[Unrecorded]:
        """Record what is open now; return what has to be recorded by itself."""
        batch: list[Unrecorded] = []
        with suppress(IndexError):  # one whose thread waited no longer may have gone
            for _ in range(len(self._open)):
                batch.append(self._open.popleft())
        self._writing, self._began_at = len(batch), time.monotonic()
        try:
            recorded = self._write(batch, slot)
        finally:
            self._writing = 0
            self._lock.release()
        # Others need not wait for receivers.
        for run in batch:
            if run.job.fencing_token in recorded:
                self._end(run, executor.announce_success, Outcome("succeed"))
        return [run for run in batch if run.job.fencing_token not in recorded]

    def _write(self, batch: Sequence[Unrecorded], slot: int) -> set[tuple[int, int]]:
        if not batch:
            return set()
        try:
            with awake(self._alias, batch[0].job.worker, slot) as connection:
                return executor.record_many(connection, batch)
        except BaseException:  # whatever it is, each is still to be recorded
            logger.debug("successes are recorded one by one", exc_info=True)
            connections[self._alias].close_if_unusable_or_obsolete()
            return set()

    def _end(
        self, run: Unrecorded, end: Callable[[Unrecorded], Outcome], otherwise: Outcome
    ) -> None:
        """End a run in its job's context, whatever somebody's receivers raise."""
        outcome = otherwise
        try:
            outcome = run.context.run(end, run)
        except BaseException:  # the runs of others must end, too
            with suppress(Exception):
                logger.exception("job %s: its end cannot be announced", run.job.id)
        self._note_end(Finished(run.job, outcome, run.seconds))
