"""Taking READY jobs for a worker, and giving back what was not begun.

Called by the dispatcher of a worker on its private connection.
"""

import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from django.db import connections, transaction
from django.db.models import F
from django.db.models.functions import Left, Mod

from async_queue import hooks, statements
from async_queue.context import RunningJob
from async_queue.db import persist, vendor
from async_queue.models import Job, JobQuerySet
from async_queue.statements import ANYTHING, Position, Selection

# Seconds between two looks at the beginnings of the queues. Where they take long they
# are rarer, up to the second number, so as to take up a tenth of the time.
_PAUSE, _LONGEST_PAUSE = 1.0, 10.0


def claim(
    alias: str, worker: int, limit: int, selection: Selection = ANYTHING
) -> list[RunningJob]:
    """Take up to ``limit`` jobs for ``worker``, in the order in which they should run.

    The selection's queues are visited in their order. Of those that one pattern stands
    for, as of all where none is named, the one whose first job has the highest priority
    and the longest wait comes first.
    """
    return Claimer(alias).claim(worker, limit, selection)


class Claimer:
    """Claims for one worker, and remembers where it stands in each queue.

    What has left a queue may stay in its index for long, and each claim would step over
    all of it: see decision 15. So while there is more than enough to do, a claim goes
    on where the last one ended. One that comes back short looks at the beginnings at
    once, others do once a second: for jobs of a higher priority, and those given back.
    """

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._selection = ANYTHING
        # Of all queues that are named, or of those that had jobs at the last look.
        self._positions: dict[str, Position] = {}
        self._look_at = 0.0

    def claim(
        self, worker: int, limit: int, selection: Selection = ANYTHING
    ) -> list[RunningJob]:
        """Take up to ``limit`` jobs, as the function `claim` says."""
        hooks.point("before_claim")
        jobs: list[RunningJob] = []
        if selection != self._selection:
            self._selection, self._positions, self._look_at = selection, {}, 0.0
        if time.monotonic() < self._look_at:
            jobs = self._visit(worker, limit, self._known_queues())
        if len(jobs) < limit:
            jobs += self._look(worker, limit - len(jobs))
        if len(jobs) < limit:
            self._look_at = 0.0
        if jobs:
            hooks.point("after_claim")
        return jobs

    def _look(self, worker: int, limit: int) -> list[RunningJob]:
        """Claim from the beginning of each queue."""
        began_at = time.monotonic()
        jobs = self._visit(worker, limit, self._all_queues())
        if vendor(connections[self._alias]).keeps_dead_entries:
            now = time.monotonic()
            pause = min(max(_PAUSE, 10 * (now - began_at)), _LONGEST_PAUSE)
            self._look_at = now + pause
        return jobs

    def _all_queues(self) -> dict[str, Position | None]:
        queues, suspect = self._selection.queues, self._selection.suspect
        if are_names(queues):
            return dict.fromkeys(queues)
        heads = statements.heads(connections[self._alias], suspect)
        self._positions = {
            queue: head for queue, head in heads.items() if serves(queues, queue)
        }
        return self._in_turn()

    def _known_queues(self) -> dict[str, Position | None]:
        queues, known = self._selection.queues, self._positions
        if are_names(queues):
            return {queue: known.get(queue) for queue in queues}
        if len(known) > 1:
            suspect = self._selection.suspect
            heads = statements.heads_from(connections[self._alias], known, suspect)
            self._positions = heads
        return self._in_turn()

    def _in_turn(self) -> dict[str, Position | None]:
        queues = self._selection.queues
        # The queues of one turn stay in the order of their heads.
        order = sorted(self._positions, key=lambda queue: _turn_of(queue, queues))
        return {queue: self._positions[queue] for queue in order}

    def _visit(
        self, worker: int, limit: int, starts: Mapping[str, Position | None]
    ) -> list[RunningJob]:
        jobs: list[RunningJob] = []
        for queue, start in starts.items():
            if len(jobs) == limit:
                if start is None:  # what this look has not reached is still to be done
                    self._positions.pop(queue, None)
                continue
            found = self._take(worker, queue, limit - len(jobs), start)
            if found:
                last = found[-1]
                self._positions[queue] = Position(last.rank, last.run_after, last.id)
            jobs += found
        return jobs

    def _take(
        self, worker: int, queue: str, limit: int, start: Position | None
    ) -> list[RunningJob]:
        connection, selection = connections[self._alias], self._selection
        facts = vendor(connection)
        if not facts.keeps_dead_entries:
            start = None

        def act() -> list[RunningJob]:
            with facts.turn(connection):
                return statements.claim(
                    connection, worker, queue, limit, selection, start
                )

        return persist(connection, act)


def has_patterns(queues: Sequence[str]) -> bool:
    """Tell whether these are not all just names of queues."""
    return any(queue.startswith("-") or "*" in queue for queue in queues)


def are_names(queues: Sequence[str]) -> bool:
    """Tell whether these are just names of queues, and at least one."""
    return bool(queues) and not has_patterns(queues)


def serves(queues: Sequence[str], name: str) -> bool:
    """Tell whether ``name`` is among ``queues``: names, ``b*``, and ``-c`` for not c.

    None at all, and none but exclusions, are all the others.
    """
    wanted = [queue for queue in queues if not queue.startswith("-")]
    unwanted = [queue[1:] for queue in queues if queue.startswith("-")]
    if any(fnmatchcase(name, queue) for queue in unwanted):
        return False
    return not wanted or any(fnmatchcase(name, queue) for queue in wanted)


def due(alias: str, selection: Selection) -> JobQuerySet:
    """Return what a pass with this selection would find now, in its order."""
    jobs = Job.objects.using(alias).due()
    if has_patterns(selection.queues):
        names = jobs.order_by().values_list("queue", flat=True).distinct()
        wanted = [name for name in names if serves(selection.queues, name)]
        jobs = jobs.filter(queue__in=wanted)
    elif selection.queues:
        jobs = jobs.filter(queue__in=selection.queues)
    if selection.shard:
        which, out_of = selection.shard
        jobs = jobs.alias(shard=Mod(F("id"), out_of)).filter(shard=which)
    if prefix := selection.prefix:
        # Not startswith, to which SQLite's LIKE makes capitals the same.
        jobs = jobs.alias(start=Left("function", len(prefix))).filter(start=prefix)
    return jobs


def release(alias: str, worker: int, claims: Mapping[int, int]) -> int:
    """Give back the worker's claims, ids with attempts, uncharged; return how many.

    That is how many still were the worker's; those whose rows somebody has locked are
    left.
    """
    connection = connections[alias]
    held = Job.objects.using(alias).filter(worker_id=worker)
    mine = held.filter(pk__in=claims).order_by("id")
    hooks.point("before_release")
    with vendor(connection).turn(connection), transaction.atomic(using=alias):
        released = sum(
            held.filter(pk=job, attempt=claims[job]).transition("release")
            for job in list(mine.unlocked().values_list("pk", flat=True))
        )
    hooks.point("after_release")
    return released


def _turn_of(name: str, queues: Sequence[str]) -> int:
    """Return the place of ``name`` in ``queues``: that of the first that fits."""
    fits = (turn for turn, queue in enumerate(queues) if fnmatchcase(name, queue))
    return next(fits, 0)
