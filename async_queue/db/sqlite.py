"""SQLite in a file, for one machine; in memory, for tests on one connection.

It has one writer at a time, so the queue's writers stand in line before they begin,
in a file beside the database, where a worker holds the byte of its number for as long
as its process lives; see `async_queue.db.sidefile`.
"""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import Error

from async_queue.db.base import Concern, Vendor, scalar
from async_queue.db.sidefile import HAS_PROCESSES, Place, SideFile, open_side_file

_TRANSIENT = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_FOR_EVER = 2**31 - 1
# Seconds that the end of a session waits for a statement under way: before it is
# interrupted, before it is again, and in all; and how often that is done afterwards.
_STATEMENT, _LOOK, _LEAVING = 0.05, 0.005, 1.0
_AGAIN = 5
_NETWORKS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "ceph", "afs")


class _Closed:
    """Stands in for the driver's connection where its thread shall use it no more."""

    def __getattr__(self, name: str) -> NoReturn:
        raise sqlite3.ProgrammingError("Cannot operate on a closed database.")

    def close(self) -> None:
        """Do nothing: Django closes what is closed."""


class _Ended(_Closed):
    """The same, while another thread rolls back what is open, for good.

    Only its own thread closes the connection. With a thread inside SQLite that would
    crash the process, and with a cursor that was not read to its end it would roll
    nothing back.
    """

    def __init__(self, driver: sqlite3.Connection) -> None:
        self._driver = driver
        self._is_over = Event()

    def close(self) -> None:
        self._is_over.wait()
        self._driver.close()

    def end(self) -> None:
        """Return when nothing is open any more, or is waited for no longer."""
        try:
            Thread(target=self._roll_back, daemon=True).start()
        except RuntimeError:  # at the end of the interpreter
            self._interrupt()
            self._roll_back()
        deadline = time.monotonic() + _LEAVING
        # An interrupt would stop the rollback, too, so it comes only where a statement
        # is under way and keeps that waiting.
        self._is_over.wait(_STATEMENT)
        while not self._is_over.wait(_LOOK) and time.monotonic() < deadline:
            self._interrupt()
        # One may begin still, with a cursor that was at hand.
        for _ in range(_AGAIN):
            self._interrupt()
            time.sleep(_LOOK)

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):
            # First, or the thread's next statement would commit by itself.
            self._driver.execute("PRAGMA query_only = 1")
        with suppress(sqlite3.Error):
            self._driver.rollback()
        self._is_over.set()

    def _interrupt(self) -> None:
        with suppress(sqlite3.Error):  # its thread has closed it
            self._driver.interrupt()


class _Session(NamedTuple):
    """By what another thread ends this one's session, and its turn."""

    connection: BaseDatabaseWrapper
    driver: sqlite3.Connection
    place: Place | None


