"""async_queue, by ``run_workers``."""

from collections.abc import Mapping
from typing import Any

from benchmarks.places import Place
from benchmarks.processes import python
from benchmarks.systems.base import System, scalar

_AT_ONCE = 50_000  # jobs, all of which are returned


class AsyncQueue(System):
    package = "async_queue"

    def __init__(self, name: str = "async_queue", queues: int = 1) -> None:
        self.name = name  # type: ignore[misc]  # each has its own
        self._queues = queues

    def wanted(self, place: Place, threads: int, processes: int) -> Mapping[str, Any]:
        return {"INSTALLED_APPS": ["async_queue"]}

    def enqueue(self, kind: str, numbers: range) -> None:
        from async_queue import schedule_many

        for queue in range(self._queues):
            name = f"queue-{queue}" if queue else "default"
            own = numbers[queue :: self._queues]
            calls = [(f"benchmarks.work.{kind}", [number]) for number in own]
            for start in range(0, len(calls), _AT_ONCE):
                schedule_many(calls[start : start + _AT_ONCE], queue=name)

    def enqueue_one(self, kind: str, number: int) -> None:
        from async_queue import schedule

        schedule(f"benchmarks.work.{kind}", [number])

    def commands(self, place: Place, threads: int, processes: int) -> list[list[str]]:
        options = [f"--threads={threads}", f"--processes={processes}"]
        return [python("-m", "django", "run_workers", *options)]

    def remaining(self, place: Place, connection: Any) -> int:
        return scalar(
            connection,
            "SELECT COUNT(*) FROM async_queue_job WHERE status = 'RUNNING' "
            "OR status = 'READY' OR status = 'WAITING'",
        )

    def finished(self, connection: Any) -> int:
        return scalar(
            connection,
            "SELECT COUNT(*) FROM async_queue_job WHERE status = 'SUCCESSFUL'",
        )
