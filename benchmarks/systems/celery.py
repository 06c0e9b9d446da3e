"""Celery with Redis as its broker, by its prefork worker: a process for each thread.

Jobs are acknowledged late. They are in Redis, whose durability is another.
"""

import os
from typing import Any

from benchmarks.places import Place
from benchmarks.processes import python
from benchmarks.systems.base import System

URL = os.environ.get("REDISURL", "redis://127.0.0.1:6379/0")
# Of all keys of a run.
PREFIX = "BENCHMARKS_PREFIX"


class Celery(System):
    name = "celery"
    package = "celery"
    note = (
        "in Redis, not in the database; a process for each thread, and as it comes a "
        "new connection for each job that needs one"
    )

    def variables(self, place: Place) -> dict[str, str]:
        # That of SQLite's is in a folder of the run's own.
        return {PREFIX: f"aq_benchmarks:{place.name.strip('/')}:"}

    def enqueue(self, kind: str, numbers: range) -> None:
        from benchmarks.systems import celery_tasks

        task = getattr(celery_tasks, kind)
        with celery_tasks.app.producer_or_acquire() as producer:
            for number in numbers:
                task.apply_async((number,), producer=producer)

    def commands(self, place: Place, threads: int, processes: int) -> list[list[str]]:
        application = "benchmarks.systems.celery_tasks"
        options = [f"--concurrency={threads * processes}", "--loglevel=WARNING"]
        return [python("-m", "celery", "-A", application, "worker", *options)]

    def remaining(self, place: Place, connection: Any) -> int:
        with _redis() as client:
            prefix = self.variables(place)[PREFIX]
            queued = client.llen(f"{prefix}celery")
            return int(queued + client.hlen(f"{prefix}unacked"))

    def finished(self, connection: Any) -> None:
        return None

    def cleanup(self, place: Place) -> None:
        with _redis() as client:
            prefix = self.variables(place)[PREFIX]
            for key in client.scan_iter(f"{prefix}*"):
                client.delete(key)


def _redis() -> Any:
    import redis

    return redis.Redis.from_url(URL)
