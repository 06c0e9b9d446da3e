"""huey on PostgreSQL or in a file of SQLite's own, by ``run_huey`` with threads."""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from benchmarks.places import Place
from benchmarks.processes import python
from benchmarks.systems.base import System, scalar


class Huey(System):
    name = "huey"
    package = "huey"
    vendors = ("sqlite", "postgres")
    note = "a job is deleted before it runs, and lost with its process"

    def wanted(self, place: Place, threads: int, processes: int) -> Mapping[str, Any]:
        server = place.database
        made: dict[str, Any] = {
            "huey_class": "huey.SqliteHuey",
            "connection": {"filename": str(_file(place))},
        }
        if place.vendor == "postgres":
            keys = {"HOST": "host", "PORT": "port", "USER": "user", "NAME": "dbname"}
            made = {
                "huey_class": "huey.PostgresHuey",
                "connection": {word: server[key] for key, word in keys.items()}
                | {"password": server["PASSWORD"]},
            }
        return {
            # The first has the command, the second the tasks.
            "INSTALLED_APPS": ["huey.contrib.djhuey", __name__],
            "HUEY": {"name": "benchmarks", "immediate": False, **made},
        }

    def enqueue(self, kind: str, numbers: range) -> None:
        from benchmarks.systems.huey import tasks

        task = getattr(tasks, kind)
        for number in numbers:
            task(number)

    def commands(self, place: Place, threads: int, processes: int) -> list[list[str]]:
        options = [f"--workers={threads}", "--worker-type=thread"]
        return [python("-m", "django", "run_huey", *options)] * processes

    def remaining(self, place: Place, connection: Any) -> int:
        if place.vendor == "postgres":
            return scalar(connection, "SELECT COUNT(*) FROM huey_task")
        with closing(sqlite3.connect(_file(place))) as own:
            return scalar(own, "SELECT COUNT(*) FROM task")

    def finished(self, connection: Any) -> None:
        return None


def _file(place: Place) -> Any:
    return place.folder / "huey"
