"""The database of one run: made for it, and gone with it.

On the servers that run on this machine, as they are configured: PostgreSQL at PGHOST,
PGPORT, PGUSER and PGPASSWORD, MariaDB at MYSQL_HOST and so on; SQLite in a file.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import ledger

ROOT = Path(__file__).parent.parent
VENDORS = ("sqlite", "postgres", "mariadb")
_ENGINES = {"sqlite": "sqlite3", "postgres": "postgresql", "mariadb": "mysql"}
_ADMINISTRATION = {"postgres": "postgres", "mariadb": "mysql"}
_numbers = count(1)
_LONGEST = 1800  # seconds that a call may take
_ERROR = 1200  # characters that are shown of one


class Failed(Exception):
    """A process of a run has failed; with the end of what it wrote."""


@dataclass(frozen=True)
class Place:
    """A database, a folder for what processes write, and what is given to these.

    ``wanted`` are settings for Django, ``variables`` of the environment.
    """

    vendor: str
    name: str
    folder: Path
    wanted: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger"

    @property
    def database(self) -> dict[str, Any]:
        """Return the entry in DATABASES."""
        return {**_server(self.vendor), **_options(self.vendor), "NAME": self.name}

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of all processes that have to do with the run."""
        return {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "benchmarks.settings",
            "BENCHMARKS_DATABASE": json.dumps(self.database),
            "BENCHMARKS_SETTINGS": json.dumps(self.wanted),
            ledger.VARIABLE: str(self.ledger),
            **self.variables,
        }

    def connect(self) -> Any:
        """Return a connection of the driver's, in autocommit."""
        return connect(self.vendor, self.name)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call it in a process of its own, where Django is set up; return its result.

        Arguments and result are JSON.
        """
        path = f"{function.__module__}:{function.__qualname__}"
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.inside", path, json.dumps(args)],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LONGEST,
        )
        if ended.returncode:
            raise Failed(f"{path} failed: {ended.stderr[-_ERROR:]}")
        return json.loads(ended.stdout.splitlines()[-1])

    def settle(self) -> None:
        """Let the database look at what was inserted, and write it to its files."""
        with closing(self.connect()) as connection:
            for sql in _settling(self.vendor, connection):
                connection.cursor().execute(sql)


@contextmanager
def fresh(vendor: str) -> Iterator[Place]:
    """Make an empty database."""
    with TemporaryDirectory(prefix="aq-") as folder:
        name = f"aq_benchmarks_{os.getpid()}_{next(_numbers)}"
        if vendor == "sqlite":
            yield Place(vendor, f"{folder}/db", Path(folder))
            return
        _administer(vendor, f"CREATE DATABASE {name}")
        try:
            yield Place(vendor, name, Path(folder))
        finally:
            force = " WITH (FORCE)" if vendor == "postgres" else ""
            _administer(vendor, f"DROP DATABASE {name}{force}")


def connect(vendor: str, name: str, **options: Any) -> Any:
    """Return a connection of the driver's own, in autocommit unless told otherwise."""
    if vendor == "sqlite":
        import sqlite3

        return sqlite3.connect(name, timeout=30, isolation_level=None, **options)
    server = _server(vendor)
    where = {
        "host": server["HOST"],
        "port": int(server["PORT"]),
        "user": server["USER"],
    }
    options = {"password": server["PASSWORD"], "autocommit": True, **options}
    if vendor == "postgres":
        import psycopg

        return psycopg.connect(**where, dbname=name, **options)
    import MySQLdb

    return MySQLdb.connect(**where, database=name, charset="utf8mb4", **options)


def server(vendor: str) -> str:
    """Return the name and the version of what is measured, and what it leaves out."""
    if vendor == "sqlite":
        import sqlite3

        return f"SQLite {sqlite3.sqlite_version}"
    with closing(connect(vendor, _ADMINISTRATION[vendor])) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT VERSION()")
        (told,) = cursor.fetchone()
        version = str(told).partition(" (")[0]
        return ", ".join([version, *_switched_off(vendor, cursor)])


def _switched_off(vendor: str, cursor: Any) -> list[str]:
    """Return what a server does not do that others do, and that makes it faster."""
    if vendor != "postgres":
        return []
    cursor.execute(
        "SELECT name || ' off' FROM pg_settings WHERE setting = 'off' "
        "AND name IN ('autovacuum', 'fsync', 'full_page_writes', 'synchronous_commit')"
    )
    return [name for (name,) in cursor.fetchall()]


def _server(vendor: str) -> dict[str, Any]:
    engine = {"ENGINE": f"django.db.backends.{_ENGINES[vendor]}"}
    if vendor == "sqlite":
        return engine
    prefix, user, port = "PG", "postgres", "5432"
    if vendor == "mariadb":
        prefix, user, port = "MYSQL_", "root", "3306"
    defaults = {"HOST": "127.0.0.1", "PORT": port, "USER": user, "PASSWORD": ""}
    return engine | {
        key: os.environ.get(f"{prefix}{key}", default)
        for key, default in defaults.items()
    }


def _options(vendor: str) -> dict[str, Any]:
    """Return what a project sets: sessions last, and SQLite's writers are patient.

    Its journal is the faster one for all, as async_queue would see to for itself.
    """
    journal = "PRAGMA journal_mode=WAL"
    patience = {"timeout": 30, "transaction_mode": "IMMEDIATE"}
    options: dict[str, dict[str, Any]] = {
        "sqlite": {**patience, "init_command": journal},
        "postgres": {},
        "mariadb": {"charset": "utf8mb4"},
    }
    return {"OPTIONS": options[vendor], "CONN_MAX_AGE": None}


def _administer(vendor: str, sql: str) -> None:
    with closing(connect(vendor, _ADMINISTRATION[vendor])) as connection:
        connection.cursor().execute(sql)


def _settling(vendor: str, connection: Any) -> list[str]:
    if vendor == "sqlite":
        return ["ANALYZE"]
    if vendor == "postgres":
        return ["VACUUM ANALYZE", "CHECKPOINT"]
    cursor = connection.cursor()
    cursor.execute("SHOW TABLES")
    return [f"ANALYZE TABLE `{table}`" for (table,) in cursor.fetchall()]
