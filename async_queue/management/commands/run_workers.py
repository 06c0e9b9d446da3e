"""``manage.py run_workers``: run jobs as they come, until it is stopped."""

import faulthandler
import re
import signal
import threading
from argparse import BooleanOptionalAction
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error

from async_queue import conf, probes, processes
from async_queue.exceptions import AsyncQueueError
from async_queue.management.options import (
    GRACE,
    check_counts,
    checked_alias,
    duration,
    end_if_forced,
    end_later,
    log_shown,
    queue_names,
    stopped_by_signals,
)
from async_queue.management.serving import (
    LEAVING,
    Serving,
    Wishes,
    heartbeat_interval,
)
from async_queue.supervisor import Supervisor

_ENTRY = "async_queue.management.serving:serve"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
# 75 is EX_TEMPFAIL of sysexits.h: whoever starts the command anew may hope.
_EXIT_CODES = {"cannot start": 1, "threads lost": 75}


class Command(BaseCommand):
    help = (
        "Run jobs as they come, until SIGTERM or Ctrl-C: what runs then finishes. A "
        "second signal ends it at once, with exit code 128 + n."
    )
    # It runs for a year; what checks would say now is for a deployment to hear.
    requires_system_checks = []

    def add_arguments(self, parser: CommandParser) -> None:
        _add_work(parser)
        _add_bounds(parser)
        _add_operation(parser)

    def handle(self, **options: Any) -> None:
        try:
            self._run(options)
        except (ImproperlyConfigured, AsyncQueueError) as error:
            raise CommandError(str(error)) from error
        except Error as error:
            raise CommandError(
                f"cannot work on the queue: {str(error).strip()}"
            ) from error

    def _run(self, options: dict[str, Any]) -> None:
        wishes = _wishes(options)
        count = options["processes"] or conf.settings().processes
        is_single = count == 1 and not wishes.reloads
        others = set(threading.enumerate())
        # What is no error shall not look like one.
        self.stderr.style_func = None
        with ExitStack() as around:
            around.enter_context(log_shown(self.stderr, options["verbosity"]))
            around.enter_context(_stacks_on_demand())
            supervised = _supervised(count, wishes, options)
            running = Serving(wishes) if is_single else around.enter_context(supervised)
            grace, patience = GRACE, wishes.patience
            if not is_single:  # its processes need theirs first
                grace, patience = 2 * grace, patience + 2 * LEAVING
            stopped = stopped_by_signals(running, grace, patience)
            signals = around.enter_context(stopped)
            around.enter_context(_probed(running, options))
            running.run()
        end_if_forced(signals, self.stderr)
        _exit(running.reason, set(threading.enumerate()) - others)


def _add_work(parser: CommandParser) -> None:
    parser.add_argument(
        "--queues",
        action="append",
        metavar="NAMES",
        help="only these, comma-separated, the first before the others: a,b*,-c is a, "
        "then those that begin with b, and not c; may be given more than once",
    )
    parser.add_argument(
        "--threads", type=int, help="jobs that one process runs at a time"
    )
    parser.add_argument("--processes", type=int, help="worker processes")
    parser.add_argument("--database", metavar="ALIAS", help="where the queue is")


def _add_bounds(parser: CommandParser) -> None:
    parser.add_argument(
        "--burst", action="store_true", help="end as soon as nothing is due"
    )
    parser.add_argument(
        "--max-jobs",
        type=int,
        help="replace a process after so many jobs; one alone ends",
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="the same where it uses more memory than, say, 512M or 1G",
    )
    parser.add_argument(
        "--shutdown-timeout",
        metavar="TIME",
        help="how long what runs may go on after a signal: seconds, or such as 5m",
    )


def _add_operation(parser: CommandParser) -> None:
    parser.add_argument(
        "--health-port",
        metavar="[HOST:]PORT",
        help="answer GET /live and /ready with 200 or 503; the host is 127.0.0.1",
    )
    parser.add_argument(
        "--heartbeat-file",
        metavar="PATH",
        help="a file to touch every POLL_INTERVAL while all is well",
    )
    parser.add_argument(
        "--reload",
        action=BooleanOptionalAction,
        help="start anew when code changes; what DEBUG does unasked",
    )