class SQLite(Vendor):
    # Three digits is all its clock has; columns compare as text of six.
    now = "strftime('%%Y-%%m-%%d %%H:%%M:%%f000', 'now')"
    shifted_now = "strftime('%%Y-%%m-%%d %%H:%%M:%%f000', 'now', %s)"
    runs_one_job_at_a_time = True
    has_heartbeat = False
    # As long as others wait to write, if their project says nothing else.
    long_transaction = 5.0
    harm_of_long_transactions = "everybody else from writing"
    # Where Linux tells which folders lie on which kind of file system.
    mounts = Path("/proc/mounts")

    def __init__(self) -> None:
        # By the connection, which one thread uses.
        self._patience: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        self._places: WeakKeyDictionary[Any, Place] = WeakKeyDictionary()

    def shift(self, seconds: float) -> Any:
        return f"{seconds:+.6f} seconds"

    def is_single_connection(self, connection: Any) -> bool:
        return bool(connection.is_in_memory_db())

    def private_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        own = super().private_settings(settings)
        # A moment that is none stops whoever converts it; `read_moment` does not mind.
        own["OPTIONS"]["detect_types"] = 0
        return own

    def prepare(self, connection: BaseDatabaseWrapper) -> str | None:
        if self.is_single_connection(connection) or _journal_mode(connection) == "wal":
            return None
        with self.turn(connection), connection.cursor() as cursor:
            if _journal_mode(connection) == "wal":
                return None
            cursor.execute("PRAGMA journal_mode = wal")
        return "switched the SQLite database to WAL, which workers need"

    @contextmanager
    def turn(self, connection: BaseDatabaseWrapper) -> Iterator[None]:
        if self.is_single_connection(connection):
            yield
            return
        patience = self._patience.get(connection)
        deadline = None if patience is None else time.monotonic() + patience
        place = self._places[connection] = Place()
        try:
            with (
                _side_file(connection).line(place, deadline),
                _patient_writer(connection, deadline),
            ):
                yield
        finally:
            self._places.pop(connection, None)

    def start_session(
        self, connection: BaseDatabaseWrapper, patience: float | None = None
    ) -> None:
        # Text that is none stops whoever reads it; so it only breaks its row's seal.
        connection.ensure_connection()
        connection.connection.text_factory = lambda raw: raw.decode(errors="replace")
        # With some statistics it would make an index of its own for each tick.
        connection.connection.execute("PRAGMA automatic_index = OFF")
        if patience is not None:
            self._patience[connection] = patience

    def rolls_back(self, connection: BaseDatabaseWrapper, error: BaseException) -> bool:
        # As do INSERT OR ROLLBACK, RAISE(ROLLBACK) and a full disk.
        return connection.connection is not None and not _is_in_transaction(connection)

    def is_transient(self, error: BaseException) -> bool:
        code = getattr(error.__cause__, "sqlite_errorcode", 0)
        return code & 0xFF in _TRANSIENT

    def is_session_lost(
        self, connection: BaseDatabaseWrapper, error: BaseException
    ) -> bool:
        return isinstance(error, Error) and "closed database" in str(error)

    def is_inside_transaction(
        self, connection: BaseDatabaseWrapper, has_sent: bool
    ) -> bool:
        return connection.connection is None or _is_in_transaction(connection)

    def is_in_transaction(self, connection: BaseDatabaseWrapper) -> bool:
        return connection.connection is not None and _is_in_transaction(connection)

    def setting_concerns(
        self, connection: BaseDatabaseWrapper, *, threads: int, processes: int
    ) -> Iterator[Concern]:
        # By this name only: a test run's database in memory is meant to be there.
        if connection.settings_dict["NAME"] == ":memory:":
            yield Concern(
                "memory",
                "The SQLite database is in memory: no other process sees its jobs.",
                "Give the database a file, or run its jobs in this process.",
            )
        if processes > 1:
            allowed = (
                "one writes at a time" if HAS_PROCESSES else "Windows allows only one"
            )
            yield Concern(
                "processes",
                f"{processes} worker processes are set for SQLite, where {allowed}.",
                "Leave ASYNC_QUEUE['PROCESSES'] at 1, or use PostgreSQL or MariaDB.",
            )

    def server_concerns(
        self, connection: BaseDatabaseWrapper, *, threads: int
    ) -> Iterator[Concern]:
        yield from super().server_concerns(connection, threads=threads)
        if self.is_single_connection(connection):
            return
        if kind := _network_of(_path(connection), self.mounts):
            yield Concern(
                "network",
                f"The SQLite database lies on a network ({kind}), whose locks do not "
                "keep other machines out: it may be damaged.",
                "Move it to a local disk, or use PostgreSQL or MariaDB.",
            )
        # Workers switch a database to WAL, but not one that is switched back.
        init = connection.settings_dict["OPTIONS"].get("init_command") or ""
        if "journal_mode" in init.lower() and _journal_mode(connection) != "wal":
            yield Concern(
                "journal",
                "The project's init_command takes the SQLite database out of WAL mode, "
                "which workers need.",
                "Write PRAGMA journal_mode = WAL there, or leave it out.",
            )

    def oldest(self, connection: BaseDatabaseWrapper) -> tuple[str, tuple[int, ...]]:
        return "SQLite", (3, 35)

    def take_life(self, connection: BaseDatabaseWrapper, worker: int) -> bool:
        if self.is_single_connection(connection):
            return False
        return _side_file(connection).take(worker)

    def drop_life(self, connection: BaseDatabaseWrapper, worker: int) -> None:
        if not self.is_single_connection(connection):
            _side_file(connection).drop(worker)

    def session_of(self, connection: BaseDatabaseWrapper) -> Any:
        driver = connection.connection
        if driver is None or self.is_single_connection(connection):
            return None
        place = self._places.get(connection)
        return _Session(connection, driver, place)

    def end_session(self, connection: BaseDatabaseWrapper, session: Any) -> bool:
        if session is None:
            return False
        theirs, driver, place = session
        current = self._places.get(theirs)
        if theirs.connection is not driver or place not in (None, current):
            return False
        # At once, so that whatever the thread does next through Django fails.
        theirs.connection = ended = _Ended(driver)
        if current is not None:
            # Before the thread can leave it to others, who may be long.
            _side_file(theirs).inherit(current)
        ended.end()
        return True

    def data_version(self, connection: BaseDatabaseWrapper) -> int | None:
        if connection.connection is None:
            connection.ensure_connection()
        # Past Django's cursor, which takes ten times as long as SQLite.
        with connection.wrap_database_errors:
            row = connection.connection.execute("PRAGMA data_version").fetchone()
        return int(row[0])

    def leave_to_parent(self, connection: BaseDatabaseWrapper) -> None:
        connection.connection = _Closed()


