"""procrastinate, by its Django command: one asynchronous process.

Its jobs are plain functions, which it runs in threads, as a Django project has them.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.places import Place
from benchmarks.processes import python
from benchmarks.systems.base import System, scalar

_TABLE = "procrastinate_jobs"


class Procrastinate(System):
    name = "procrastinate"
    package = "procrastinate"
    vendors = ("postgres",)

    def wanted(self, place: Place, threads: int, processes: int) -> Mapping[str, Any]:
        return {
            "INSTALLED_APPS": ["procrastinate.contrib.django"],
            "PROCRASTINATE_IMPORT_PATHS": ["benchmarks.systems.procrastinate_tasks"],
        }

    def enqueue(self, kind: str, numbers: range) -> None:
        from benchmarks.systems import procrastinate_tasks

        task = getattr(procrastinate_tasks, kind)
        task.batch_defer(*({"number": number} for number in numbers))

    def enqueue_one(self, kind: str, number: int) -> None:
        from benchmarks.systems import procrastinate_tasks

        getattr(procrastinate_tasks, kind).defer(number=number)

    def commands(self, place: Place, threads: int, processes: int) -> list[list[str]]:
        command = ("-m", "django", "procrastinate", "worker")
        return [python(*command, f"--concurrency={threads}")] * processes

    def remaining(self, place: Place, connection: Any) -> int:
        unfinished = "status = 'todo' OR status = 'doing'"
        return scalar(connection, f"SELECT COUNT(*) FROM {_TABLE} WHERE {unfinished}")

    def finished(self, connection: Any) -> int:
        return scalar(
            connection, f"SELECT COUNT(*) FROM {_TABLE} WHERE status = 'succeeded'"
        )
