"""The worker processes of the chaos run, and what is measured of them."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from statistics import median
from threading import Event, Thread
from time import monotonic
from typing import Any, NamedTuple

from django.db import Error, connection

from async_queue.models import LIVE, Job, Status, Worker
from tests.process import ROOT

THREADS = 4
_PAGE = os.sysconf("SC_PAGE_SIZE")
# How a process ends that was told to, or was killed.
_USUAL = (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
_ENDS_IN = 20  # seconds, at most, once it was told to
_LOOK = 0.02
_FORGET = 30.0


class Recovery(NamedTuple):
    """How long the jobs of a killed worker took, in seconds, and how many they were.

    ``rescued``: until they were nobody's; ``running``: until all ran again, elsewhere,
    or had ended. None where that did not happen in half a minute.
    """

    is_calm: bool  # nothing else was broken meanwhile
    jobs: int
    rescued: float | None
    running: float | None


class Member:
    """One place of the fleet: a process of ``run_workers``, or of its successors."""

    def __init__(self, number: int, fleet: "Fleet") -> None:
        self.number = number
        self._fleet = fleet
        self.is_stopped = False
        self.process: subprocess.Popen[bytes] | None = None
        # Moments and bytes of the process that is there.
        self.memory: list[tuple[float, int]] = []

    @property
    def is_up(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        self.memory = []
        self.process = self._fleet.command(
            f"worker-{self.number}", "run_workers", f"--threads={THREADS}"
        )

    def send(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)
        self.is_stopped = number == signal.SIGSTOP

    def end(self, number: signal.Signals) -> None:
        """End it, and wait for that."""
        if not self.is_up:
            return
        assert self.process is not None
        self.send(number)
        try:
            self.process.wait(_ENDS_IN)
        except subprocess.TimeoutExpired:
            self._fleet.notes.append(f"worker-{self.number} did not end by {number!r}")
            self.process.kill()
            self.process.wait()
        self.is_stopped = False

    def note_memory(self) -> None:
        with suppress(OSError):
            assert self.process is not None
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
            self.memory.append((monotonic(), int(pages) * _PAGE))


class Fleet:
    """Three processes of four threads each; the first one is never killed."""

    def __init__(
        self, database: dict[str, Any], folder: Path, control: str | None
    ) -> None:
        self._database = database
        self._control = control
        self.folder = folder
        self.notes: list[str] = []
        self.recoveries: list[Recovery] = []
        self._watches: list[Thread] = []
        self.members = [Member(number, self) for number in range(3)]
        self.others: list[subprocess.Popen[bytes]] = []

    def command(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a command of Django's, which writes to a file of this name."""
        database = dict(self._database)
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "django", *command],
                cwd=ROOT,
                env={
                    **os.environ,
                    "AQ_TEST_DATABASE": str(database.pop("NAME")),
                    "AQ_TEST_OPTIONS": json.dumps(database),
                    "AQ_CONTROL": self._control or "",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def flush(self) -> None:
        """Run one pass of ``flush_queue`` beside the workers."""
        self.others = [process for process in self.others if process.poll() is None]
        if len(self.others) < 2:
            command = ("flush_queue", "--keep-going", "--threads=2", "--deadline=5s")
            self.others.append(self.command("flush", *command))

    def start(self) -> None:
        for member in self.members:
            member.start()

    def keep_up(self) -> None:
        """Start those that have ended, by whatever it was."""
        for member in self.members:
            if not member.is_up:
                assert member.process is not None
                if (code := member.process.returncode) not in _USUAL:
                    self.notes.append(f"worker-{member.number} ended with {code}")
                member.start()

    def show_stacks(self) -> None:
        """Let each process write to its log where all its threads stand."""
        for member in self.members:
            if member.is_up:
                member.send(signal.SIGQUIT)

    def stop(self) -> None:
        for process in [*(member.process for member in self.members), *self.others]:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for member in self.members:
            member.end(signal.SIGTERM)
        for process in self.others:
            process.wait(_ENDS_IN)

    def destroy(self) -> None:
        for process in [*(member.process for member in self.members), *self.others]:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()

    def kill(self, member: Member, *, is_calm: bool = False) -> Thread | None:
        """Kill a worker, and watch what becomes of its jobs."""
        if not member.is_up:
            return None
        assert member.process is not None
        number = _number_of(member.process.pid)
        at = monotonic()
        member.end(signal.SIGKILL)
        watch = Thread(target=self._watch, args=(number, at, is_calm), daemon=True)
        watch.start()
        self._watches.append(watch)
        return watch

    def await_watches(self) -> None:
        for watch in self._watches:
            watch.join()

    def _watch(self, worker: int | None, at: float, is_calm: bool) -> None:
        try:
            held = dict(_held_by(worker).values_list("pk", "attempt"))
            if held:
                found = _await_recovery(worker, held, at)
                self.recoveries.append(Recovery(is_calm, len(held), *found))
        except Error:  # the server went away, too
            pass
        finally:
            connection.close()


def _number_of(pid: int) -> int | None:
    try:
        workers = Worker.objects.filter(pid=pid, dead_at=None).order_by("-pk")
        return workers.values_list("pk", flat=True).first()
    except Error:
        connection.close()
        return None


def _held_by(worker: int | None) -> Any:
    return Job.objects.filter(status=Status.RUNNING, worker_id=worker or -1)


def _await_recovery(
    worker: int | None, held: dict[int, int], at: float
) -> tuple[float | None, float | None]:
    rescued: float | None = None
    pause = Event()
    while monotonic() - at < _FORGET:
        rows = Job.objects.filter(pk__in=held, status__in=LIVE)
        left = [
            pk
            for pk, attempt in rows.values_list("pk", "attempt")
            if attempt == held[pk]
        ]
        if rescued is None and not _held_by(worker).exists():
            rescued = monotonic() - at
        if not left:
            return rescued, monotonic() - at
        pause.wait(_LOOK)
    return rescued, None


def told(recoveries: list[Recovery], *, is_calm: bool) -> dict[str, Any]:
    """Return the median and the worst of them, in milliseconds."""
    mine = [each for each in recoveries if each.is_calm == is_calm]
    figures: dict[str, Any] = {
        "kills": len(mine),
        "jobs": sum(each.jobs for each in mine),
        "never": sum(each.running is None for each in mine),
    }
    for name in ("rescued", "running"):
        times = [getattr(each, name) for each in mine]
        times = [round(1000 * each) for each in times if each is not None]
        if times:
            figures[f"{name} ms"] = {"median": median(times), "worst": max(times)}
    return figures
