"""``manage.py flush_queue``: one pass through what is due, for cron."""

import json
import logging
import signal
import time
from argparse import BooleanOptionalAction
from datetime import timedelta
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error

from async_queue import claims, maintenance
from async_queue.bounds import Bounds
from async_queue.callform import call_form
from async_queue.context import RunningJob
from async_queue.exceptions import AsyncQueueError, NotYetRunnable
from async_queue.management.display import Bar, Lines, encodable
from async_queue.management.options import (
    check_counts,
    checked_alias,
    duration,
    end_if_forced,
    logged,
    queue_names,
    stopped_by_signals,
)
from async_queue.outcomes import Finished
from async_queue.statements import Selection
from async_queue.tracebacks import describe
from async_queue.worker import Worker

# How the outcomes are told, in this order.
logger = logging.getLogger("async_queue")

_WORDS = {
    "succeed": "succeeded",
    "retry": "to be tried again",
    "snooze": "put off",
    "cancel": "cancelled",
    "fail": "failed for good",
    "crash": "took their process with them",
    "release": "interrupted",
    "lose": "cancelled or taken over while running",
}


class Command(BaseCommand):
    help = (
        "Run the jobs that are due, once through. Stops at the first job that raises "
        "and exits 1, unless told to keep going; exits 128 + n when signal n stops it."
    )
    # Cron would mail the warnings of a whole project each minute.
    requires_system_checks = []

    def add_arguments(self, parser: CommandParser) -> None:
        _add_choice(parser)
        _add_manner(parser)

    def handle(self, **options: Any) -> None:
        try:
            alias, selection = checked_alias(options["database"]), _selection(options)
            deadline = duration(options["deadline"], "--deadline")
            check_counts(options, "jobs", "threads")
            if options["dry_run"]:
                self._list(alias, selection, options)
            else:
                self._flush(alias, selection, deadline, options)
        except (ImproperlyConfigured, AsyncQueueError) as error:
            raise CommandError(str(error)) from error
        except Error as error:
            raise CommandError(
                f"cannot work on the queue: {str(error).strip()}\n"
                "Does the database answer, and has `migrate` been run?"
            ) from error

    def _list(self, alias: str, selection: Selection, options: dict[str, Any]) -> None:
        rows = claims.due(alias, selection).only("id", "function", "args", "kwargs")
        listed = rows[: options["jobs"]].iterator()
        if options["json"]:
            jobs = [{"id": row.pk, "call": str(row)} for row in listed]
            self.stdout.write(json.dumps({"dry_run": True, "jobs": jobs}))
            return
        if not rows.exists():
            self.stdout.write("No jobs to execute")
        lines = Lines(self.stdout)
        for row in listed:
            lines.show(f"{row.pk}: {row}")

    def _flush(
        self,
        alias: str,
        selection: Selection,
        deadline: timedelta | None,
        options: dict[str, Any],
    ) -> None:
        display = self._display(alias, selection, options)

        def announce(job: RunningJob) -> None:
            call = call_form(job.function, job.args, job.kwargs)
            display.show(f"{job.id}: {call}")

        def note(finished: Finished) -> None:
            if finished.is_failure:
                self._show_failure(finished)
            elif isinstance(finished.outcome.error, NotYetRunnable):
                self._show(f"job {finished.job.id} put off: {finished.outcome.error}")
            display.advance()

        flush = Worker(
            alias,
            threads=options["threads"],
            selection=selection,
            bounds=_bounds(deadline, options),
            on_start=announce,
            on_finish=note,
        )
        began_at = time.monotonic()
        level = logging.WARNING if options["verbosity"] else logging.ERROR
        with logged(self.stderr, level), stopped_by_signals(flush) as signals, display:
            flush.run()
            if not signals:
                _prune(alias)
        self._sum_up(flush, time.monotonic() - began_at, signals, options)
        self._exit(flush, signals)

    def _display(
        self, alias: str, selection: Selection, options: dict[str, Any]
    ) -> Lines | Bar:
        if options["json"] or options["verbosity"] == 0:
            return Lines(None)
        wanted = options["progress"]
        if not (self.stdout.isatty() if wanted is None else wanted):
            return Lines(self.stdout)
        total = claims.due(alias, selection)[: options["jobs"]].count()
        try:
            return Bar(self.stdout, total, no_color=options["no_color"])
        except ImportError:  # rich is not installed
            return Lines(self.stdout, total)

    def _show_failure(self, finished: Finished) -> None:
        job, outcome = finished.job, finished.outcome
        call = call_form(job.function, job.args, job.kwargs)
        head = f"\njob {job.id} failed ({_WORDS[outcome.action]}): {call}\n"
        assert outcome.error is not None
        self._show(head + describe(outcome.error).traceback)

    def _show(self, text: str) -> None:
        self.stderr.write(encodable(self.stderr, text))
        self.stderr.flush()

    def _sum_up(
        self,
        flush: Worker,
        seconds: float,
        signals: list[int],
        options: dict[str, Any],
    ) -> None:
        jobs = flush.outcomes.total()
        if options["json"]:
            summary = {
                "jobs": jobs,
                "failures": flush.failures,
                "outcomes": {action: flush.outcomes[action] for action in _WORDS},
                "given_back": flush.given_back,
                "seconds": round(seconds, 3),
                "signal": signals[0] if signals else None,
            }
            self.stdout.write(json.dumps(summary))
        elif options["verbosity"]:
            self.stdout.write(_told(flush, seconds) if jobs else "No jobs to execute")
        self.stdout.flush()

    def _exit(self, flush: Worker, signals: list[int]) -> None:
        end_if_forced(signals, self.stderr)
        if signals:
            name, code = signal.Signals(signals[0]).name, 128 + signals[0]
            raise CommandError(f"stopped by {name}", returncode=code)
        if flush.failures:
            of = f"{flush.failures} of {flush.outcomes.total()} jobs failed"
            raise CommandError(of, returncode=1)


