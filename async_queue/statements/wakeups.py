"""Waking idle workers on PostgreSQL, once what they shall find is committed.

A NOTIFY takes a lock that makes commits wait for each other. So it is sent only if
some worker wants it, and never in a transaction of the caller's.
"""

import logging
from weakref import ReferenceType, WeakKeyDictionary, ref

from django.db import Error
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.db import vendor
from async_queue.statements.rows import WORKER, truth

logger = logging.getLogger("async_queue")

CHANNEL = "async_queue"
# The payload that stands for no queue: look at when the next job is due.
CLOCK = ""


def wanted(queue: str | None = None) -> str:
    """Return SQL for whether a worker wants word of ``queue``, which is SQL, too.

    What may be a pattern is taken for one that fits. Word for the clock is wanted by
    all: those that are busy, or look by themselves, look for what is READY only.
    """
    if queue is None:
        return f"EXISTS (SELECT 1 FROM {WORKER} WHERE dead_at IS NULL)"
    named = f"strpos(',' || queues || ',', ',' || {queue} || ',') > 0"
    return (
        f"EXISTS (SELECT 1 FROM {WORKER} WHERE wants_wakeup AND dead_at IS NULL "
        f"AND (queues = '' OR queues ~ '[*-]' OR {named}))"
    )


def want_wakeup(connection: BaseDatabaseWrapper, worker: int, wanted: bool) -> None:
    """Let whoever schedules know whether ``worker`` wants to be woken."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE {WORKER} SET wants_wakeup = {truth(wanted)} WHERE id = %s",
            [worker],
        )


def announce(connection: BaseDatabaseWrapper, payloads: set[str]) -> None:
    """Wake who wants it: now, or as soon as the caller's transaction has committed.

    ``payloads`` are queues that have READY jobs, or ``CLOCK``. All that a transaction
    announces is sent by one statement. An error is not raised: workers look for
    themselves too.
    """
    if not payloads or not vendor(connection).listens:
        return
    if connection.in_atomic_block:
        _announce_after_commit(connection, payloads)
    # Who has switched autocommit off commits when nobody knows.
    elif connection.get_autocommit():
        _notify(connection, payloads)


class _Announcement:
    """What one transaction has to announce, as its hook.

    Nothing else keeps it alive, so that it goes when Django drops the hook, with the
    transaction or with the savepoint that registered it. While it lives, whatever can
    still undo it undoes what was added later too.
    """

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self.payloads: set[str] = set()
        self._connection = connection

    def __call__(self) -> None:
        # Whoever keeps called hooks, as tests do, keeps this one.
        _pending.pop(self._connection, None)
        _notify(self._connection, self.payloads)


_pending: WeakKeyDictionary[BaseDatabaseWrapper, ReferenceType[_Announcement]] = (
    WeakKeyDictionary()
)


def _announce_after_commit(connection: BaseDatabaseWrapper, payloads: set[str]) -> None:
    known = _pending.get(connection)
    announcement = known() if known else None
    if announcement is None:
        announcement = _Announcement(connection)
        _pending[connection] = ref(announcement)
        connection.on_commit(announcement, robust=True)
    announcement.payloads |= payloads


def _notify(connection: BaseDatabaseWrapper, payloads: set[str]) -> None:
    queues = sorted(payloads - {CLOCK})
    calls = [f"CASE WHEN {wanted('%s')} THEN pg_notify('{CHANNEL}', %s) END"]
    calls *= len(queues)
    if CLOCK in payloads:
        calls.append(f"CASE WHEN {wanted()} THEN pg_notify('{CHANNEL}', '{CLOCK}') END")
    try:
        with connection.cursor() as cursor:
            twice = [name for queue in queues for name in (queue, queue)]
            cursor.execute(f"SELECT {', '.join(calls)}", twice)
    except Error:
        logger.debug("no worker was woken; they will look", exc_info=True)
