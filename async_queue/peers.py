"""What a worker's keeper sees of the other workers: who has died, who has stalled.

A death is proved by a lock that only a dead worker does not hold. That one has stalled
is observed: the same beat for STALL_AFTER by this process's own clock, and only while
its own beats came through, so that whoever stood still himself accuses nobody.
"""

import logging
from collections.abc import Iterable

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue import conf, maintenance
from async_queue.db import vendor
from async_queue.statements import Other

logger = logging.getLogger("async_queue")

# For so long after its start a server has sessions to wait for, in seconds.
_RETURN = 5.0
# For so long a worker may be without its lock while its jobs have sessions: its keeper
# may have lost its own connection only, and is about to be back.
GRACE = 1.0
# Two looks count as one time of watching if no more than so many intervals are between.
_WATCHFUL = 3


class Pulses:
    """How long, in seconds, each beat has been seen to stand still."""

    def __init__(self, interval: float) -> None:
        self._longest = _WATCHFUL * interval
        self._looked_at: float | None = None
        self._beats: dict[int, int] = {}
        self._still: dict[int, float] = {}

    def look(self, beats: dict[int, int], at: float) -> dict[int, float]:
        """Take note of the beats at this moment of the monotonic clock."""
        since = 0.0 if self._looked_at is None else at - self._looked_at
        # After a longer pause nobody knows what has been in between.
        watched = since if since <= self._longest else 0.0
        self._still = {
            worker: self._still.get(worker, 0.0) + watched
            if self._beats.get(worker) == beat
            else 0.0
            for worker, beat in beats.items()
        }
        self._beats, self._looked_at = beats, at
        return self._still


class Peers:
    """The other workers, as the keeper of one sees them with each of its ticks."""

    def __init__(self, alias: str, interval: float) -> None:
        self._alias = alias
        self._pulses = Pulses(interval)
        # Since when, and at which beat, a worker's lock has been seen to be free.
        self._free_since: dict[int, tuple[int, float]] = {}

    def look(self, others: Iterable[Other], at: float, *, trusts_locks: bool) -> bool:
        """Bury those that are dead; tell whether there were any."""
        others = list(others)
        still = self._pulses.look({other.id: other.beat for other in others}, at)
        limit = conf.settings().stall_after.total_seconds()
        buried = 0
        for other in others:
            if trusts_locks and other.has_lock and self._has_died(other, at):
                buried += self._bury(other, "has died")
            elif still[other.id] >= limit and self._beats():
                buried += self._bury_stalled(other, trusts_locks, still[other.id])
        return buried > 0

    def _connection(self) -> BaseDatabaseWrapper:
        return connections[self._alias]

    def _beats(self) -> bool:
        return vendor(self._connection()).has_heartbeat

    def _has_died(self, other: Other, at: float) -> bool:
        if other.is_free is False:
            self._free_since.pop(other.id, None)
            return False
        connection = self._connection()
        facts = vendor(connection)
        if facts.seconds_up(connection) < _RETURN:
            return False
        beat, since = self._free_since.get(other.id, (other.beat, at))
        if beat != other.beat:  # meanwhile it was back, and was cut off again
            since = at
        self._free_since[other.id] = (other.beat, since)
        if not facts.has_sessions_of(connection, other.id, other.threads):
            return True
        return at - since >= GRACE

    def _bury(self, other: Other, what: str) -> bool:
        connection = self._connection()
        if not maintenance.bury(self._alias, other.id):
            return False
        self._free_since.pop(other.id, None)
        # After the mark: the worker itself then knows that it must not go on.
        vendor(connection).end_sessions_of(connection, other.id, other.threads)
        logger.warning("worker %s %s; its jobs run again", other.id, what)
        return True

    def _bury_stalled(self, other: Other, trusts_locks: bool, still: float) -> bool:
        connection = self._connection()
        what = f"has not moved for {still:.0f} s"
        if not trusts_locks or not other.has_lock:
            return maintenance.bury_unproved(self._alias, other.id, other.beat)
        # With its keeper's session goes the lock, which is the proof.
        vendor(connection).end_sessions_of(connection, other.id, other.threads)
        return self._bury(other, what)
