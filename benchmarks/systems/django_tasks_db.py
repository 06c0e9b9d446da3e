"""django-tasks-db, by ``db_worker``, each of which runs one job at a time."""

from collections.abc import Mapping
from typing import Any

from benchmarks.places import Place
from benchmarks.processes import python
from benchmarks.systems.base import System, scalar

_TABLE = "django_tasks_database_dbtaskresult"


class DjangoTasksDB(System):
    name = "django-tasks-db"
    package = "django-tasks-db"
    note = "a process runs one job at a time"

    def wanted(self, place: Place, threads: int, processes: int) -> Mapping[str, Any]:
        return {
            "INSTALLED_APPS": ["django_tasks_db"],
            "TASKS": {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}},
        }

    def enqueue(self, kind: str, numbers: range) -> None:
        from django.db import transaction

        from benchmarks.systems import django_tasks

        task = getattr(django_tasks, kind)
        with transaction.atomic():
            for number in numbers:
                task.enqueue(number)

    def enqueue_one(self, kind: str, number: int) -> None:
        from benchmarks.systems import django_tasks

        getattr(django_tasks, kind).enqueue(number)

    def commands(self, place: Place, threads: int, processes: int) -> list[list[str]]:
        command = ("-m", "django", "db_worker", "--no-startup-delay")
        return [python(*command)] * processes

    def remaining(self, place: Place, connection: Any) -> int:
        unfinished = "status = 'READY' OR status = 'RUNNING'"
        return scalar(connection, f"SELECT COUNT(*) FROM {_TABLE} WHERE {unfinished}")

    def finished(self, connection: Any) -> int:
        return scalar(
            connection, f"SELECT COUNT(*) FROM {_TABLE} WHERE status = 'SUCCESSFUL'"
        )
