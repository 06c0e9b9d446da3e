"""Every error of the queue, one tree; everybody may raise and catch them."""

from datetime import timedelta


class AsyncQueueError(Exception):
    """The root of all errors of async_queue."""


# Said at once to whoever schedules.


class InvalidJob(AsyncQueueError, ValueError):
    """What was to be scheduled cannot be a job; the message names what and why."""


class InvalidFunction(InvalidJob):
    """The function cannot be found again by a worker."""


class InvalidArguments(InvalidJob):
    """The arguments are not JSON, too large, or not what the function takes."""


class InvalidOption(InvalidJob):
    """An option (queue, priority, run_after, meta ...) has no such value."""


class InsideTransaction(AsyncQueueError):
    """Jobs cannot be run inside a transaction of the caller's."""


class NotExecutable(AsyncQueueError):
    """The job is running elsewhere or is finished, so it cannot be executed now."""


# Raised by a job to steer what happens to it; its effects are rolled back.


class Retry(AsyncQueueError):
    """Try this job again, after ``delay`` (its backoff if None); uses up an attempt."""

    delay: timedelta | None = None

    def __init__(self, reason: str = "", *, delay: timedelta | float | None = None):
        super().__init__(reason)
        self.delay = _as_timedelta(delay)


class Snooze(AsyncQueueError):
    """Run this job again after ``delay``; this run does not count."""

    delay: timedelta | None = None

    def __init__(self, delay: timedelta | float, reason: str = ""):
        super().__init__(reason)
        self.delay = _as_timedelta(delay)


class Cancel(AsyncQueueError):
    """Cancel this job, for ``reason``."""


# What a row may turn out to be when a worker reads it.


class RowRefused(AsyncQueueError):
    """The row is not what async_queue wrote; nothing that it names was imported."""


class SealBroken(RowRefused):
    """The seal does not belong to this function and these arguments."""


class CorruptArguments(RowRefused):
    """The arguments in the row cannot be read."""


class NotYetRunnable(AsyncQueueError):
    """This process cannot run the job, but one with newer code or keys may."""


class UnknownSealKey(NotYetRunnable):
    """The row was sealed with a key that this process does not have (yet)."""


class FunctionUnavailable(NotYetRunnable):
    """The function cannot be imported by this process (any more, or yet)."""


# What may happen to a run.


class ClaimLost(AsyncQueueError):
    """The job was cancelled or given to another worker; its effects are rolled back."""


class TransactionBroken(AsyncQueueError):
    """The job left its transaction unable to commit; its effects are rolled back."""


class StatementRefused(AsyncQueueError):
    """The statement would have ended the job's transaction; it was not sent."""


class JobExpired(AsyncQueueError):
    """The job was not started within its ``expires_after``."""


class WorkerLost(AsyncQueueError):
    """The worker that ran the job has died; the job runs again, uncharged."""


class WorkerCrashed(AsyncQueueError):
    """The job has taken down processes in which it ran alone, again and again."""


class JobStopped(BaseException):
    """The run of this job is over: whatever it does from here on will not commit.

    Raised inside of a job's function, where ``except Exception`` shall not catch it.
    """


class JobTimeout(JobStopped):
    """The job has run for longer than its ``timeout``."""


class JobCancelled(JobStopped):
    """Somebody cancelled the job while it ran, or its worker has lost it."""


class WorkerStopping(JobStopped):
    """The worker shuts down and waits no longer; the job runs again, uncharged."""


def _as_timedelta(delay: timedelta | float | None) -> timedelta | None:
    if isinstance(delay, (int, float)):
        delay = timedelta(seconds=delay)
    if delay is not None and not isinstance(delay, timedelta):
        raise TypeError(f"delay is {delay!r}: pass a timedelta or seconds")
    if delay is not None and delay < timedelta(0):
        raise ValueError(f"delay is {delay!r}: it must not be negative")
    return delay
