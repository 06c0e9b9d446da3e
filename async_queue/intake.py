"""How many jobs a worker takes, and when it looks for more.

Called by the worker's dispatcher. What it takes fits the threads that are free, with
a few ready behind them while jobs are so short that a claim would cost more.
"""

import math
import time
from collections import deque

from django.db import Error
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue import claims, statements
from async_queue.context import RunningJob
from async_queue.places import Place
from async_queue.statements import Selection

# Jobs claimed for each thread: as many as it does in so many seconds, within bounds.
_AHEAD = 0.05
_PREFETCH = 32
# Where jobs exclude each other: what waits behind a long one is not given back.
_IN_LINE = 32
_REMEMBERED = 32  # of the latest runs
# Seconds in which no job ends or comes, and those that wait for a thread are others'.
_STUCK = 1.0
# Seconds of work without a pause after which nobody need wake this worker.
_BUSY = 1.0
# Word of single jobs that comes more often than so many times in so many seconds holds
# up whoever schedules: the worker then looks by itself, after naps of so many seconds.
_BRISK, _BRISK_SECONDS, _NAP = 16, 0.1, 0.005
# Whoever schedules asks whether word is wanted before he commits: so many seconds later
# a worker that has just said so looks once more.
_LATE = 0.1


class Intake:
    """The jobs that the worker of `place` takes next.

    ``left`` is how many more it may take, if that is bounded. It ``is_dry`` when there
    was not as much as there was room for.
    """

    def __init__(
        self,
        place: Place,
        selection: Selection,
        threads: int,
        *,
        left: int | None,
        runs_one_at_a_time: bool,
        wants_word: bool,
    ) -> None:
        self.selection = selection
        self.left = left
        self.is_dry = False
        self.may_have_suspects = True
        self._place = place
        self._claimer = claims.Claimer(place.alias)
        self._lanes = self._least = threads
        if runs_one_at_a_time:  # one runs, one stands ready behind it
            self._lanes, self._least = 1, min(threads, 2)
        self._most = _IN_LINE if runs_one_at_a_time else threads * _PREFETCH
        self._may_wait = left is not None or runs_one_at_a_time
        self._moved_at = time.monotonic()
        self._wants_word = wants_word
        # The queues of which word came while all were empty.
        self._told: set[str] = set()
        # When it last found some jobs, but no more; and when it looks without word.
        self._found: deque[float] = deque(maxlen=_BRISK)
        self._look_at = math.inf
        self._naps = False
        self._wanted_by: int | None = None
        self._short_at = time.monotonic()
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)

    def note_run(self, seconds: float) -> None:
        """Remember how long a job has taken."""
        self._recent.append(seconds)
        self._moved_at = time.monotonic()

    def hear(self, queue: str = "", *, suspects: bool = False) -> None:
        """Take note of word that there may be jobs; also from another thread."""
        if suspects:
            self.may_have_suspects = True
        if self.is_dry and queue:
            self._told.add(queue)

    def patience(self, most: float) -> float:
        """Return for how many seconds to wait for word, at most."""
        return max(0.0, min(most, self._look_at - time.monotonic()))

    def wake(self) -> None:
        """Look again: there was word, or it is time."""
        self.is_dry = False
        if self.is_rested():
            self._look_at = math.inf

    def is_rested(self) -> bool:
        """Tell whether it is time to look without word."""
        return time.monotonic() >= self._look_at

    def is_stuck(self, in_flight: int) -> bool:
        """Tell whether jobs wait behind others that prove long; so none seems short."""
        if self._may_wait or in_flight <= self._lanes:
            return False
        if time.monotonic() - self._moved_at < _STUCK:
            return False
        self.note_run(_STUCK)
        return True

    def few(self) -> int:
        """Return with how many jobs in flight, at most, there is room for more."""
        most = self._most_in_flight()
        # While no thread idles it can wait: many at once cost hardly more than one.
        return max(self._lanes - 1, most - max(1, most // 2))

    def room(self, in_flight: int) -> int:
        """Return how many jobs to claim while so many are in flight."""
        if in_flight > self.few():
            return 0
        room = self._most_in_flight() - in_flight
        return room if self.left is None else min(room, self.left)

    def _most_in_flight(self) -> int:
        """Return how many jobs to hold: enough for a moment, while they are short."""
        taken = sum(self._recent)
        if not taken:
            return self._most if self._recent else self._least
        ahead = int(_AHEAD * len(self._recent) / taken)
        return min(self._most, max(self._least, self._lanes * ahead))

    def claim(self, connection: BaseDatabaseWrapper, room: int) -> list[RunningJob]:
        """Take up to ``room`` jobs."""
        if jobs := self._claim_told(room):
            self._found.append(time.monotonic())
            return jobs  # there may be more: the next claim looks everywhere
        jobs = self._taken(
            self._claimer.claim(self._place.number, room, self.selection)
        )
        try:
            if len(jobs) == room:
                self._note_full(connection)
            else:
                self._note_short(connection, bool(jobs))
        except Error:
            if not jobs:
                raise
            # They are the worker's now; it says the next time what it wants.
        return jobs

    def _claim_told(self, room: int) -> list[RunningJob]:
        """Take what word has come of: one need not ask first which queues have jobs."""
        told, self._told = self._told, set()
        # Of several, one has to be asked which comes first; of names, they tell.
        if len(told) != 1 or claims.are_names(self.selection.queues):
            return []
        selection, place = self.selection._replace(queues=(*told,)), self._place
        return self._taken(claims.claim(place.alias, place.number, room, selection))

    def claim_suspect(self) -> list[RunningJob]:
        """Take a job that may kill its process, if there is one."""
        selection = self.selection._replace(suspect=True)
        place = self._place
        jobs = self._taken(claims.claim(place.alias, place.number, 1, selection))
        self.may_have_suspects = bool(jobs)
        return jobs

    def _taken(self, jobs: list[RunningJob]) -> list[RunningJob]:
        if jobs:
            self._moved_at = time.monotonic()
        if self.left is not None:
            self.left -= len(jobs)
        return jobs

    def _note_full(self, connection: BaseDatabaseWrapper) -> None:
        is_busy = time.monotonic() - self._short_at > _BUSY
        if is_busy and self._wanted_by == self._place.number:
            self._tell(connection, False)

    def _note_short(self, connection: BaseDatabaseWrapper, has_found: bool) -> None:
        self._short_at = now = time.monotonic()
        if has_found:
            self._found.append(now)
        hears = self._wants_word and not self._place.is_pooled
        if hears and self._is_brisk(now, has_found):
            if self._wanted_by == self._place.number:
                self._tell(connection, False)
            self._naps, self._look_at = True, now + _NAP
        elif hears and self._wanted_by != self._place.number:
            # Then it looks again: nobody has told of what came meanwhile.
            self._naps, self._look_at = False, now + _LATE
            self._tell(connection, True)
            return
        self.is_dry = True

    def _is_brisk(self, now: float, has_found: bool) -> bool:
        if self._naps and has_found:
            return True
        return len(self._found) == _BRISK and now - self._found[0] < _BRISK_SECONDS

    def _tell(self, connection: BaseDatabaseWrapper, wanted: bool) -> None:
        number = self._place.number
        self._wanted_by = None  # as long as nobody knows
        statements.want_wakeup(connection, number, wanted)
        self._wanted_by = number if wanted else None
