"""Worker processes on a database that a test may hurt, and how they have done."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

from django.db import connection, transaction

from async_queue import schedule_many
from async_queue.models import FINAL, Attempt, Job, Progress, Status, Worker
from tests.hosts import Host
from tests.models import Effect
from tests.process import ROOT
from tests.stepping import database_settings, elsewhere
from tests.workers import Running, killed_at_last, working

Settings = Mapping[str, Any]


def employed(
    folder: Path, *arguments: str, on: Settings | None = None, **queue: Any
) -> AbstractContextManager[Running]:
    """Run ``run_workers`` on the database ``on``; ``queue`` are settings of ours."""
    environment = _database_of(on) if on else {}
    return working(folder, *arguments, settings=queue, environment=environment)


@contextmanager
def employed_at(
    host: Host, folder: Path, *arguments: str, on: Settings, **queue: Any
) -> Iterator[Running]:
    """Do the same on another machine."""
    log = folder / f"{host.name}.log"
    environment = {
        **os.environ,
        **_database_of(on),
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "AQ_TEST_SETTINGS": json.dumps(queue),
    }
    command = (sys.executable, "-m", "django", "run_workers", *arguments)
    with log.open("wb") as output:
        process: Any = host.run(
            *command, cwd=ROOT, env=environment, stdout=output, stderr=output
        )
    with killed_at_last(Running(process, log)) as running:
        yield running


def _database_of(settings: Settings) -> dict[str, str]:
    return {
        "AQ_TEST_DATABASE": str(settings["NAME"]),
        "AQ_TEST_OPTIONS": json.dumps(dict(settings)),
    }


@contextmanager
def at_database(settings: Settings) -> Iterator[None]:
    """Let this test, too, work on the database of ``settings``, which is emptied."""
    with database_settings({}, **settings):
        for model in (Progress, Attempt, Job, Worker, Effect):
            model.objects.all().delete()
        yield


@contextmanager
def uncommitted(act: Callable[[], object]) -> Iterator[None]:
    """Do something in a transaction that stays open until the block ends."""
    is_done, may_end = Event(), Event()

    def hold() -> None:
        with transaction.atomic():
            act()
            is_done.set()
            assert may_end.wait(60)
            transaction.set_rollback(True)

    future = elsewhere(hold)
    try:
        assert is_done.wait(20)
        yield
    finally:
        may_end.set()
        future.result(20)


def schedule_work(count: int, seconds: float = 0.0, label: str = "job") -> None:
    """Schedule jobs that leave a row each; one in a hundred takes a second."""
    calls = [
        ("tests.jobs.take_time", [f"{label}-{i}", 1.0 if i % 100 == 99 else seconds])
        for i in range(count)
    ]
    schedule_many(calls)


def counted() -> Counter[str]:
    """Return how many jobs there are by status."""
    return Counter(Job.objects.values_list("status", flat=True))


def count_successes() -> int:
    return Job.objects.filter(status=Status.SUCCESSFUL).count()


def is_drained() -> bool:
    return not Job.objects.exclude(status__in=FINAL).exists()


def held_by_others(worker: int) -> bool:
    """Tell whether jobs are RUNNING under another number than this one."""
    running = Job.objects.filter(status=Status.RUNNING)
    return running.exclude(worker_id=worker).exists()


def cpu_seconds(pid: int) -> float:
    """Return for how long a process has had a processor."""
    # Of each thread, in nanoseconds; what counts in ticks is too coarse here.
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in threads) / 1e9


def is_stopped(pid: int) -> bool:
    """Tell whether a process stands still after a SIGSTOP."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def let_pass(seconds: float) -> None:
    """Let a fault last."""
    Event().wait(seconds)


class Stopwatch:
    """Tells the seconds since it was made."""

    def __init__(self) -> None:
        self._since = monotonic()

    def seconds(self) -> float:
        return monotonic() - self._since


def server_version() -> str:
    numbers = ".".join(map(str, connection.get_database_version()))
    return f"{connection.display_name} {numbers}"
