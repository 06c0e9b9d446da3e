"""What must hold: the figures that async_queue is held to, as ratios in one run.

A figure against None is bounded itself.
"""

from typing import Literal, NamedTuple


class Bound(NamedTuple):
    """What is required of the first subject of a case, on one database."""

    vendor: str
    figure: str
    case: str
    against: str | None
    sense: Literal[">=", "<="]
    limit: float

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.sense == ">=" else value <= self.limit


_BESIDE = ("WAITING", "WAITING of higher priority", "SUCCESSFUL", "READY elsewhere")

BOUNDS = (
    Bound("postgres", "drain", "insert 1x4", "R", ">=", 0.75),
    Bound("postgres", "drain", "insert 1x4", "D", ">=", 0.85),
    Bound("postgres", "drain", "insert 2x4", "R", ">=", 0.75),
    Bound("postgres", "drain", "insert 2x4", "D", ">=", 0.85),
    Bound("postgres", "drain", "noop 1x4", "pgqueuer", ">=", 1.5),
    Bound("postgres", "drain", "noop 1x4", "pgqueuer-100", ">=", 1.1),
    Bound("postgres", "drain", "insert 1x4", "pgqueuer", ">=", 1.2),
    Bound("postgres", "drain", "insert 1x4", "django-ox", ">=", 3),
    Bound("postgres", "drain", "insert 1x4", "procrastinate", ">=", 4),
    Bound("mariadb", "drain", "insert 1x4", "R", ">=", 0.6),
    *(
        Bound("sqlite", "drain", f"{kind} 1x4", other, ">=", limit)
        for kind in ("noop", "insert")
        for other, limit in (("huey", 1.5), ("django-tasks-db", 3))
    ),
    Bound("postgres", "enqueue", "each committed", "objects.create", ">=", 0.9),
    Bound("postgres", "enqueue", "many at once", "bulk_create", ">=", 0.9),
    Bound("postgres", "enqueue", "many at once", "batch_defer", ">=", 1.2),
    Bound("postgres", "pickup", "p50", None, "<=", 2),
    Bound("postgres", "pickup", "p99", None, "<=", 5),
    Bound("postgres", "clients", "workers busy", "without NOTIFY", ">=", 0.9),
    Bound("postgres", "clients", "workers idle", "without NOTIFY", ">=", 0.6),
    *(
        Bound("postgres", "claims", f"{what}, {rows}", "empty table", "<=", 1.5)
        for what in ("claim of 10", "probe: heads", "probe: tick")
        for rows in _BESIDE
    ),
    Bound("postgres", "claims", "claim of 10, unvacuumed", "empty table", "<=", 3),
    Bound("postgres", "claims", "claim of 10, behind a writer", "empty table", "<=", 3),
    Bound("postgres", "decay", "noop 1x4", "first tenth", ">=", 0.9),
    Bound("postgres", "decay", "insert 1x4", "first tenth", ">=", 0.9),
    Bound("postgres", "memory", "above a shell", None, "<=", 15),
)
