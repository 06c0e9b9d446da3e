"""The jobs that a worker has in flight, and the word of those that have ended.

Its dispatcher fills and empties this; the threads of jobs, its keeper and handlers of
signals leave word here. Most that ends is worth no word: whoever is woken has to be
let in by Python, and is in the way of the jobs.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue

from async_queue.context import RunningJob
from async_queue.outcomes import Finished


class Flight:
    """What was claimed and has no outcome yet.

    With ``few`` jobs left in it, or fewer, the dispatcher is woken by each that ends.
    """

    def __init__(self, few: int) -> None:
        self.few = few
        # By id and attempt: one that is not over yet may have been claimed again.
        self._jobs: dict[tuple[int, int], RunningJob] = {}
        # What has ended, and, with None, what was not begun.
        self._ended: deque[tuple[RunningJob, Finished | None]] = deque()
        # Words that there is something to do; True, if it may be to claim. A signal's
        # handler may put one here because a SimpleQueue is reentrant.
        self._words: SimpleQueue[bool] = SimpleQueue()

    def __len__(self) -> int:
        return len(self._jobs)

    def jobs(self) -> dict[tuple[int, int], RunningJob]:
        """Return those that threads run or are about to, by id and attempt."""
        return self._jobs.copy()

    def add(self, job: RunningJob) -> None:
        """Have a job in flight; only the dispatcher does so."""
        self._jobs[job.fencing_token] = job

    def remove(self, job: RunningJob) -> None:
        """Have a job in flight no more that no thread has begun."""
        self._jobs.pop(job.fencing_token, None)

    def look(self) -> None:
        """Wake the dispatcher: there may be something to claim."""
        self._words.put(True)

    def end(
        self, job: RunningJob, finished: Finished | None, *, is_urgent: bool = True
    ) -> None:
        """Keep what has ended, or was not begun, until the dispatcher sees to it."""
        self._ended.append((job, finished))
        if is_urgent or len(self._jobs) - len(self._ended) <= self.few:
            self._words.put(False)

    def wait(self, seconds: float) -> bool:
        """Wait for a word so long; tell whether there may be something to claim."""
        may_claim = False
        with suppress(Empty):
            may_claim = self._words.get(timeout=seconds)
            while True:
                may_claim = self._words.get_nowait() or may_claim
        return may_claim

    def ended(self) -> Iterator[tuple[RunningJob, Finished | None]]:
        """Yield what was ended, once, and have it in flight no more."""
        while self._ended:
            job, finished = self._ended.popleft()
            # It may have been given up before.
            if self._jobs.pop(job.fencing_token, None) is not None:
                yield job, finished
