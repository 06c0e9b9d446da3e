"""What becomes of a job that did not succeed: decided here, and recorded.

An outcome is a value. It is written under the same condition as a success: that the
claim still stands.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.db import connections
from django.db.models import F, Min
from django.db.models.functions import Least

from async_queue import callables, codec, conf, hooks, retries
from async_queue.context import RunningJob
from async_queue.db import Now, vendor
from async_queue.exceptions import (
    Cancel,
    JobCancelled,
    JobExpired,
    JobTimeout,
    NotYetRunnable,
    Retry,
    RowRefused,
    Snooze,
    WorkerCrashed,
    WorkerStopping,
)
from async_queue.models import LOWEST, Attempt, Job, Status
from async_queue.retries import Policy
from async_queue.tracebacks import describe

logger = logging.getLogger("async_queue")

# A job that no process can run for so long is FAILED.
_PATIENCE = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run: an action of TRANSITIONS, or "lose" if nothing did.

    ``error`` is what was raised, ``delay`` how long the job waits to be run again,
    ``is_charged`` tells whether it used up an attempt, and ``loses_priority`` whether
    it falls back behind others.
    """

    action: str
    error: BaseException | None = None
    delay: timedelta = timedelta(0)
    is_charged: bool = False
    loses_priority: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """A job that has run, what came of it, and how many seconds it took."""

    job: RunningJob
    outcome: Outcome
    seconds: float

    @property
    def is_failure(self) -> bool:
        """Whether the job raised what it should not, or will never succeed."""
        action, error = self.outcome.action, self.outcome.error
        if action == "retry":
            return not isinstance(error, Retry)
        return action in ("fail", "crash") or isinstance(error, JobTimeout)


def decide(job: RunningJob, error: BaseException) -> Outcome:
    """Return what is to become of a job that raised ``error``."""
    if isinstance(error, WorkerStopping) or _is_interrupt(error):
        return Outcome("release", error)
    if isinstance(error, Snooze):
        return Outcome("snooze", error, _asked_delay(error) or timedelta(0))
    if isinstance(error, NotYetRunnable) or is_transient(job, error):
        return _put_off(job, error)
    if isinstance(error, (Cancel, JobCancelled, JobExpired)):
        return Outcome("cancel", error)
    if isinstance(error, RowRefused):
        return Outcome("fail", error, is_charged=True)
    if isinstance(error, WorkerCrashed):
        return Outcome("fail" if _is_last_crash(job) else "crash", error)
    return _decide_by_policy(job, error, policy_of(job, codec.decode(job.meta)))


def _decide_by_policy(job: RunningJob, error: BaseException, policy: Policy) -> Outcome:
    if retries.is_named(error, policy.discard_on):
        return Outcome("cancel", error)
    failures = job.failures + 1
    is_last = policy.max_attempts is not None and failures >= policy.max_attempts
    is_final = policy.retry_on and not retries.is_named(error, policy.retry_on)
    if is_last or (is_final and not isinstance(error, Retry)):
        return Outcome("fail", error, is_charged=True)
    delay = _asked_delay(error) if isinstance(error, Retry) else None
    if delay is None:
        delay = _backed_off(job, policy, failures)
    falls = policy.backoff == retries.FALLING_PRIORITY
    return Outcome("retry", error, delay, is_charged=True, loses_priority=falls)


def _asked_delay(error: Retry | Snooze) -> timedelta | None:
    # Of a subclass, whose delay may be anything.
    return error.delay if isinstance(error.delay, timedelta) else None


def _is_last_crash(job: RunningJob) -> bool:
    row = Job.objects.using(job.alias).filter(pk=job.id)
    return row.filter(crashes__gte=conf.settings().max_crashes - 1).exists()


def is_transient(job: RunningJob, error: BaseException) -> bool:
    """Tell whether the database rolled the job back and may take it the next time.

    It did so, too, where it ended the session, and where it could not be reached.
    """
    connection = connections[job.alias]
    facts = vendor(connection)
    return facts.is_transient(error) or any(
        facts.is_session_lost(connection, cause) for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and those that it came of."""
    seen = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _put_off(job: RunningJob, error: BaseException) -> Outcome:
    """Leave the job, uncharged, for newer code or keys or quieter times, for a day."""
    earlier = Attempt.objects.using(job.alias).filter(
        job_id=job.id, exception=describe(error).exception
    )
    since = earlier.aggregate(since=Min("finished_at"))["since"]
    if since is not None and job.claimed_at - since > _PATIENCE:
        return Outcome("fail", error, is_charged=True)
    return Outcome("snooze", error, retries.deferral(earlier.count()))


def _backed_off(job: RunningJob, policy: Policy, failures: int) -> timedelta:
    try:
        return retries.backoff(policy.backoff)(failures)
    except Exception:  # somebody's function; the job must not suffer for it
        logger.exception(
            "job %s: its backoff %r raised; the exponential one is used",
            job.id,
            policy.backoff,
        )
        return retries.exponential(failures)


def policy_of(job: RunningJob, meta: Mapping[str, Any]) -> Policy:
    """Return how the job is tried: by the settings, its ``@job`` and its ``meta``."""
    registration = callables.registry.get(job.function)
    return retries.policy(registration.meta if registration else {}, meta)


def record(job: RunningJob, outcome: Outcome, *, in_ascii: bool = False) -> bool:
    """Write the outcome if the claim still stands; tell whether it did."""
    hooks.point("before_record")
    changes: dict[str, Any] = {"failures": F("failures") + int(outcome.is_charged)}
    if isinstance(outcome.error, WorkerCrashed):
        changes["crashes"] = F("crashes") + 1
    elif outcome.action != "release":
        # It came back to tell, so it kills no process.
        changes["suspect"] = False
    if outcome.action in ("retry", "snooze"):
        changes["run_after"] = Now(after=outcome.delay)
    if outcome.loses_priority:
        changes["rank"] = Least(F("rank") + 1, -LOWEST)
    if not Job.objects.using(job.alias).held(job).transition(outcome.action, **changes):
        return False
    error = outcome.error
    if error is None or outcome.action == "release" or isinstance(error, Snooze):
        return True
    Attempt.objects.using(job.alias).create(
        job_id=job.id,
        number=job.attempt,
        worker_id=job.worker or None,
        started_at=job.claimed_at,
        finished_at=Now(),
        **describe(error, in_ascii=in_ascii)._asdict(),
    )
    hooks.point("after_record")
    return True


def is_locked(job: RunningJob) -> bool:
    """Tell whether somebody has locked the job's row; if not, this transaction does."""
    row = Job.objects.using(job.alias).filter(pk=job.id)
    return not row.unlocked().values_list("pk") and row.exists()


def found_out(job: RunningJob, error: BaseException) -> Outcome:
    """Return what had become of a job whose claim no longer stands."""
    if has_succeeded(job):
        logger.warning(
            "job %s: the answer to its commit was lost; it has succeeded", job.id
        )
        return Outcome("succeed")
    return Outcome("lose", error)


def has_succeeded(job: RunningJob) -> bool:
    """Tell whether the job has become SUCCESSFUL by this attempt."""
    row = Job.objects.using(job.alias).filter(pk=job.id, attempt=job.attempt)
    return row.filter(status=Status.SUCCESSFUL).exists()


def _is_interrupt(error: BaseException) -> bool:
    """Tell whether it is Ctrl-C, where jobs run in the main thread."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and isinstance(error, KeyboardInterrupt)