def _add_choice(parser: CommandParser) -> None:
    parser.add_argument("-j", "--jobs", type=int, help="run at most this many")
    parser.add_argument(
        "-w", "--which", type=int, default=0, help="the shard of ids to run, from 0"
    )
    parser.add_argument(
        "-o", "--outof", type=int, default=1, help="the number of shards"
    )
    parser.add_argument(
        "-f",
        "--filter",
        default="",
        metavar="PREFIX",
        help="only functions whose path begins so",
    )
    parser.add_argument(
        "--queue",
        action="append",
        metavar="NAMES",
        help="only these queues, comma-separated; may be given more than once",
    )
    parser.add_argument("--database", metavar="ALIAS", help="where the queue is")


def _add_manner(parser: CommandParser) -> None:
    parser.add_argument("--threads", type=int, help="jobs that run at a time")
    parser.add_argument(
        "--keep-going", action="store_true", help="go on after a job that raises"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would run and change nothing"
    )
    parser.add_argument(
        "--deadline", help="begin no job after so long: seconds, or such as 50s or 5m"
    )
    parser.add_argument(
        "--progress",
        action=BooleanOptionalAction,
        help="show how far it is; what a terminal gets unasked",
    )
    parser.add_argument(
        "--json", action="store_true", help="write one JSON object and nothing else"
    )


def _prune(alias: str) -> None:
    """Delete what is too old: the keeper of a single pass does not live long enough."""
    try:
        maintenance.prune_some(alias)
    except Error as error:  # the next pass does it
        logger.debug("cannot delete old jobs: %s", error)


def _bounds(deadline: timedelta | None, options: dict[str, Any]) -> Bounds:
    return Bounds(
        is_burst=True,
        only_due_now=True,
        max_jobs=options["jobs"],
        deadline=None if deadline is None else deadline.total_seconds(),
        stops_at_failure=not options["keep_going"],
    )


def _selection(options: dict[str, Any]) -> Selection:
    which, out_of = options["which"], options["outof"]
    if out_of < 1:
        raise CommandError(f"--outof is {out_of}: it must be at least 1")
    if not 0 <= which < out_of:
        raise CommandError(f"--which is {which}: it must be from 0 to {out_of - 1}")
    shard = None if out_of == 1 else (which, out_of)
    queues = queue_names(options["queue"], "--queue")
    return Selection(queues, shard=shard, prefix=options["filter"])


def _told(flush: Worker, seconds: float) -> str:
    parts = [f"{flush.outcomes[key]} {word}" for key, word in _WORDS.items()]
    shown = ", ".join(part for part in parts if not part.startswith("0 "))
    back = f"; {flush.given_back} given back" if flush.given_back else ""
    jobs = "1 job" if (count := flush.outcomes.total()) == 1 else f"{count} jobs"
    return f"{jobs} in {seconds:.2f} s: {shown}{back}"
