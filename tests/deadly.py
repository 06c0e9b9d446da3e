"""Jobs to die in the middle of, and jobs that take their process with them.

Each says that it has begun by a file named after its label and its attempt, in the
folder that it is given, since nobody sees what is not committed.
"""

import ctypes
import os
import re
import resource
import signal
import sys
from pathlib import Path
from threading import Event, Thread
from time import monotonic

from django.db import connection

from async_queue import current_job
from tests.jobs import leave

_PATIENCE = 90.0  # seconds
_MEMORY = 2**30  # bytes


def hold(label: str, folder: str) -> None:
    """Leave one row, and return when there is a file "go", or "go-" and the attempt."""
    leave(label)
    _say_begun(label, folder)
    _await_go(folder)


def query(label: str, folder: str, sql: str) -> None:
    """Do the same, but the first time do a query that takes long."""
    leave(label)
    if _say_begun(label, folder) == 1:
        with connection.cursor() as cursor:
            cursor.execute(sql)
            cursor.fetchall()
    _await_go(folder)


def fork(label: str, folder: str) -> None:
    """Do the same, but the first time leave a child that outlives the worker."""
    leave(label)
    if _attempt() == 1:
        _fork(Path(folder, f"child-{label}"))
    _say_begun(label, folder)
    _await_go(folder)


def _fork(path: Path) -> None:
    if child := os.fork():
        path.write_text(str(child))
        return
    signal.alarm(round(_PATIENCE))
    signal.pause()
    os._exit(0)


def segfault(label: str) -> None:
    leave(label)
    ctypes.string_at(0)


def abort(label: str) -> None:
    leave(label)
    os.abort()


def exit_at_once(label: str) -> None:
    leave(label)
    os._exit(0)


def exceed_memory(label: str) -> None:
    """Take more memory than the process may have, and be killed for that."""
    leave(label)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    try:
        bytearray(2 * _MEMORY)
    except MemoryError:
        # By the one that does so on a machine that has no more.
        os.kill(os.getpid(), signal.SIGKILL)


def hog(label: str, folder: str, seconds: float) -> None:
    """Leave one row, and let no other thread run for so long."""
    leave(label)
    _say_begun(label, folder)
    others = _Other()
    others.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10 * seconds)
    try:
        until = monotonic() + seconds
        while monotonic() < until:
            _backtrack()
    finally:
        sys.setswitchinterval(interval)
    Path(folder, "hogged").write_text(str(others.end()))


def _backtrack() -> None:
    """Do what is one call, and would keep others waiting in any case."""
    assert not re.search(r"(a+)+$", 18 * "a" + "b")


class _Other(Thread):
    """A thread that sees for how long it was kept from running."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._has_begun = Event()
        self._is_over = Event()
        self._longest = 0.0

    def start(self) -> None:
        super().start()
        self._has_begun.wait()

    def run(self) -> None:
        looked_at = monotonic()
        while not self._is_over.wait(0.01):
            self._has_begun.set()
            now = monotonic()
            self._longest, looked_at = max(self._longest, now - looked_at), now

    def end(self) -> float:
        self._is_over.wait(0.05)
        self._is_over.set()
        self.join()
        return self._longest


def begun(folder: Path, attempt: int) -> set[str]:
    """Return the labels of the jobs whose attempt of this number has begun."""
    return {path.stem for path in folder.glob(f"*.begun-{attempt}")}


def _say_begun(label: str, folder: str) -> int:
    attempt = _attempt()
    Path(folder, f"{label}.begun-{attempt}").touch()
    return attempt


def _await_go(folder: str) -> None:
    deadline, pause = monotonic() + _PATIENCE, Event()
    words = Path(folder, "go"), Path(folder, f"go-{_attempt()}")
    while not any(word.exists() for word in words):
        if monotonic() > deadline:
            raise TimeoutError(f"nobody said go in {folder}")
        pause.wait(0.02)


def _attempt() -> int:
    job = current_job()
    assert job is not None
    return job.attempt
