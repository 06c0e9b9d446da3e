"""One run of a claimed job: resolve, run, decide, record, announce.

Workers call `execute` in a thread of their pool; `Job.execute()` is `execute_here`.
"""

import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from contextvars import Context, copy_context
from functools import lru_cache, partial
from inspect import iscoroutinefunction
from typing import Any, NamedTuple

from asgiref.sync import async_to_sync
from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.transaction import atomic

from async_queue import (
    callables,
    codec,
    conf,
    context,
    hooks,
    outcomes,
    retries,
    statements,
)
from async_queue.context import RunningJob
from async_queue.db import awake, vendor
from async_queue.exceptions import (
    ClaimLost,
    CorruptArguments,
    InsideTransaction,
    InvalidOption,
    JobExpired,
    JobTimeout,
    NotExecutable,
    SealBroken,
)
from async_queue.fence import (
    Returned,
    pass_fence,
    perform,
    perform_outside,
    transaction,
)
from async_queue.models import Job
from async_queue.outcomes import Outcome
from async_queue.retries import Policy
from async_queue.signals import job_finished, job_started, log_outcome

logger = logging.getLogger("async_queue")

# Seconds, at most, before a run that the database rolled back is made again.
_RERUN_PAUSES = (0.05, 0.2, 0.8)
# Seconds before an outcome that could not be written is written again.
_RECORD_PAUSES = (0.0, 0.1, 0.5, 2.0, 8.0)

_SUCCESS = Outcome("succeed")

_is_asynchronous = lru_cache(maxsize=4096)(iscoroutinefunction)


class Unrecorded(NamedTuple):
    """A job that has succeeded, has written nothing, and is not recorded yet.

    ``context`` is the one in which it ran, for whoever announces its end.
    """

    job: RunningJob
    result: str | None
    seconds: float
    context: Context


def execute(job: RunningJob) -> Outcome:
    """Run a claimed job in this thread; return its outcome, which is recorded.

    Whatever the job raises is part of the outcome. A run that was ended from outside
    is not recorded here, but by whoever ended it: with `end`.
    """
    outcome = run(job)
    return record(outcome) if isinstance(outcome, Unrecorded) else outcome


def run(job: RunningJob) -> Outcome | Unrecorded:
    """Run a claimed job as `execute` does, but leave an empty success to be recorded.

    That is to be done with others by `record_many`, or with `record`.
    """
    started_at = time.monotonic()
    job_started.send_robust(sender=Job, job=job)
    with context.running(job):
        ended = _attempt(job)
        is_recorded = isinstance(ended, Returned) and not ended.is_empty
        if job.control.is_ended and not is_recorded:
            # Its session was ended, or is about to be.
            connections[job.alias].close()
            return Outcome("lose", job.control.cause)
        outcome = _settle(job, ended) if isinstance(ended, BaseException) else _SUCCESS
    seconds = time.monotonic() - started_at
    if isinstance(ended, Returned) and ended.is_empty:
        return Unrecorded(job, ended.result, seconds, copy_context())
    _announce(job, outcome, seconds)
    return outcome


def record_many(
    connection: BaseDatabaseWrapper, runs: Sequence[Unrecorded]
) -> set[tuple[int, int]]:
    """Record successes by one statement; return the claims of those that are.

    `record` is to do the others, and `announce_success` is to follow.
    """
    hooks.point("before_fence")
    recorded = statements.finish_many(
        connection, [(run.job, run.result) for run in runs]
    )
    hooks.point("after_commit")
    return recorded


def announce_success(run: Unrecorded) -> Outcome:
    """Announce the success that is recorded; return it."""
    _announce(run.job, _SUCCESS, run.seconds)
    return _SUCCESS


def record(unrecorded: Unrecorded) -> Outcome:
    """Record a success by itself; return what has become of the job."""
    job, outcome = unrecorded.job, _SUCCESS
    try:
        _record_success(job, unrecorded.result)
    except Exception as error:
        outcome = _settle(job, error)
    _announce(job, outcome, unrecorded.seconds)
    return outcome


def settle(job: RunningJob, error: BaseException) -> Outcome:
    """Record a run that did not end by itself, in its thread; return its outcome."""
    outcome = _settle(job, error)
    _announce(job, outcome, time.monotonic() - (job.control.began_at or 0.0))
    return outcome


