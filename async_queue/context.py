"""The job that is running here, as a value; the executor sets it, anybody may ask."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from async_queue.exceptions import InsideTransaction


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A claimed job: the columns of its row that a run needs, as they were read.

    ``args``, ``kwargs`` and ``meta`` are the stored text. ``attempt`` is the fencing
    number of this claim. ``claimed_at`` and ``run_after`` are the database's time.
    """

    alias: str
    worker: int
    id: int
    function: str
    args: str = field(repr=False)  # may hold secrets
    kwargs: str = field(repr=False)
    meta: str
    seal: str = field(repr=False)
    queue: str
    rank: int
    run_after: datetime
    enqueued_at: datetime
    attempt: int
    failures: int
    claimed_at: datetime

    @property
    def priority(self) -> int:
        """From -100 to 100; higher ones run first."""
        return -self.rank


_current: ContextVar[RunningJob | None] = ContextVar("async_queue_job", default=None)


def current_job() -> RunningJob | None:
    """Return the job that is calling, or None outside of jobs."""
    return _current.get()


def refuse_inside_job() -> None:
    """Raise InsideTransaction if a job is calling: one cannot run others."""
    if job := _current.get():
        raise InsideTransaction(
            f"job {job.id} cannot run other jobs inside of its own run: schedule() them"
        )


@contextmanager
def running(job: RunningJob) -> Iterator[None]:
    """Make ``job`` the current one of this thread's context."""
    token = _current.set(job)
    try:
        yield
    finally:
        _current.reset(token)


# How Job.execute() reaches the executor, which stands above the models: it fills
# this in when it is imported.
execute_here: Callable[[Any], Any]
