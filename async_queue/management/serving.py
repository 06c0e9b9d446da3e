"""What a process of ``run_workers`` does: wait for the tables, work, watch the code.

`Serving` is one worker in this process; `serve` is the entry of a process that a
`Supervisor` has started.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread

from django.db import Error, OperationalError, connections
from django.db.migrations.executor import MigrationExecutor
from django.utils import autoreload

from async_queue import conf, probes, processes
from async_queue.bounds import Bounds
from async_queue.callform import printable
from async_queue.context import RunningJob
from async_queue.exceptions import AsyncQueueError
from async_queue.management.options import (
    GRACE,
    end_later,
    log_shown,
    stopped_by_signals,
)
from async_queue.supervisor import CODES
from async_queue.worker import Worker

logger = logging.getLogger("async_queue")

# Seconds to wait for the database and its migrations.
PATIENCE = 60.0
# Seconds between two looks, and between two moments at which a stop is heard.
_PAUSE, _HEARING = 1.0, 0.1
# Seconds for the interpreter to end once the worker has.
LEAVING = 5.0


class NotServing(AsyncQueueError):
    """The worker cannot start."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the command line asks of each worker, in values that JSON has."""

    alias: str
    queues: tuple[str, ...] = ()
    threads: int | None = None
    is_burst: bool = False
    max_jobs: int | None = None
    max_memory: int | None = None
    shutdown_timeout: float
    verbosity: int = 1
    reloads: bool = False

    @property
    def patience(self) -> float:
        """The seconds in which the process must have ended once it is to stop."""
        return self.shutdown_timeout + LEAVING

    def dumped(self) -> str:
        return json.dumps(asdict(self))


