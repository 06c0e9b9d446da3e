"""SQLite in a file, for one machine; in memory, for tests on one connection.

It has one writer at a time, so the queue's writers stand in line before they begin:
a mutex for the threads, a lock on a byte of a file beside the database for the
processes. A worker holds the byte of its number for as long as its process lives.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.db.base import Concern, Vendor, scalar

try:
    import fcntl
except ImportError:  # Windows, where one process at a time may work
    fcntl = None  # type: ignore[assignment]  # asked for below

_BUSY, _LOCKED = 5, 6
_FOR_EVER = 2**31 - 1
_NETWORKS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "ceph", "afs")
_LINE = 0  # the byte of whoever writes; workers' numbers start at 1


class SQLite(Vendor):
    # Three digits is all its clock has; columns compare as text of six.
    now = "strftime('%%Y-%%m-%%d %%H:%%M:%%f000', 'now')"
    shifted_now = "strftime('%%Y-%%m-%%d %%H:%%M:%%f000', 'now', %s)"
    runs_one_job_at_a_time = True
    # Where Linux tells which folders lie on which kind of file system.
    mounts = Path("/proc/mounts")

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
        if self.is_single_connection(connection):
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
        with _side_file(connection).line(), _patient_writer(connection):
            yield

    def start_session(self, connection: BaseDatabaseWrapper) -> None:
        # Text that is none stops whoever reads it; so it only breaks its row's seal.
        connection.ensure_connection()
        connection.connection.text_factory = lambda raw: raw.decode(errors="replace")

    def rolls_back(self, connection: BaseDatabaseWrapper, error: BaseException) -> bool:
        # As do INSERT OR ROLLBACK, RAISE(ROLLBACK) and a full disk.
        driver = connection.connection
        return driver is not None and not driver.in_transaction

    def is_transient(self, error: BaseException) -> bool:
        code = getattr(error.__cause__, "sqlite_errorcode", 0)
        return code & 0xFF in (_BUSY, _LOCKED)

    def is_inside_transaction(
        self, connection: BaseDatabaseWrapper, has_sent: bool
    ) -> bool:
        return bool(connection.connection.in_transaction)

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
            allowed = "one writes at a time" if fcntl else "Windows allows only one"
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
def _patient_writer(connection: Any) -> Iterator[None]:
    """Begin transactions as a writer at once, and wait for other writers for ever.

    A deferred transaction that has read fails at its first write, without waiting,
    when somebody else wrote meanwhile.
    """
    connection.ensure_connection()
    driver = connection.connection
    (timeout,) = driver.execute("PRAGMA busy_timeout").fetchone()
    driver.execute(f"PRAGMA busy_timeout = {_FOR_EVER}")
    mode = connection.transaction_mode
    connection.transaction_mode = "IMMEDIATE"
    try:
        yield
    finally:
        connection.transaction_mode = mode
        if connection.connection is driver:
            driver.execute(f"PRAGMA busy_timeout = {timeout}")


class _SideFile:
    """The file of locks beside a database.

    POSIX frees a process's locks when it closes any descriptor of the file, so there
    is one for each database and it stays open. They do not keep out threads of the
    same process, hence ``_mine`` and the mutex.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._mutex = Lock()
        self._mine: set[int] = set()

    @contextmanager
    def line(self) -> Iterator[None]:
        """Stand in line for the right to write."""
        with self._mutex:
            if fcntl:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, _LINE)
            try:
                yield
            finally:
                if fcntl:
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _LINE)

    def take(self, number: int) -> bool:
        """Take the byte of a worker; False if somebody lives who has it."""
        if number in self._mine:
            return False
        if fcntl:
            try:
                exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
                fcntl.lockf(self._descriptor, exclusive, 1, number)
            except OSError:
                return False
        self._mine.add(number)
        return True

    def drop(self, number: int) -> None:
        """Give the byte of a worker back."""
        if fcntl:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)
        self._mine.discard(number)


@cache
def _open_side_file(path: str) -> _SideFile:
    return _SideFile(path)


def _side_file(connection: BaseDatabaseWrapper) -> _SideFile:
    return _open_side_file(f"{_path(connection)}-aqlock")


def _path(connection: BaseDatabaseWrapper) -> str:
    name = str(connection.settings_dict["NAME"])
    return os.path.abspath(name.removeprefix("file:").partition("?")[0])
