"""The systems that are measured: async_queue, its references, and other queues.

A new one is a `base.System` in a file of its own, and a line in ``_ALL``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from benchmarks import places
from benchmarks.places import Place
from benchmarks.systems.base import System
from benchmarks.systems.celery import Celery
from benchmarks.systems.dj_queue import DjQueue
from benchmarks.systems.django_ox import DjangoOx
from benchmarks.systems.django_tasks_db import DjangoTasksDB
from benchmarks.systems.huey import Huey
from benchmarks.systems.ours import AsyncQueue
from benchmarks.systems.pgqueuer import PgQueuer
from benchmarks.systems.procrastinate import Procrastinate
from benchmarks.systems.reference import Reference

REFERENCES = ("R", "E", "D")
_BESIDE = (
    PgQueuer("pgqueuer"),
    PgQueuer("pgqueuer-100", 100),
    PgQueuer("pgqueuer-threads", way="threads"),
    PgQueuer("pgqueuer-asyncpg", way="asyncpg"),
    Procrastinate(),
    DjangoOx(),
    Huey(),
    DjangoTasksDB(),
    DjQueue(),
    Celery(),
)
# By how many queues the jobs are in.
QUEUES = {10: "10 queues", 100: "100 queues", 1_000: "1,000 queues"}
_ALL: tuple[System, ...] = (
    AsyncQueue(),
    *(AsyncQueue(name, queues) for queues, name in QUEUES.items()),
    *map(Reference, REFERENCES),
    *_BESIDE,
)
SYSTEMS = {system.name: system for system in _ALL}
BESIDE = [system.name for system in _BESIDE]


@contextmanager
def home(
    system: System, vendor: str, threads: int = 4, processes: int = 1
) -> Iterator[Place]:
    """Make an empty database for a system, and the settings that it needs."""
    with places.fresh(vendor) as bare:
        place = replace(
            bare,
            wanted=system.wanted(bare, threads, processes),
            variables=system.variables(bare),
        )
        try:
            yield place
        finally:
            system.cleanup(place)


def fill(name: str, kind: str, count: int) -> None:
    """Make the tables of a system and enqueue jobs; called by `Place.call`."""
    system = SYSTEMS[name]
    system.prepare()
    system.enqueue(kind, range(count))


__all__ = ["BESIDE", "QUEUES", "REFERENCES", "SYSTEMS", "System", "fill", "home"]