class Serving:
    """One worker in this process, from the moment when its tables are there."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes
        self._is_stopped = False
        self._is_working = False
        self._has_changed = False
        self._worker = self._new_worker()

    def run(self) -> None:
        """Work; raises NotServing, or an Error of the database, if that is impossible.

        Called in the main thread, whose connection it closes.
        """
        if self._wishes.reloads:
            _watch(self._reload)
        Thread(target=self._introduce, daemon=True, name="async_queue-hello").start()
        try:
            self._work()
        finally:
            self._is_stopped = True

    def _work(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            _await_tables(self._wishes.alias, deadline, lambda: self._is_stopped)
            if self._is_stopped:
                return None
            self._is_working = True
            try:
                return self._worker.run()
            # The database was there, and then it was not.
            except OperationalError as error:
                if self._worker.has_begun or time.monotonic() > deadline:
                    raise
                logger.warning("starting again: %s", str(error).strip())
                time.sleep(_PAUSE)
                self._worker = self._new_worker()

    def _new_worker(self) -> Worker:
        wishes = self._wishes
        return Worker(
            wishes.alias,
            threads=wishes.threads,
            queues=wishes.queues,
            bounds=Bounds(
                is_burst=wishes.is_burst,
                max_jobs=wishes.max_jobs,
                max_memory=wishes.max_memory,
            ),
            shutdown_timeout=timedelta(seconds=wishes.shutdown_timeout),
            on_start=_note_start,
        )

    def stop(self, *, at_once: bool = False) -> None:
        self._is_stopped = True
        self._worker.stop(at_once=at_once)

    @property
    def reason(self) -> str:
        """Why it ended; see `supervisor.CODES`."""
        if self._has_changed:
            return "code changed"
        return "max_jobs" if self._has_done_its_share else self._worker.reason

    @property
    def _has_done_its_share(self) -> bool:
        if self._wishes.max_jobs is None or self._worker.reason != "drained":
            return False
        done = self._worker.outcomes.total()
        return not self._wishes.is_burst or done >= self._wishes.max_jobs

    @property
    def has_begun(self) -> bool:
        """Whether it may have had jobs."""
        return self._worker.has_begun

    def is_live(self) -> bool:
        return self._worker.is_live if self._is_working else True

    def is_ready(self) -> bool:
        return self._is_working and self._worker.is_ready

    def _reload(self) -> None:
        logger.info("code has changed: what runs finishes, then it is loaded anew")
        self._has_changed = True
        self.stop()

    def _introduce(self) -> None:
        """Say what it serves, as soon as it has a number."""
        while not (self._worker.number or self._is_stopped):
            time.sleep(_HEARING / 5)
        if self._worker.number:
            logger.info(
                "worker %s (pid %s) serves %s with %s on the database %s",
                self._worker.number,
                os.getpid(),
                _named(self._wishes.queues),
                _counted(self._wishes.threads or conf.settings().threads),
                self._wishes.alias,
            )


def _note_start(job: RunningJob) -> None:
    if logger.isEnabledFor(logging.DEBUG):
        name = printable(job.function)
        logger.debug("job %s %s begins", job.id, name, extra={"job": job.id})


def _named(queues: tuple[str, ...]) -> str:
    return f"the queues {', '.join(queues)}" if queues else "all queues"


def _counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _await_tables(alias: str, deadline: float, is_stopped: Callable[[], bool]) -> None:
    """Return when the database answers and the queue's migrations are applied.

    Those of other apps may be meant for later, and stop no worker.
    """
    told = ""
    while (missing := _what_is_missing(alias)) and not is_stopped():
        if time.monotonic() >= deadline:
            raise NotServing(f"{missing}, after {PATIENCE:.0f} s still")
        if missing != told:
            logger.warning("%s; waiting for up to %.0f s", missing, PATIENCE)
            told = missing
        look_at = time.monotonic() + _PAUSE
        while time.monotonic() < look_at and not is_stopped():
            time.sleep(_HEARING)


def _what_is_missing(alias: str) -> str:
    connection = connections[alias]
    try:
        executor = MigrationExecutor(connection)
        targets = executor.loader.graph.leaf_nodes("async_queue")
        missing = executor.migration_plan(targets)
    except OperationalError as error:
        return f"the database {alias} does not answer: {str(error).strip()}"
    finally:
        connection.close()
    if not missing:
        return ""
    return (
        f"the database {alias} lacks {len(missing)} migrations, the first is "
        f"{missing[0][0]}: run manage.py migrate"
    )


def heartbeat_interval() -> float:
    """Return the seconds from one touch of a heartbeat file to the next."""
    return max(conf.settings().poll_interval.total_seconds(), 0.1)


def _watch(on_change: Callable[[], object]) -> None:
    """Call back when a file of the project has changed, as runserver would reload."""

    def watch() -> None:
        try:
            autoreload.get_reloader().run(threading.main_thread())
        # So Django asks to be run anew.
        except SystemExit:
            on_change()

    Thread(target=watch, name="async_queue-reloader", daemon=True).start()


def serve(wishes: str, heartbeat: str) -> None:
    """Be a worker process of a supervisor; exit with one of its codes."""
    given = json.loads(wishes)
    asked = Wishes(**given | {"queues": tuple(given["queues"])})
    serving = Serving(asked)

    def obey(word: str) -> None:
        serving.stop(at_once=word == "now")
        # Even if it waits for a lock, and nobody is left to kill it.
        end_later(CODES["stopped"], GRACE if word == "now" else asked.patience)

    processes.when_told(obey)
    with ExitStack() as around:
        around.enter_context(log_shown(sys.stderr, asked.verbosity))
        around.enter_context(stopped_by_signals(serving, patience=asked.patience))
        if heartbeat:
            beat = probes.heartbeat(Path(heartbeat), serving, heartbeat_interval())
            around.enter_context(beat)
        code = _run(serving)
    end_later(code, LEAVING)
    sys.exit(code)


def _run(serving: Serving) -> int:
    """Return the exit code."""
    try:
        serving.run()
    except (AsyncQueueError, Error) as error:
        logger.error("cannot work on the queue: %s", str(error).strip())
        return 1 if serving.has_begun else CODES["cannot start"]
    return CODES[serving.reason]
