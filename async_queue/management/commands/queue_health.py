"""``manage.py queue_health``: `health()` for people, monitoring and probes."""

import json
import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import Error, connections
from django.db.migrations.executor import MigrationExecutor

from async_queue import conf
from async_queue.monitoring import ESTIMATORS, health

_EXIT_CODES = {"pass": 0, "warn": 1, "fail": 2}
_UNKNOWN = 3
_NOT_READY = 1


class Command(BaseCommand):
    help = (
        "Tell how the queue is doing. Exits with 0 (pass), 1 (warn), 2 (fail) or "
        "3 (unknown); --live and --ready with 0 or 1."
    )
    # A probe runs often, and the checks are not what it asks for.
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "-a",
            "--algorithm",
            choices=ESTIMATORS,
            default="precise",
            help="how the time until all jobs are done is estimated (default: precise)",
        )
        parser.add_argument(
            "--json",
            action="store_true",
            help="JSON also on a terminal; elsewhere it always is",
        )
        probes = parser.add_mutually_exclusive_group()
        probes.add_argument(
            "--live",
            action="store_true",
            help="only tell that processes start; does not touch the database",
        )
        probes.add_argument(
            "--ready",
            action="store_true",
            help="only tell whether the database answers and is migrated",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["live"]:
            self.stdout.write("live")
        elif options["ready"]:
            _require_migrated_database()
            self.stdout.write("ready")
        else:
            self._report(options["algorithm"], as_json=options["json"])

    def _report(self, algorithm: str, *, as_json: bool) -> None:
        try:
            found = health(algorithm)
        except Error as error:
            raise CommandError(
                f"the queue's health is unknown, because its database says: {error}",
                returncode=_UNKNOWN,
            ) from error
        if as_json or not self.stdout.isatty():
            self.stdout.write(json.dumps(found, indent=2))
        else:
            self._write_summary(found)
        if code := _EXIT_CODES[found["status"]]:
            sys.exit(code)

    def _write_summary(self, found: dict[str, Any]) -> None:
        style = {
            "pass": self.style.SUCCESS,
            "warn": self.style.WARNING,
            "fail": self.style.ERROR,
        }
        self.stdout.write(
            f"{style[found['status']](found['status'])}: {_totals(found)}"
        )
        for (check,) in found["checks"].values():
            if check["status"] != "pass":
                self.stdout.write(f"  {style[check['status']](check['output'])}")
        for line in [*_queue_lines(found), *_worker_lines(found)]:
            self.stdout.write(f"  {line}")


def _require_migrated_database() -> None:
    try:
        executor = MigrationExecutor(connections[conf.settings().database])
        missing = executor.migration_plan(executor.loader.graph.leaf_nodes())
    except Error as error:
        raise CommandError(
            f"not ready, because the database says: {error}", returncode=_NOT_READY
        ) from error
    if missing:
        raise CommandError(
            f"not ready: {len(missing)} migrations are not applied, the first is "
            f"{missing[0][0]}: run manage.py migrate",
            returncode=_NOT_READY,
        )


def _totals(found: dict[str, Any]) -> str:
    queue = found["queue"]
    failed = queue["not-executed"] - queue["remaining"]
    seconds = queue["estimated-completion"]
    done_in = "unknown" if seconds is None else f"{seconds:.0f} s"
    noun = "job" if queue["executed"] == 1 else "jobs"
    return (
        f"{queue['executed']} {noun} executed, {failed} failed, {queue['cancelled']} "
        f"cancelled, {queue['remaining']} remaining (estimated time: {done_in})"
    )


def _queue_lines(found: dict[str, Any]) -> list[str]:
    return [
        f"queue {name}: {queue['ready']} ready, {queue['waiting']} waiting, "
        f"{queue['running']} running; oldest ready {queue['oldest_ready_age']:.0f} s"
        for name, queue in found["queues"].items()
    ]


def _worker_lines(found: dict[str, Any]) -> list[str]:
    return [
        f"worker {worker['id']}: {worker['host']}, process {worker['pid']}, "
        f"{worker['running']} running on {worker['threads']} threads"
        for worker in found["workers"]
    ] or ["no live worker"]
