"""What the queue announces, and the log lines that come of it.

Receivers run in a thread of jobs and in the job's context, outside of its transaction;
what they raise is logged by Django and changes nothing.
"""

import logging
from typing import Any

from django.dispatch import Signal

from async_queue.exceptions import NotYetRunnable

logger = logging.getLogger("async_queue")

# Sent with job (a RunningJob): its function is about to be called.
job_started = Signal()
# Sent with job (a RunningJob), outcome (an Outcome) and seconds (the run's length).
job_finished = Signal()

_LINES = {
    "succeed": (logging.DEBUG, "job %s %s succeeded in %.3f s"),
    "retry": (logging.WARNING, "job %s %s raised after %.3f s, will be tried again"),
    "snooze": (logging.INFO, "job %s %s was put off after %.3f s"),
    "cancel": (logging.INFO, "job %s %s was cancelled after %.3f s"),
    "fail": (logging.ERROR, "job %s %s failed for good after %.3f s"),
    "crash": (logging.ERROR, "job %s %s took its process with it after %.3f s"),
    "release": (logging.INFO, "job %s %s was given back after %.3f s"),
    "lose": (
        logging.WARNING,
        "job %s %s lost its claim after %.3f s",
    ),
}

_WITH_TRACEBACK = ("retry", "fail", "crash", "lose")


def are_silent() -> bool:
    """Tell whether nobody hears of a job that succeeds, or of one that starts."""
    has_line = logger.isEnabledFor(_LINES["succeed"][0])
    return not (job_started.receivers or job_finished.receivers or has_line)


def log_outcome(job: Any, outcome: Any, seconds: float) -> None:
    """Write one line for each run: the louder, the more somebody should look."""
    level, line = _LINES[outcome.action]
    if level == logging.DEBUG and not logger.isEnabledFor(level):
        return  # at once: of all there are, these are by far the most
    # Of a refused row the function may be any text.
    name = job.function if str(job.function).isprintable() else ascii(job.function)
    shown = [job.id, name, seconds]
    if isinstance(outcome.error, NotYetRunnable):
        level, line = logging.WARNING, f"{line}: %s"
        shown.append(outcome.error)
    if logger.isEnabledFor(level):
        fields = {"job": job.id, "queue": job.queue, "attempt": job.attempt}
        error = outcome.error if outcome.action in _WITH_TRACEBACK else None
        logger.log(level, line, *shown, exc_info=error, extra=fields)
