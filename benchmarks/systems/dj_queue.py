"""dj-queue, by ``dj_queue``: a supervisor, a dispatcher and workers in processes."""

from collections.abc import Mapping
from typing import Any

from benchmarks.places import Place
from benchmarks.processes import python
from benchmarks.systems.base import System, scalar

_TABLE = "dj_queue_jobs"


class DjQueue(System):
    name = "dj-queue"
    package = "dj-queue"

    def wanted(self, place: Place, threads: int, processes: int) -> Mapping[str, Any]:
        workers = [{"queues": "*", "threads": threads, "processes": processes}]
        backend = {
            "BACKEND": "dj_queue.backend.DjQueueBackend",
            "QUEUES": [],
            "OPTIONS": {"workers": workers},
        }
        return {"INSTALLED_APPS": ["dj_queue"], "TASKS": {"default": backend}}

    def enqueue(self, kind: str, numbers: range) -> None:
        from benchmarks.systems import django_tasks

        task = getattr(django_tasks, kind)
        task.get_backend().enqueue_all([(task, [number], {}) for number in numbers])

    def enqueue_one(self, kind: str, number: int) -> None:
        from benchmarks.systems import django_tasks

        getattr(django_tasks, kind).enqueue(number)

    def commands(self, place: Place, threads: int, processes: int) -> list[list[str]]:
        return [python("-m", "django", "dj_queue")]

    def remaining(self, place: Place, connection: Any) -> int:
        return scalar(
            connection, f"SELECT COUNT(*) FROM {_TABLE} WHERE finished_at IS NULL"
        )

    def finished(self, connection: Any) -> int:
        failed = scalar(connection, "SELECT COUNT(*) FROM dj_queue_failed_executions")
        done = scalar(
            connection, f"SELECT COUNT(*) FROM {_TABLE} WHERE finished_at IS NOT NULL"
        )
        return done - failed
