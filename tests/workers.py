"""``run_workers`` processes for the scenarios; what they say goes into files."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

from django.db import connection

from async_queue.models import Worker
from tests.process import ROOT


class Running:
    """A ``run_workers`` command that was started, and all its processes."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def number(self) -> int:
        """The worker's latest number, 0 before it has one; of a single process."""
        rows = Worker.objects.filter(pid=self.process.pid).order_by("-id")
        return rows.values_list("id", flat=True).first() or 0

    def processes(self) -> list[int]:
        """Return the numbers of the worker processes under it, or its own."""
        return children(self.process.pid) or [self.process.pid]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Let nothing be left of it, as if its machine had gone."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(20)

    def end(self) -> int:
        """Ask it to stop, as an operator would; return its exit code."""
        self.send(signal.SIGTERM)
        return self.process.wait(40)


@contextmanager
def working(
    folder: Path,
    *arguments: str,
    settings: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[Running]:
    """Run ``run_workers`` with these ASYNC_QUEUE settings; kill it in the end."""
    log = folder / f"workers-{monotonic()}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "django", "run_workers", *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "tests.settings",
                "AQ_TEST_DATABASE": str(connection.settings_dict["NAME"]),
                "AQ_TEST_SETTINGS": json.dumps(settings or {}),
                **(environment or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    with killed_at_last(Running(process, log)) as running:
        yield running


@contextmanager
def killed_at_last(running: Running) -> Iterator[Running]:
    """Let nothing be left of it when the block ends, but what it has said."""
    try:
        yield running
    finally:
        running.kill()
        sys.stdout.write(running.said)  # pytest shows it where the test has failed


def registered(*runnings: Running) -> bool:
    """Tell whether each single process has a number and lives."""
    alive = Worker.objects.filter(dead_at=None).values_list("pid", flat=True)
    return {running.process.pid for running in runnings} <= set(alive)


def descendants(pid: int) -> list[int]:
    """Return the numbers of the processes under this one, at all depths."""
    found = children(pid)
    return found + [deeper for child in found for deeper in descendants(child)]


def children(pid: int) -> list[int]:
    """Return the numbers of the processes that this one's threads have started."""
    numbers: list[int] = []
    # Those of a process that has just gone are nobody's.
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            numbers += map(int, (task / "children").read_text().split())
    return numbers


def seconds_until(predicate: Callable[[], object], wait: Callable[..., None]) -> float:
    """Return how long it takes until the predicate is true."""
    began_at = monotonic()
    wait(predicate)
    return monotonic() - began_at
