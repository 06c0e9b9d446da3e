"""The job that is running here, as a value; the executor sets it, anybody may ask."""

import ctypes
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from async_queue.exceptions import InsideTransaction, JobStopped, JobTimeout

_raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc


class Report(NamedTuple):
    """How far a job says it is: ``done`` of ``total`` steps, and a word on it."""

    done: int
    total: int | None = None
    note: str = ""


def _is_not_followed(has_begun: bool) -> bool:
    return False


class Control:
    """What passes between a run, its thread and the keeper that watches over it."""

    def __init__(self) -> None:
        # Moments by the monotonic clock: when the function was called, and when it
        # has run for too long.
        self.began_at: float | None = None
        self.deadline: float | None = None
        self.timeout: float | None = None  # in seconds
        self.is_atomic = True
        # The place among the worker's threads.
        self.slot = 0
        # Tells whether the thread is about to run another job like this one, which has
        # begun a transaction or not.
        self.is_followed: Callable[[bool], bool] = _is_not_followed
        # Why the run is over, for whoever asks; and whether it was ended from outside,
        # so that its thread has nothing to record any more.
        self.cause: JobStopped | None = None
        self.is_ended = False
        # Takes away what the run needs to commit; given a connection of the caller's.
        self.cut_off: Callable[[Any], object] | None = None
        self._report: Report | None = None
        self._thread: int | None = None  # while it is in user code
        self._is_sent = False
        self._lock = threading.Lock()

    @property
    def is_in_call(self) -> bool:
        """Whether the function is being called, and has not returned yet."""
        return self._thread is not None

    def stop(self, cause: JobStopped) -> bool:
        """End the run for ``cause``; False if its function is not being called."""
        with self._lock:
            if self.is_ended or self._thread is None:
                return False
            self.cause, self.is_ended = cause, True
        return True

    def prevent(self, cause: JobStopped) -> bool:
        """Let the function not be called any more; False if it has been."""
        with self._lock:
            if self.began_at is not None:
                return False
            self.cause, self.is_ended = cause, True
        return True

    def stack(self) -> str:
        """Return where the function is, as a traceback would show it."""
        thread = self._thread
        frame = None if thread is None else sys._current_frames().get(thread)
        return "".join(traceback.format_stack(frame)) if frame else ""

    def interrupt(self) -> bool:
        """Raise the cause in the run's thread, once, and only in user code."""
        with self._lock:
            if not self.is_ended or self._thread is None or self._is_sent:
                return False
            self._is_sent = True
            kind = ctypes.py_object(type(self.cause))
            return bool(_raise_in_thread(ctypes.c_ulong(self._thread), kind))

    def check(self) -> None:
        """Raise what ended the run; or JobTimeout, if it is too long."""
        if self.cause is not None:
            raise self.cause
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise JobTimeout("the job has run for longer than its timeout")

    def call(self, function: Callable[[], Any]) -> Any:
        """Return what ``function`` returns; `interrupt` raises in it and only there."""
        with self._lock:
            self.check()
            self.began_at = time.monotonic()
        if self.timeout is not None:
            self.deadline = self.began_at + self.timeout
        self._thread, process = threading.get_ident(), os.getpid()
        try:
            return function()
        finally:
            if os.getpid() != process:
                _end_child()
            self._leave()

    def report(self, report: Report) -> None:
        """Take note of how far the job is; the keeper writes it."""
        self._report = report

    def take_report(self) -> Report | None:
        """Return the latest report, once."""
        report, self._report = self._report, None
        return report

    def keep_report(self, report: Report) -> None:
        """Keep a report that could not be written, if there is no later one."""
        self._report = self._report or report

    def _leave(self) -> None:
        while True:
            try:
                with self._lock:
                    thread, self._thread = self._thread, None
                if thread is not None and self._is_sent:
                    _absorb(thread)
                return
            # Delivered at the last moment: here, where it has no meaning any more.
            except JobStopped:
                continue


def _absorb(thread: int) -> None:
    """Raise what was sent to this thread, which would else come in our own code.

    It may have come before. To take it back would not do: until the next one is
    delivered, Python 3.11 then stands still wherever code is traced, as for coverage.
    """
    if _raise_in_thread(ctypes.c_ulong(thread), ctypes.py_object(JobStopped)):
        while True:
            pass


# Never changed, but not frozen: to make one that is takes five times as long.
@dataclass(slots=True, unsafe_hash=True)
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
    control: Control = field(default_factory=Control, repr=False, compare=False)

    @property
    def deadline(self) -> float | None:
        """The moment by `time.monotonic()` at which it has run for its ``timeout``."""
        return self.control.deadline

    @property
    def fencing_token(self) -> tuple[int, int]:
        """The job's id and the number of this attempt, which only grows.

        A key by which another system can tell a repeated call, and refuse a late one.
        """
        return self.id, self.attempt

    def check_cancelled(self) -> None:
        """Raise JobTimeout or JobCancelled if this run is over; costs no query.

        It learns of a cancel, or of a shutdown that waits no longer, when its worker
        does: within ASYNC_QUEUE["POLL_INTERVAL"].
        """
        self.control.check()

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        """Let others see how far this job is, although its effects are not committed.

        The worker writes the latest within ASYNC_QUEUE["POLL_INTERVAL"], outside of
        the job's transaction; see ``Job.progress``. Costs no query. Raises ValueError
        for numbers that are negative.
        """
        self.control.report(_checked_report(done, total, note))

    @property
    def priority(self) -> int:
        """From -100 to 100; higher ones run first."""
        return -self.rank


def _end_child() -> None:
    """End a process that the job has forked, which is not to record its outcome."""
    code = 0
    if sys.exc_info()[0] is not None:
        traceback.print_exc()
        code = 1
    os._exit(code)


def _checked_report(done: int, total: int | None, note: str) -> Report:
    for number in (done, total):
        if number is not None and (type(number) is not int or not 0 <= number < 2**63):
            raise ValueError(f"progress is {number!r}: pass whole numbers from 0")
    return Report(done, total, note)


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


def running(job: RunningJob) -> AbstractContextManager[None]:
    """Make ``job`` the current one of this thread's context, inside of a block."""
    return _Running(job)


# A class, as a generator takes thrice the time, and each job pays for it.
class _Running(AbstractContextManager[None]):
    def __init__(self, job: RunningJob) -> None:
        self._job = job

    def __enter__(self) -> None:
        self._token = _current.set(self._job)

    def __exit__(self, *error: object) -> None:
        _current.reset(self._token)


# How Job.execute() reaches the executor, which stands above the models: it fills
# this in when it is imported.
execute_here: Callable[[Any], Any]