def _is_in_transaction(connection: BaseDatabaseWrapper) -> bool:
    try:
        return bool(connection.connection.in_transaction)
    except sqlite3.ProgrammingError:  # closed
        return False


def _journal_mode(connection: BaseDatabaseWrapper) -> str:
    return str(scalar(connection, "PRAGMA journal_mode", ()))


def _network_of(path: str, mounts: Path) -> str | None:
    """Return the kind of network file system that holds ``path``, if it is one."""
    if not mounts.exists():
        return None
    folders = set(map(str, Path(path).resolve().parents))
    entries = [line.split() for line in mounts.read_text(errors="replace").splitlines()]
    kinds = {entry[1].replace("\\040", " "): entry[2] for entry in entries}
    nearest = max(folders & kinds.keys(), key=len, default="")
    return kinds[nearest] if kinds.get(nearest) in _NETWORKS else None


@contextmanager
def _patient_writer(connection: Any, deadline: float | None) -> Iterator[None]:
    """Begin transactions as a writer at once, and wait for others until ``deadline``.

    A deferred transaction that has read fails at its first write, without waiting,
    when somebody else wrote meanwhile.
    """
    connection.ensure_connection()
    driver = connection.connection
    with connection.wrap_database_errors:
        (timeout,) = driver.execute("PRAGMA busy_timeout").fetchone()
        driver.execute(f"PRAGMA busy_timeout = {_milliseconds_until(deadline)}")
    mode = connection.transaction_mode
    connection.transaction_mode = "IMMEDIATE"
    try:
        yield
    finally:
        connection.transaction_mode = mode
        with suppress(sqlite3.Error):  # closed by the job, or ended just now
            if connection.connection is driver:
                driver.execute(f"PRAGMA busy_timeout = {timeout}")


def _milliseconds_until(deadline: float | None) -> int:
    if deadline is None:
        return _FOR_EVER
    return max(0, round(1000 * (deadline - time.monotonic())))


def _side_file(connection: BaseDatabaseWrapper) -> SideFile:
    return open_side_file(f"{_path(connection)}-aqlock")


def _path(connection: BaseDatabaseWrapper) -> str:
    name = str(connection.settings_dict["NAME"])
    return os.path.abspath(name.removeprefix("file:").partition("?")[0])