def end(job: RunningJob) -> bool:
    """Record a run that was ended from outside, on a connection of the caller's.

    False if it is to be done later, because somebody has locked the job's row.
    """
    cause = job.control.cause
    assert cause is not None
    outcome = outcomes.decide(job, cause)
    with transaction(connections[job.alias]):
        if outcomes.is_locked(job):
            return False
        is_recorded = outcomes.record(job, outcome)
    # Its commit may have come first; then its own thread says so.
    if not is_recorded and outcomes.has_succeeded(job):
        return True
    if not is_recorded:
        outcome = Outcome("lose", cause)
    _announce(job, outcome, time.monotonic() - (job.control.began_at or 0.0))
    return True


def _announce(job: RunningJob, outcome: Outcome, seconds: float) -> None:
    job_finished.send_robust(sender=Job, job=job, outcome=outcome, seconds=seconds)
    with suppress(Exception):  # of a filter or formatter of the project's
        log_outcome(job, outcome, seconds)


def execute_here(row: Job) -> Any:
    """Claim, run and finish a job in one transaction; see `Job.execute`."""
    connection = connections[row._state.db or conf.settings().database]
    _refuse_nesting(connection, row)
    job = None
    try:
        # Around the transaction, for the on_commit hooks belong to the job, too.
        with ExitStack() as running, transaction(connection):
            job = _claim_here(connection, row)
            running.enter_context(context.running(job))
            job_started.send_robust(sender=Job, job=job)
            returned = perform(connection, job, _resolve(job)[0])
            pass_fence(connection, job, returned.result, commits=False)
    except KeyboardInterrupt:
        raise
    # A job that calls sys.exit() has failed here, too.
    except BaseException as error:
        if job is not None and not outcomes.is_transient(job, error):
            _settle_here(connection, job, error)
        raise
    finally:
        if job is not None:
            row.refresh_from_db()
    return returned.value


context.execute_here = execute_here


def _refuse_nesting(connection: BaseDatabaseWrapper, row: Job) -> None:
    context.refuse_inside_job()
    try:
        # Django decides: it lets the transaction of a TestCase pass.
        with atomic(using=connection.alias, durable=True):
            pass
    except RuntimeError as error:
        raise InsideTransaction(
            f"job {row.pk} cannot be executed inside a transaction, because its own "
            "must commit or roll back by itself: call execute() outside of atomic() "
            "and, with ATOMIC_REQUESTS, in a view marked non_atomic_requests"
        ) from error


def _attempt(job: RunningJob) -> Returned | BaseException:
    """Run the job; return what it returned, and recorded unless empty, or raised."""
    try:
        call, policy = _resolve(job)
        job.control.is_atomic = policy.atomic
        if policy.timeout is not None:
            job.control.timeout = policy.timeout.total_seconds()
        return (_run if policy.atomic else _run_outside)(job, call)
    # A job that calls sys.exit() must not end a worker's thread.
    except BaseException as error:
        return _timeout(job, error) or error


def _timeout(job: RunningJob, error: BaseException) -> JobTimeout | None:
    """Return a JobTimeout if the database has seen first that the time is up."""
    deadline = job.control.deadline
    if deadline is None or time.monotonic() < deadline:
        return None
    if not vendor(connections[job.alias]).is_over_limit(error):
        return None
    timeout = JobTimeout("a statement of the job has taken longer than its timeout")
    timeout.__cause__ = error
    return timeout


def _resolve(job: RunningJob) -> tuple[Callable[[], Any], Policy]:
    """Return the call that the row asks for, once it has proved to be ours."""
    sealed = (job.function, job.args, job.kwargs, job.meta)
    if {*map(type, sealed), type(job.seal)} != {str}:
        raise CorruptArguments("the row holds bytes or numbers where text belongs")
    is_unsealed = not job.seal and job.function in conf.settings().unsealed
    if not is_unsealed:
        codec.verify(job.seal, *sealed)
    args, kwargs, meta = map(codec.decode, sealed[1:])
    if (type(args), type(kwargs), type(meta)) != (list, dict, dict):
        raise CorruptArguments("args must be a JSON array, kwargs and meta objects")
    if is_unsealed:
        _check_unsealed(job, meta)
    policy = outcomes.policy_of(job, meta)
    if policy.expires_after and job.claimed_at - job.run_after > policy.expires_after:
        raise JobExpired(f"job {job.id} was not started within {policy.expires_after}")
    function = callables.resolve(job.function)
    if _is_asynchronous(function):
        function = async_to_sync(function)
    return partial(function, *args, **kwargs), policy


