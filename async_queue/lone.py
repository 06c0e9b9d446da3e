"""A job that may kill its process, run in one where nobody else is hurt.

`execute_alone` is called in a thread of a worker, which waits there; `main` is the
other process.
"""

import logging
import os
import signal
import subprocess

from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from async_queue import codec, executor, outcomes, processes, statements
from async_queue.context import RunningJob
from async_queue.db import end_ahead
from async_queue.exceptions import JobStopped, WorkerCrashed
from async_queue.models import Job, Status
from async_queue.outcomes import Outcome

logger = logging.getLogger("async_queue")

# Seconds in which a process starts, beside the timeout of its job.
_START = 10.0
# The place of its session among those of the worker, whose threads count from 1.
_SLOT = 0
_ACTIONS = {
    Status.SUCCESSFUL: "succeed",
    Status.FAILED: "fail",
    Status.WAITING: "retry",
}


def execute_alone(job: RunningJob) -> Outcome:
    """Run a claimed job in a process of its own; return its outcome, as recorded."""
    job.control.timeout = _timeout(job)
    # That may be for long.
    end_ahead(connections[job.alias])
    try:
        process = processes.start(
            "async_queue.lone:main",
            *map(str, (job.alias, job.worker, job.id, job.attempt)),
        )
    except ImproperlyConfigured as error:
        logger.warning("job %s runs beside others: %s", job.id, error)
        return executor.execute(job)
    job.control.cut_off = lambda own: process.kill()
    try:
        code = job.control.call(process.wait)
    except JobStopped as cause:
        return Outcome("lose", cause)
    finally:
        _close(process)
    return _outcome(job, code)


def main(alias: str, worker: str, number: str, attempt: str) -> None:
    """Run the job that this worker has claimed, in this process."""
    # Its claim is the worker's, and is over when that one has died.
    processes.when_orphaned(lambda: os._exit(1))
    job = statements.held_job(
        connections[alias], int(worker), int(number), int(attempt)
    )
    if job is not None:
        job.control.slot = _SLOT
        executor.execute(job)


def _timeout(job: RunningJob) -> float | None:
    try:
        timeout = outcomes.policy_of(job, codec.decode(job.meta)).timeout
    # Its seal was not looked at yet: whatever is wrong, the other process will say so.
    except Exception:
        return None
    return None if timeout is None else timeout.total_seconds() + _START


def _close(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _outcome(job: RunningJob, code: int) -> Outcome:
    rows = Job.objects.using(job.alias)
    connections[job.alias].close_if_unusable_or_obsolete()
    if rows.held(job).exists():
        error = WorkerCrashed(
            f"job {job.id} ran alone in a process, which {_how(code)}"
        )
        return executor.settle(job, error)
    status = rows.filter(pk=job.id).values_list("status", flat=True).first()
    return Outcome(_ACTIONS.get(Status(status), "lose") if status else "lose")


def _how(code: int) -> str:
    if code >= 0:
        return f"exited with {code} before the job had an outcome"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
