"""The file of locks beside a SQLite database: the writers' line, the workers' lives."""

import os
import sqlite3
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from threading import Lock, Timer, get_ident

from django.db.utils import OperationalError

try:
    import fcntl
except ImportError:  # Windows, where one process at a time may work
    fcntl = None  # type: ignore[assignment]  # asked for below

HAS_PROCESSES = fcntl is not None
_LINE = 0  # the byte of whoever writes; workers' numbers start at 1
_PAUSES = (0.001, 0.02)  # seconds, from first to longest, between two looks at it
# Seconds after which who waits comes before threads that have not waited at all. Those
# need nobody to be woken, and so are far faster.
_LONG = 0.01
# Seconds, at most, for which a turn is kept for whoever has taken it away: longer
# than it takes to end the session that had it.
_KEPT = 2.0


class Place:
    """One thread's place in the line, which it loses to others when it is ended."""

    # The thread that takes this turn over as soon as it has something to write.
    heir: int | None = None
    # Since when it waits, by the monotonic clock.
    since = 0.0

    def __init__(self) -> None:
        self._word = Lock()
        self._word.acquire()

    def wait(self, seconds: float | None) -> None:
        self._word.acquire(timeout=-1 if seconds is None else seconds)

    def wake(self) -> None:
        with suppress(RuntimeError):  # it was, and has not noticed yet
            self._word.release()


class SideFile:
    """The locks of this process for one database.

    POSIX frees a process's locks when it closes any descriptor of the file, so there
    is one for each database and it stays open. They do not keep out threads of the
    same process, hence ``_mine`` and ``_writer``.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.forget()

    def forget(self) -> None:
        """Hold nothing, as a forked child does: locks are their process's."""
        self._mine: set[int] = set()
        # Whose turn it is to write; the byte is his, or he is waiting for it.
        self._writer: Place | None = None
        self._waiting: deque[Place] = deque()
        self._lock = Lock()

    @contextmanager
    def line(self, place: Place, deadline: float | None) -> Iterator[None]:
        """Stand in line for the right to write, until ``deadline`` at most."""
        self._enter(place, deadline)
        try:
            yield
        finally:
            self.leave(place)

    def leave(self, place: Place) -> None:
        """Let the next one write, unless it is no longer this one's turn anyway."""
        with self._lock:
            if self._writer is not place:
                return
            self._unlock(_LINE)
            self._writer = None
            self._wake_first()

    def _wake_first(self) -> None:
        if self._waiting:
            first = self._waiting[0]
            if time.monotonic() - first.since > _LONG:
                self._writer = first
            first.wake()

    def inherit(self, place: Place) -> None:
        """Take the turn away from a thread that hangs, for what this one writes next.

        Nobody comes between, of other processes neither.
        """
        with self._lock:
            if self._writer is not place:
                return
            self._writer = kept = Place()
            kept.heir = get_ident()
        later = Timer(_KEPT, self.leave, [kept])
        later.daemon = True
        with suppress(RuntimeError):  # at the end of the interpreter: soon it is free
            later.start()

    def _enter(self, place: Place, deadline: float | None) -> None:
        try:
            self._wait(place, deadline)
            self._lock_line(deadline)
            self._check(place)
        except BaseException:
            self.leave(place)
            raise

    def _wait(self, place: Place, deadline: float | None) -> None:
        try:
            while not self._comes_next(place):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise busy("another thread writes to the database")
                place.wait(left)
        finally:
            self._forget(place)

    def _comes_next(self, place: Place) -> bool:
        """Tell whether it is the turn of this one, who else stands in line."""
        with self._lock:
            if self._is_free():
                self._writer = place
            elif self._writer is not place and place not in self._waiting:
                place.since = time.monotonic()
                self._waiting.append(place)
            return self._writer is place

    def _forget(self, place: Place) -> None:
        with self._lock:
            if place in self._waiting:
                self._waiting.remove(place)
                # Word that was for this one may be for nobody.
                if self._writer is None:
                    self._wake_first()

    def _is_free(self) -> bool:
        return self._writer is None or self._writer.heir == get_ident()

    def _lock_line(self, deadline: float | None) -> None:
        if deadline is None:
            if fcntl:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, _LINE)
            return
        pause, longest = _PAUSES
        while not self._try_lock(_LINE):
            if time.monotonic() > deadline:
                raise busy("another process writes to the database")
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _check(self, place: Place) -> None:
        """Raise if the place was taken away while its thread waited for the byte."""
        with self._lock:
            if self._writer is place:
                return
            # It has come all the same; another thread may count on it already.
            if self._writer is None:
                self._unlock(_LINE)
            raise OperationalError("this session was ended while it waited to write")

    def take(self, number: int) -> bool:
        """Take the byte of a worker; False if somebody lives who has it."""
        if number in self._mine or not self._try_lock(number):
            return False
        self._mine.add(number)
        return True

    def drop(self, number: int) -> None:
        """Give the byte of a worker back."""
        self._unlock(number)
        self._mine.discard(number)

    def _try_lock(self, byte: int) -> bool:
        if fcntl:
            try:
                exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
                fcntl.lockf(self._descriptor, exclusive, 1, byte)
            except OSError:
                return False
        return True

    def _unlock(self, byte: int) -> None:
        if fcntl:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, byte)


def busy(reason: str) -> OperationalError:
    """Return the error of SQLite's that says: try again later."""
    cause = sqlite3.OperationalError(f"database is locked: {reason}")
    cause.sqlite_errorcode = sqlite3.SQLITE_BUSY
    error = OperationalError(*cause.args)
    error.__cause__ = cause
    return error


_open_files: list[SideFile] = []


@cache
def open_side_file(path: str) -> SideFile:
    """Return this process's locks in the file at ``path``."""
    _open_files.append(file := SideFile(path))
    return file


def _forget_all() -> None:
    for file in _open_files:
        file.forget()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_all)
