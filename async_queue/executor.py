"""One run of a claimed job: resolve, run, decide, record, announce.

Workers call `execute` in a thread of their pool; `Job.execute()` is `execute_here`.
"""

import logging
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from inspect import iscoroutinefunction
from typing import Any

from asgiref.sync import async_to_sync
from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.transaction import atomic

from async_queue import callables, codec, conf, context, outcomes, retries, statements
from async_queue.context import RunningJob
from async_queue.db import awake
from async_queue.exceptions import (
    ClaimLost,
    CorruptArguments,
    InsideTransaction,
    InvalidOption,
    JobExpired,
    NotExecutable,
    SealBroken,
)
from async_queue.fence import perform, transaction
from async_queue.models import Job
from async_queue.outcomes import Outcome
from async_queue.signals import job_finished, job_started

logger = logging.getLogger("async_queue")

# Seconds, at most, before a run that the database rolled back is made again.
_RERUN_PAUSES = (0.05, 0.2, 0.8)
# Seconds before an outcome that could not be written is written again.
_RECORD_PAUSES = (0.0, 0.1, 0.5, 2.0, 8.0)


def execute(job: RunningJob) -> Outcome:
    """Run a claimed job in this thread; return its outcome, which is recorded.

    Whatever the job raises is part of the outcome.
    """
    started_at = time.monotonic()
    job_started.send_robust(sender=Job, job=job)
    with awake(job.alias), context.running(job):
        error = _attempt(job)
        outcome = Outcome("succeed") if error is None else _settle(job, error)
    seconds = time.monotonic() - started_at
    job_finished.send_robust(sender=Job, job=job, outcome=outcome, seconds=seconds)
    return outcome


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
            value = perform(connection, job, _resolve(job))
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
    return value


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


def _attempt(job: RunningJob) -> BaseException | None:
    """Run the job; return what it raised."""
    try:
        call = _resolve(job)
        _run(job, call)
    # A job that calls sys.exit() must not end a worker's thread.
    except BaseException as error:
        return error
    return None


def _resolve(job: RunningJob) -> Callable[[], Any]:
    """Return the call that the row asks for, once it has proved to be ours."""
    sealed = (job.function, job.args, job.kwargs, job.meta)
    if not all(isinstance(text, str) for text in (*sealed, job.seal)):
        raise CorruptArguments("the row holds bytes or numbers where text belongs")
    is_unsealed = not job.seal and job.function in conf.settings().unsealed
    if not is_unsealed:
        codec.verify(job.seal, *sealed)
    args, kwargs, meta = map(codec.decode, sealed[1:])
    if (type(args), type(kwargs), type(meta)) != (list, dict, dict):
        raise CorruptArguments("args must be a JSON array, kwargs and meta objects")
    if is_unsealed:
        _check_unsealed(job, meta)
    expires_after = outcomes.policy_of(job, meta).expires_after
    if expires_after and job.claimed_at - job.run_after > expires_after:
        raise JobExpired(f"job {job.id} was not started within {expires_after}")
    function = callables.resolve(job.function)
    if iscoroutinefunction(function):
        function = async_to_sync(function)
    return partial(function, *args, **kwargs)


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


def _run(job: RunningJob, call: Callable[[], Any]) -> None:
    """Run in a transaction, again if the database rolled it back by itself."""
    connection = connections[job.alias]
    for pause in (*_RERUN_PAUSES, None):
        try:
            with transaction(connection):
                perform(connection, job, call)
            return
        except Exception as error:
            if pause is None or not outcomes.is_transient(job, error):
                raise
        time.sleep(pause * random.random())
        if not Job.objects.using(job.alias).held(job).exists():
            raise ClaimLost(f"job {job.id} is no longer this worker's")


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
    logger.error("job %s: given up; it will be rescued when this worker ends", job.id)
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