def _wishes(options: dict[str, Any]) -> Wishes:
    check_counts(options, "threads", "processes", "max_jobs")
    timeout = duration(options["shutdown_timeout"], "--shutdown-timeout")
    if timeout is None:
        timeout = conf.settings().shutdown_timeout
    reloads = options["reload"]
    if reloads is None:
        reloads = django_settings.DEBUG and not options["burst"]
    return Wishes(
        alias=checked_alias(options["database"]),
        queues=queue_names(options["queues"], "--queues"),
        threads=options["threads"],
        is_burst=options["burst"],
        max_jobs=options["max_jobs"],
        max_memory=_memory(options["max_memory"]),
        shutdown_timeout=timeout.total_seconds(),
        verbosity=options["verbosity"],
        reloads=reloads,
    )


def _memory(given: Any) -> int | None:
    if given is None:
        return None
    match = re.fullmatch(r"(\d+)([KMG]?)(I?B)?", str(given).upper())
    if match is None:
        raise CommandError(f"--max-memory is {given!r}: it must be such as 512M or 1G")
    most, now = int(match[1]) * _UNITS[match[2]], processes.memory()
    if not now:
        raise CommandError("--max-memory: this system does not tell what is in use")
    if most <= now:
        raise CommandError(
            f"--max-memory is {given!r}: the process has {now // 2**20}M before its "
            "first job"
        )
    return most


@contextmanager
def _supervised(
    count: int, wishes: Wishes, options: dict[str, Any]
) -> Iterator[Supervisor]:
    supervisor = partial(
        Supervisor,
        count,
        _ENTRY,
        wishes.dumped(),
        shutdown_timeout=timedelta(seconds=wishes.shutdown_timeout),
    )
    if options["heartbeat_file"] is None and options["health_port"] is None:
        yield supervisor()
        return
    # Its processes touch files there, by which it knows how they are.
    with TemporaryDirectory(prefix="async_queue-") as folder:
        yield supervisor(folder=Path(folder), interval=heartbeat_interval())


@contextmanager
def _probed(running: Serving | Supervisor, options: dict[str, Any]) -> Iterator[None]:
    with ExitStack() as around:
        if (given := options["heartbeat_file"]) is not None:
            beat = probes.heartbeat(Path(given), running, heartbeat_interval())
            _enter(around, beat, f"--heartbeat-file is {given!r}")
        if (given := options["health_port"]) is not None:
            port = probes.health_port(*_address(given), running)
            _enter(around, port, f"--health-port is {given!r}")
        yield


def _enter(around: ExitStack, probe: Any, option: str) -> None:
    try:
        around.enter_context(probe)
    except OSError as error:
        raise CommandError(f"{option}: {error}") from error


def _address(given: Any) -> tuple[str, int]:
    host, _, port = str(given).rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise CommandError(
            f"--health-port is {given!r}: it must be such as 8001 or 0.0.0.0:8001"
        )
    return host or "127.0.0.1", int(port)


@contextmanager
def _stacks_on_demand() -> Iterator[None]:
    """Let SIGQUIT show where every thread stands; Windows has none."""
    number = getattr(signal, "SIGQUIT", None)
    if number is None:
        yield
        return
    # By its number: what stands for it in Python may have no file.
    faulthandler.register(number, file=2, all_threads=True)
    try:
        yield
    finally:
        faulthandler.unregister(number)


def _exit(reason: str, threads: set[threading.Thread]) -> None:
    code = _EXIT_CODES.get(reason, 0)
    # No job that hangs keeps the process from ending.
    if any(not thread.daemon and thread.is_alive() for thread in threads):
        end_later(code, LEAVING)
    if reason == "cannot start":
        raise CommandError("the worker processes cannot start; see above")
    if reason == "threads lost":
        raise CommandError(
            "too many threads were lost to jobs that do not end: start me again",
            returncode=code,
        )
