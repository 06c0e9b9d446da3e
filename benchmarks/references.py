"""The references: what the database itself allows, on the rows of our own job table.

``python -m benchmarks.references R --threads 4`` runs what is READY, and then waits to
be told to end. None of them has a heartbeat, a fence or anything else: what lies
between them and async_queue is the price of being a queue.

R  the plain driver: each thread has a connection of its own, claims 10 jobs by the same
   statements as async_queue, and for each of them sends BEGIN, SELECT ... FOR UPDATE,
   the job's INSERT, the UPDATE that makes it SUCCESSFUL, and COMMIT
E  the same without the row's lock
D  the bare Django loop: the same claims, by the threads of a pool, then `atomic`, the
   job's own function with its `objects.create()`, and the UPDATE by Django's cursor
"""

import argparse
import json
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from threading import Lock, Thread
from typing import Any

from benchmarks.ledger import record
from benchmarks.places import connect
from benchmarks.systems.base import KINDS

_JOB = "async_queue_job"
_NOW = {
    "postgres": "statement_timestamp()",
    "mariadb": "UTC_TIMESTAMP(6)",
    "sqlite": "STRFTIME('%Y-%m-%d %H:%M:%f', 'NOW')",
}
# SQLite has one writer at a time, for which the threads of a process need not poll.
_turn = Lock()


def main() -> None:
    loops = {"R": _raw, "E": _raw, "D": _django}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.references",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reference", choices=loops)
    parser.add_argument("--db", choices=_NOW, required=True)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("name", help="of the database")
    options = parser.parse_args()
    if options.reference == "D":
        import django

        django.setup()
    threads = [
        Thread(target=loops[options.reference], args=(options,), daemon=True)
        for _ in range(options.threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    signal.pause()


def _raw(options: argparse.Namespace) -> None:
    kinds = {"postgres": _Postgres, "mariadb": _MariaDB, "sqlite": _SQLite}
    with closing(kinds[options.db](options.name, options.reference == "R")) as session:
        while jobs := session.claim():
            for job in jobs:
                session.run(*job)


class _Session:
    """A connection of the driver's, and the statements that are sent there."""

    vendor: str
    mark = "%s"
    lock = " FOR UPDATE"

    def __init__(self, name: str, locks: bool) -> None:
        self._connection = connect(self.vendor, name)
        self._cursor = self._connection.cursor()
        self._locks = locks
        self._select = f"SELECT status FROM {_JOB} WHERE id = {self.mark}{self.lock}"
        self._insert = f"INSERT INTO benchmarks_effect (number) VALUES ({self.mark})"
        self._succeed = succeed(self.vendor, self.mark)

    def claim(self) -> Any:
        """Return the id, the function and the arguments of up to 10 jobs."""
        self.begin()
        jobs = claim(self._cursor, self.vendor, self.mark)
        self.commit()
        return jobs

    def run(self, number: int, function: str, args: str) -> None:
        self.begin()
        if self._locks:
            self._cursor.execute(self._select, (number,))
            self._cursor.fetchall()
        (given,) = json.loads(args)
        record(given)
        if function.endswith(".insert"):
            self._cursor.execute(self._insert, (given,))
        self._cursor.execute(self._succeed, (number,))
        self.commit()

    def begin(self) -> None:
        raise NotImplementedError

    def commit(self) -> None:
        self._connection.commit()

    def close(self) -> None:
        self._connection.close()


class _Postgres(_Session):
    vendor = "postgres"

    def claim(self) -> Any:
        self._connection.autocommit = True
        jobs = claim(self._cursor, self.vendor, self.mark)
        self._connection.autocommit = False
        return jobs

    def begin(self) -> None:
        """Leave it to the driver, which sends it with the first statement."""


class _MariaDB(_Session):
    vendor = "mariadb"

    def begin(self) -> None:
        self._connection.begin()


class _SQLite(_Session):
    vendor = "sqlite"
    mark = "?"
    lock = ""

    def begin(self) -> None:
        _turn.acquire()
        self._cursor.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._connection.commit()
        _turn.release()


def _django(options: argparse.Namespace) -> None:
    from django.db import connection, transaction

    from benchmarks import work

    functions: dict[str, Callable[[int], None]] = {
        f"benchmarks.work.{kind}": getattr(work, kind) for kind in KINDS
    }
    is_one, is_sqlite = options.db == "postgres", options.db == "sqlite"
    turn: AbstractContextManager[Any] = _turn if is_sqlite else nullcontext()
    update = succeed(options.db, "%s")
    while True:
        block = nullcontext() if is_one else transaction.atomic()
        with turn, block, connection.cursor() as cursor:
            jobs = claim(cursor, options.db, "%s")
        if not jobs:
            return
        for number, function, args in jobs:
            with turn, transaction.atomic():
                functions[function](*json.loads(args))
                with connection.cursor() as cursor:
                    cursor.execute(update, (number,))


def claim(cursor: Any, vendor: str, mark: str) -> Any:
    """Make up to 10 READY jobs RUNNING; return their ids, functions and arguments.

    In one statement on PostgreSQL; in two elsewhere, which the caller puts into one
    transaction.
    """
    quote = "`" if vendor == "mariadb" else '"'
    locking = "" if vendor == "sqlite" else "FOR UPDATE SKIP LOCKED"
    pick = (
        f"SELECT {{}} FROM {_JOB} WHERE status = 'READY' AND suspect = FALSE AND "
        f"queue = 'default' ORDER BY {quote}rank{quote}, run_after, id LIMIT 10 "
        f"{locking}"
    )
    take = (
        "SET status = 'RUNNING', attempt = attempt + 1, worker_id = 1, "
        f"started_at = {_now(vendor, mark)}"
    )
    if vendor == "postgres":
        cursor.execute(
            f"WITH picked AS MATERIALIZED ({pick.format('id')}) UPDATE {_JOB} AS job "
            f"{take} FROM picked WHERE job.id = picked.id "
            "RETURNING job.id, job.function, job.args"
        )
        return cursor.fetchall()
    cursor.execute(pick.format(f"id, {quote}function{quote}, args"))
    if jobs := cursor.fetchall():
        marks = ", ".join([mark] * len(jobs))
        ids = tuple(number for number, *_ in jobs)
        cursor.execute(f"UPDATE {_JOB} {take} WHERE id IN ({marks})", ids)
    return jobs


def succeed(vendor: str, mark: str) -> str:
    """Return the statement that makes a job SUCCESSFUL."""
    return (
        f"UPDATE {_JOB} SET status = 'SUCCESSFUL', worker_id = NULL, "
        f"finished_at = {_now(vendor, mark)} WHERE id = {mark}"
    )


def _now(vendor: str, mark: str) -> str:
    # Django's cursor takes %s on SQLite too, and then a percent sign is two.
    return _NOW[vendor].replace("%", "%%") if mark == "%s" else _NOW[vendor]


if __name__ == "__main__":
    main()
