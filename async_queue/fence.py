"""One transaction for a function and for the record that it ran.

The UPDATE that makes the job SUCCESSFUL is the fence: it alone carries the guarantee.
Whatever the function does to the transaction in between is found out here.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

from django.db import Error, InternalError
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue import codec, hooks, statements
from async_queue.context import RunningJob
from async_queue.db import Vendor, is_begun_ahead, vendor
from async_queue.exceptions import (
    ClaimLost,
    InsideTransaction,
    StatementRefused,
    TransactionBroken,
)
from async_queue.signals import are_silent

logger = logging.getLogger("async_queue")

_CANNOT_COMMIT = (
    "its transaction cannot commit: wrap what may fail in transaction.atomic()"
)


def transaction(connection: BaseDatabaseWrapper) -> AbstractContextManager[None]:
    """Return a transaction of the queue, begun at its turn; never inside another."""
    facts = vendor(connection)
    # What a connection that is closed remembers counts for nothing.
    is_there = connection.connection is not None or is_begun_ahead(connection)
    is_usual = is_there and connection.autocommit
    if not (is_usual or connection.in_atomic_block or connection.get_autocommit()):
        raise InsideTransaction(
            f"the database {connection.alias!r} has AUTOCOMMIT switched off, so that "
            "nothing would be committed: leave it on"
        )
    block = facts.block(connection)
    if not facts.runs_one_job_at_a_time:
        return block
    return _in_turn(facts.turn(connection), block)


@contextmanager
def _in_turn(
    turn: AbstractContextManager[None], block: AbstractContextManager[None]
) -> Iterator[None]:
    with turn, block:
        yield


class Returned(NamedTuple):
    """What a function has returned, and how it is stored.

    It ``is_empty`` when its transaction holds nothing, and has nothing to do once it
    has committed; so that it does not matter when the success is recorded. It
    ``has_begun`` one, where a transaction begins with the first statement.
    """

    value: Any
    result: str | None
    is_empty: bool
    has_begun: bool


def perform(
    connection: BaseDatabaseWrapper, job: RunningJob, call: Callable[[], Any]
) -> Returned:
    """Call the function inside the `transaction` that is to hold the fence, too.

    What this raises, or `pass_fence` or leaving the transaction raises, means that the
    job has not succeeded, or that nobody knows yet.
    """
    facts = vendor(connection)
    with _Guard(connection, facts, job) as guard:
        value = job.control.call(call)
    if guard.has_open_block:
        raise TransactionBroken(
            f"job {job.id} entered an atomic() block and did not leave it"
        )
    guard.check()
    if not connection.in_atomic_block or connection.get_rollback():
        raise TransactionBroken(
            f"job {job.id} caught a database error, closed the connection or called "
            f"set_rollback(), so {_CANNOT_COMMIT}"
        )
    guard.check_driver()
    hooks.point("after_call")
    is_empty = (
        facts.begins_late
        and not guard.has_sent
        and not connection.run_on_commit
        and not facts.is_in_transaction(connection)
    )
    has_begun = guard.has_sent or not facts.begins_late
    return Returned(value, _encoded(value), is_empty, has_begun)


def perform_outside(
    connection: BaseDatabaseWrapper, job: RunningJob, call: Callable[[], Any]
) -> str | None:
    """Call the function in autocommit; return its encoded return value.

    What it did is done, whatever becomes of the record of it; see `pass_fence`.
    """
    try:
        value = job.control.call(call)
    finally:
        _leave_no_transaction(connection, job)
    hooks.point("after_call")
    return _encoded(value)


def _encoded(value: Any) -> str | None:
    return None if value is None else codec.encode(value, "the return value")


def _leave_no_transaction(connection: BaseDatabaseWrapper, job: RunningJob) -> None:
    try:
        is_open = vendor(connection).is_in_transaction(connection)
    except Error:  # the session is lost, and with it whatever was open
        connection.close()
        return
    if connection.in_atomic_block or is_open:
        logger.warning(
            "job %s left a transaction open; it is rolled back: use atomic()", job.id
        )
        connection.close()


def pass_fence(
    connection: BaseDatabaseWrapper,
    job: RunningJob,
    result: str | None,
    *,
    commits: bool = True,
    begins_next: bool = False,
) -> None:
    """Make the job SUCCESSFUL in the open transaction, or raise ClaimLost.

    If it ``commits``, that is committed, too, where the database can be told both at
    once; and the next one is begun, if it ``begins_next``. In the main thread Ctrl-C
    would not be heard meanwhile.
    """
    hooks.point("before_fence")
    _shield_hooks(connection, job)
    # Not what is inside of a test's own transaction, or of a block of the caller's.
    is_outermost = not connection.savepoint_ids
    commits = commits and is_outermost and not hooks.is_watched("after_fence")
    # Nobody else's code may run in what is begun, with a cursor that it has kept.
    begins_next = begins_next and not connection.run_on_commit and are_silent()
    try:
        stands = statements.finish(
            connection, job, result, commits=commits, begins_next=begins_next
        )
    except InternalError as error:
        raise TransactionBroken(
            f"job {job.id} caught an error of a cursor of its own, so {_CANNOT_COMMIT}"
        ) from error
    if not stands:
        raise ClaimLost(
            f"job {job.id} was cancelled, or given to another worker, while it ran"
        )
    hooks.point("after_fence")


class _Guard:
    """Stands between a job and its connection, as an execute_wrapper of Django.

    At the end it forgets the atomic() blocks that the job has entered and not left:
    Django would take the end of our block for the end of theirs, and not commit.
    """

    has_sent = False
    has_open_block = False
    _rollback: BaseException | None = None

    def __init__(
        self, connection: BaseDatabaseWrapper, facts: Vendor, job: RunningJob
    ) -> None:
        self._connection = connection
        self._facts = facts
        self._job = job
        # What is there now is not the job's.
        self._savepoints = len(connection.savepoint_ids)
        self._blocks = len(connection.atomic_blocks)
        self._wrappers = len(connection.execute_wrappers)

    def __enter__(self) -> "_Guard":
        self._connection.execute_wrappers.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        connection = self._connection
        del connection.execute_wrappers[self._wrappers :]
        self.has_open_block = len(connection.savepoint_ids) > self._savepoints
        del connection.savepoint_ids[self._savepoints :]
        del connection.atomic_blocks[self._blocks :]

    def __call__(
        self,
        execute: Callable[..., Any],
        sql: Any,
        params: Any,
        many: bool,
        context: dict[str, Any],
    ) -> Any:
        # What follows a rollback would be committed without what went before.
        self.check()
        if not self._connection.in_atomic_block:
            raise TransactionBroken(
                "somebody has left the job's transaction, such as a generator of "
                "another one that was suspended in an atomic() block and is collected"
            )
        if keyword := self._facts.refused_statement(sql):
            raise StatementRefused(
                f"{keyword} would end the transaction in which this job commits with "
                "its effects, so it was not sent: use transaction.atomic(), and do "
                "what cannot be undone outside of jobs"
            )
        if self.has_sent:
            self.check_driver()
        else:
            self._facts.begin(self._connection)
        self.has_sent = True
        try:
            return execute(sql, params, many, context)
        except Error as error:
            if self._facts.rolls_back(self._connection, error):
                self._rollback = error
            raise

    def check(self) -> None:
        """Raise if the database has rolled back the transaction by itself."""
        if self._rollback is None:
            return
        if self._facts.is_transient(self._rollback):
            raise self._rollback
        raise TransactionBroken(
            "the job caught an error with which the database undid all it had done"
        ) from self._rollback

    def check_driver(self) -> None:
        """Raise if the job has ended the transaction without Django's knowledge."""
        if self._facts.is_inside_transaction(self._connection, self.has_sent):
            return
        raise TransactionBroken(
            f"job {self._job.id} ended its transaction through the driver: what it did "
            "before that may be committed, and the job may run again"
        )


def _shield_hooks(connection: BaseDatabaseWrapper, job: RunningJob) -> None:
    """Let no on_commit hook look like a commit that failed, or stop the others."""
    waiting: list[Any] = connection.run_on_commit
    waiting[:] = [
        (savepoints, partial(_call_hook, job, hook), robust)
        for savepoints, hook, robust in waiting
    ]


def _call_hook(job: RunningJob, hook: Callable[[], Any]) -> None:
    try:
        hook()
    # The job has committed, so this can only be told, whatever it is.
    except BaseException as error:
        logger.exception(
            "an on_commit hook of job %s %s raised; the job has succeeded",
            job.id,
            job.function,
        )
        if isinstance(error, KeyboardInterrupt):
            raise