def _check_unsealed(job: RunningJob, meta: dict[str, Any]) -> None:
    """Accept a row of another program, which may name nothing that is imported."""
    # The setting names this path, not the row.
    callables.resolve(job.function)
    if job.function not in callables.registry:
        raise SealBroken(f"{job.function} is in UNSEALED but is no @job function")
    backoff = meta.get("backoff", retries.DEFAULT)
    if not isinstance(backoff, str) or backoff not in retries.NAMED:
        raise CorruptArguments("an unsealed row may only name a backoff of async_queue")
    try:
        retries.checked_meta(meta)
    except InvalidOption as error:
        raise CorruptArguments(str(error)) from error


def _run(job: RunningJob, call: Callable[[], Any]) -> Returned:
    """Run in a transaction, again if the database rolled it back by itself."""
    pauses = iter(_RERUN_PAUSES)
    while True:
        try:
            with _session(job) as connection, transaction(connection):
                _let_be_cut_off(connection, job)
                returned = perform(connection, job, call)
                is_followed = job.control.is_followed(returned.has_begun)
                if not returned.is_empty:
                    pass_fence(
                        connection, job, returned.result, begins_next=is_followed
                    )
            if not returned.is_empty:
                hooks.point("after_commit")
            return returned
        except Exception as error:
            is_over = job.control.is_ended or not outcomes.is_transient(job, error)
            pause = next(pauses, None)
            if pause is None or is_over:
                raise
        time.sleep(pause * random.random())
        if not _is_still_held(job):
            raise ClaimLost(f"job {job.id} is no longer this worker's")


def _run_outside(job: RunningJob, call: Callable[[], Any]) -> Returned:
    """Run in autocommit, and record the success afterwards."""
    with _session(job) as connection:
        connection.ensure_connection()
        _let_be_cut_off(connection, job)
        result = perform_outside(connection, job, call)
    _record_success(job, result)
    return Returned(None, result, is_empty=False, has_begun=True)


def _record_success(job: RunningJob, result: str | None) -> None:
    """Pass the fence in a transaction of its own, again while that fails."""
    for pause in (*_RECORD_PAUSES, None):
        try:
            with _session(job) as connection, transaction(connection):
                pass_fence(connection, job, result)
            return
        except Error:
            if pause is None:
                raise
            connections[job.alias].close_if_unusable_or_obsolete()
        time.sleep(pause)


def _session(job: RunningJob) -> AbstractContextManager[BaseDatabaseWrapper]:
    return awake(job.alias, job.worker, job.control.slot)


def _let_be_cut_off(connection: BaseDatabaseWrapper, job: RunningJob) -> None:
    """Let whoever holds the job's control end its session."""
    facts = vendor(connection)
    session = facts.session_of(connection)
    if session is None and connection.in_atomic_block:
        session = facts.mark_transaction(connection, job.worker)
    job.control.cut_off = lambda own: facts.end_session(own, session)
    if job.control.timeout is not None and connection.in_atomic_block:
        facts.limit_statements(connection, job.control.timeout)


def _is_still_held(job: RunningJob) -> bool:
    """Tell whether the claim stands; as if it did, while the database is away."""
    connections[job.alias].close_if_unusable_or_obsolete()
    try:
        return Job.objects.using(job.alias).held(job).exists()
    except Error:
        return True


def _settle(job: RunningJob, error: BaseException) -> Outcome:
    """Decide what is to become of a job that raised, and record it."""
    for trial, pause in enumerate(_RECORD_PAUSES):
        time.sleep(pause)
        connection = connections[job.alias]
        connection.close_if_unusable_or_obsolete()
        try:
            outcome = outcomes.decide(job, error)
            with transaction(connection):
                is_recorded = outcomes.record(job, outcome, in_ascii=trial > 0)
            return outcome if is_recorded else outcomes.found_out(job, error)
        # Text that the database's encoding lacks is an error of other kinds, too.
        except (Error, UnicodeError) as failure:
            logger.warning(
                "job %s: its outcome cannot be recorded: %s", job.id, failure
            )
    logger.error("job %s: given up; it runs again when the database is back", job.id)
    return Outcome("lose", error)


def _settle_here(
    connection: BaseDatabaseWrapper, job: RunningJob, error: BaseException
) -> None:
    """Record what became of a job that was executed by hand: its claim is gone."""
    connection.close_if_unusable_or_obsolete()
    outcome = outcomes.decide(job, error)
    with transaction(connection):
        if again := statements.claim_here(connection, job.id):
            outcomes.record(again, outcome)


def _claim_here(connection: BaseDatabaseWrapper, row: Job) -> RunningJob:
    if job := statements.claim_here(connection, row.pk):
        return job
    raise NotExecutable(
        f"job {row.pk} is running elsewhere, finished or deleted: only a job that is "
        "WAITING or READY can be executed"
    )
