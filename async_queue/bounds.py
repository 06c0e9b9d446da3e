"""When a worker is done, as whoever starts it wishes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """When a worker is done; without any, when it is told to stop.

    ``is_burst``: when nothing is due. ``only_due_now``: what is scheduled, or due, once
    it has begun is left to others. ``max_jobs``: after so many. ``max_memory``: when
    the process has so many bytes. ``deadline``: begin none after so many seconds.
    ``stops_at_failure``: begin none after one that failed.
    """

    is_burst: bool = False
    only_due_now: bool = False
    max_jobs: int | None = None
    max_memory: int | None = None
    deadline: float | None = None
    stops_at_failure: bool = False
