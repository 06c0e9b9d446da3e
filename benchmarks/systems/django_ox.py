"""django-ox, by ``ox_worker``."""

from collections.abc import Mapping
from typing import Any

from benchmarks.places import Place
from benchmarks.processes import python
from benchmarks.systems.base import System, scalar

_TABLE = "django_ox_oxtask"


class DjangoOx(System):
    name = "django-ox"
    package = "django-ox"
    vendors = ("sqlite", "postgres")

    def wanted(self, place: Place, threads: int, processes: int) -> Mapping[str, Any]:
        return {
            "INSTALLED_APPS": ["django_ox"],
            "TASKS": {"default": {"BACKEND": "django_ox.backend.OxBackend"}},
        }

    def enqueue(self, kind: str, numbers: range) -> None:
        from django_ox.bulk import enqueue_many

        from benchmarks.systems import django_tasks

        calls: list[Any] = [((number,), {}) for number in numbers]
        enqueue_many(getattr(django_tasks, kind), calls)

    def enqueue_one(self, kind: str, number: int) -> None:
        from benchmarks.systems import django_tasks

        getattr(django_tasks, kind).enqueue(number)

    def commands(self, place: Place, threads: int, processes: int) -> list[list[str]]:
        options = [f"--concurrency={threads}", f"--processes={processes}"]
        return [python("-m", "django", "ox_worker", *options)]

    def remaining(self, place: Place, connection: Any) -> int:
        unfinished = "status = 'READY' OR status = 'RUNNING'"
        return scalar(connection, f"SELECT COUNT(*) FROM {_TABLE} WHERE {unfinished}")

    def finished(self, connection: Any) -> int:
        return scalar(
            connection, f"SELECT COUNT(*) FROM {_TABLE} WHERE status = 'SUCCESSFUL'"
        )
