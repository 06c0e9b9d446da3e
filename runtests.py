"""Run the tests on every database that answers: `python3 runtests.py`.

SQLite always, PostgreSQL and MariaDB where a server is found. `--db NAME` chooses;
all other arguments go on to pytest. Sets up its own `.venv` where it needs one.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

from example.bootstrap import ROOT, ensure, install, is_own_environment
from tests.settings import databases as settings

DRIVERS = {"postgres": "psycopg", "mariadb": "MySQLdb"}
EXTRAS = {"postgres": "postgres", "mariadb": "mysql"}
CONNECT = """
from django.db import connection
with connection._nodb_cursor() as cursor:  # what the making of a test database uses
    cursor.execute("SELECT 1")
"""
HEADERS = "Debian: apt-get install gcc libmariadb-dev pkg-config python3-dev"


@dataclass
class Result:
    """What came of the tests on one database, in numbers."""

    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        skipped = self.skipped.total()
        return f"{self.passed} passed, {self.failed} failed, {skipped} skipped"


def main() -> int:
    ensure(
        "django",
        "cronsim",
        "pytest",
        "pytest_django",
        "factory",
        "hypothesis",
        extras="test",
    )
    chosen, arguments = _read_command_line()
    required = set(chosen) if chosen or not _is_ci() else {"sqlite", *DRIVERS}
    databases, left_out = _available(chosen or ["sqlite", *DRIVERS])
    results = _run_all(databases, arguments)
    missing = required & set(left_out)
    _report(results, left_out, missing)
    return 1 if missing or any(result.failed for result in results.values()) else 0


def _read_command_line() -> tuple[list[str], list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--db", action="append", choices=["sqlite", *DRIVERS])
    options, arguments = parser.parse_known_args()
    return options.db or [], arguments


def _is_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("true", "1")


def _available(databases: list[str]) -> tuple[list[str], dict[str, str]]:
    """Divide the databases into those that answer and, with the reason, the others."""
    left_out = {name: reason for name in databases if (reason := _obstacle(name))}
    return [name for name in databases if name not in left_out], left_out


def _obstacle(database: str) -> str:
    """Return why the tests cannot run on this database, or nothing."""
    if database == "sqlite":
        return ""
    return _driver_obstacle(database) or _server_obstacle(database)


def _driver_obstacle(database: str) -> str:
    if find_spec(DRIVERS[database]):
        return ""
    if not _listens(
        host := _setting(database, "HOST"), port := _setting(database, "PORT")
    ):
        return f"no server answers at {host}:{port}"
    if not is_own_environment():
        return f"its driver is missing: pip install 'async_queue[{EXTRAS[database]}]'"
    print(f"Installing the driver for {database} (once).", flush=True)
    if problem := install(EXTRAS[database]):
        print(problem, file=sys.stderr)
        return f"its driver could not be installed. {HEADERS}"
    invalidate_caches()
    return ""


def _setting(database: str, name: str) -> str:
    return str(settings[database][name])


def _listens(host: str, port: str) -> bool:
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _server_obstacle(database: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", CONNECT],
        cwd=ROOT,
        env=_environment(database),
        capture_output=True,
        text=True,
    )
    if result.returncode == 0:
        return ""
    said = [line for line in result.stderr.splitlines() if line[:1].strip()]
    return said[-1] if said else "it does not answer"


def _environment(database: str) -> dict[str, str]:
    return {**os.environ, "DB": database, "DJANGO_SETTINGS_MODULE": "tests.settings"}


def _run_all(databases: list[str], arguments: list[str]) -> dict[str, Result]:
    """Run the databases side by side; show each one's output when it is done."""
    results = {}
    output = None if len(databases) == 1 else subprocess.PIPE
    # What many of the tests do is wait, so they share the cores well.
    with ThreadPoolExecutor(len(databases)) as pool:
        runs = {pool.submit(_run, name, arguments, output): name for name in databases}
        for run in as_completed(runs):
            said, results[runs[run]] = run.result()
            print(f"\n{runs[run]}\n{said}" if said else "", flush=True)
    return {name: results[name] for name in databases}


def _run(database: str, arguments: list[str], output: int | None) -> tuple[str, Result]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run = subprocess.run(
            [sys.executable, "-m", "pytest", f"--junit-xml={report}", *arguments],
            cwd=ROOT,
            env=_environment(database),
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            text=True,
            errors="replace",
        )
        result = _read(report) if report.exists() else Result()
    if run.returncode and not result.failed:
        result.failed = 1  # pytest itself stopped, or found nothing to run
    return (run.stdout or "").rstrip(), result


def _read(report: Path) -> Result:
    result = Result()
    for case in ElementTree.parse(report).iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            result.failed += 1
        elif skip is not None:
            result.skipped[skip.get("message", "")] += 1
        else:
            result.passed += 1
    return result


def _report(
    results: dict[str, Result], left_out: dict[str, str], missing: set[str]
) -> None:
    print()
    total = Result(failed=len(missing))
    for database, result in results.items():
        print(f"{database}: {result}")
        for reason, count in result.skipped.most_common():
            print(f"    {count} skipped: {reason}")
        total.passed += result.passed
        total.failed += result.failed
        total.skipped += result.skipped
    for database, reason in left_out.items():
        verdict = "failed, because it is missing" if database in missing else "left out"
        print(f"{database}: {verdict}: {reason}")
    print(total)


if __name__ == "__main__":
    sys.exit(main())
