"""A job queue for Django that keeps its jobs in the database the project has.

A job's database changes and the record that it ran commit together, or not at all.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from async_queue.api import cancel, deschedule, schedule, schedule_many
    from async_queue.context import current_job
    from async_queue.decorators import job
    from async_queue.exceptions import AsyncQueueError, Cancel, Retry, Snooze
    from async_queue.monitoring import health

__all__ = [
    "AsyncQueueError",
    "Cancel",
    "Retry",
    "Snooze",
    "cancel",
    "current_job",
    "deschedule",
    "health",
    "job",
    "schedule",
    "schedule_many",
]

_HOMES = {
    "api": ("cancel", "deschedule", "schedule", "schedule_many"),
    "context": ("current_job",),
    "decorators": ("job",),
    "exceptions": ("AsyncQueueError", "Cancel", "Retry", "Snooze"),
    "monitoring": ("health",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Django imports this package before its models may be imported.
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
