"""Several worker processes under one command: started, replaced, stopped together.

`Supervisor` knows nothing of jobs, and opens no connection. It starts processes whose
entry answers its words ("stop", "now", or nothing more where it has died itself) and
ends with one of CODES. Used by ``run_workers``.
"""

import logging
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from subprocess import Popen
from threading import Event, Lock, Thread

from async_queue import probes, processes

logger = logging.getLogger("async_queue")

# Why a worker process ended, as its exit code says it. Any other code is a crash, 0
# among them, which is what a job gives that calls os._exit(0).
CODES = {
    "drained": 90,
    "stopped": 91,
    "max_jobs": 92,
    "max_memory": 93,
    "threads lost": 94,
    "code changed": 95,
    "cannot start": 96,
}
_REASONS = {code: reason for reason, code in CODES.items()}

# Seconds before a process that has crashed is replaced. The first time it is quick,
# because its job may be to blame, which will not run in a worker again.
_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
# Seconds of life after which a crash counts as a first one again.
_SOUND = 60.0
# Seconds for a process to end after the moment at which it should have.
_MARGIN = 5.0
# A process that cannot start so early, in seconds, is no accident of later on.
_START_UP = 90.0
# A signal that comes just before a wait begins is heard when the wait ends: so none is
# long, in seconds.
_HEARING = 0.2
# Seconds in which a process has its first heartbeat.
_FIRST_BEAT = 60.0


@dataclass(frozen=True, eq=False, slots=True)
class _Child:
    slot: int
    process: Popen[bytes]
    started_at: float
    heartbeat: Path | None

    @property
    def age(self) -> float:
        return time.monotonic() - self.started_at

    def is_live(self, interval: float) -> bool:
        if self.heartbeat is None or self.age < _FIRST_BEAT:
            return True
        return probes.is_live(self.heartbeat, interval)

    def is_ready(self, interval: float) -> bool:
        return self.heartbeat is not None and probes.is_ready(self.heartbeat, interval)

    def __str__(self) -> str:
        return f"worker process {self.slot} (pid {self.process.pid})"


class Supervisor:
    """Runs ``count`` processes of ``entry(options, heartbeat)`` until it is stopped.

    ``options`` is any text. ``heartbeat`` is the path of a file in ``folder`` that the
    process is to touch every ``interval`` seconds, see `probes.heartbeat`, or "" where
    there is no folder, and nothing to probe. Whoever has not ended
    ``shutdown_timeout`` after `stop`, and a little, is killed.
    """

    def __init__(
        self,
        count: int,
        entry: str,
        options: str,
        *,
        shutdown_timeout: timedelta,
        folder: Path | None = None,
        interval: float = 1.0,
    ) -> None:
        self._count = count
        self._entry = entry
        self._options = options
        self._patience = shutdown_timeout.total_seconds() + _MARGIN
        self._folder = folder
        self._interval = interval
        # A SimpleQueue, because a signal's handler may put into it at any moment.
        self._orders: SimpleQueue[str] = SimpleQueue()
        self._children: set[_Child] = set()
        self._lock = Lock()  # around both, and the start of a child
        self._is_over = Event()
        self._began_at = time.monotonic()
        self._deadline = float("inf")
        self.reason = ""

    def stop(self, *, at_once: bool = False) -> None:
        """Let all stop; may be called by any thread and by a signal's handler."""
        self._orders.put("now" if at_once else "stop")

    def run(self) -> None:
        """Keep the processes running; return when all have ended for good.

        ``reason`` then tells why: "stopped", "drained", or "cannot start".
        """
        processes.require_settings_module()
        self._began_at = time.monotonic()
        keepers = [
            Thread(
                target=self._keep,
                args=(slot,),
                name=f"async_queue-process-{slot}",
                daemon=True,
            )
            for slot in range(1, self._count + 1)
        ]
        for keeper in keepers:
            keeper.start()
        while any(keeper.is_alive() for keeper in keepers):
            self._obey_or_wait()
            if time.monotonic() >= self._deadline:
                self._kill()
        self.reason = self.reason or "drained"

    def is_live(self) -> bool:
        """Whether the loop of every process turns."""
        return all(child.is_live(self._interval) for child in self._now_running())

    def is_ready(self) -> bool:
        """Whether a process reaches the database, while others perhaps start anew."""
        return any(child.is_ready(self._interval) for child in self._now_running())

    def _now_running(self) -> list[_Child]:
        with self._lock:
            return list(self._children)

    def _obey_or_wait(self) -> None:
        try:
            order = self._orders.get(timeout=_HEARING)
        except Empty:
            return
        self._pass_on(order)

    def _pass_on(self, order: str) -> None:
        self.reason = self.reason or "stopped"
        with self._lock:
            self._is_over.set()
            children = list(self._children)
        for child in children:
            processes.tell(child.process, order)
        patience = self._patience if order == "stop" else _MARGIN
        self._deadline = min(self._deadline, time.monotonic() + patience)

    def _kill(self) -> None:
        for child in self._now_running():
            logger.error("%s does not end: killing it", child)
            child.process.kill()
        self._deadline = time.monotonic() + _MARGIN

    def _keep(self, slot: int) -> None:
        """Run one process after the other in this slot."""
        pause = 0.0
        while not self._is_over.wait(pause):
            try:
                child = self._start(slot)
            # There may be memory for it, or room in the system's tables, later.
            except OSError as error:
                pause = _next_pause(pause, life=0.0)
                logger.error("no worker process: %s; %s", error, _what_next(pause))
                continue
            if child is None:
                return
            code = _end_of(child.process)
            with self._lock:
                self._children.discard(child)
            if self._is_last(child, code):
                return
            is_planned = _REASONS.get(code, "cannot start") != "cannot start"
            pause = 0.0 if is_planned else _next_pause(pause, child.age)
            level = logging.INFO if is_planned else logging.ERROR
            logger.log(level, "%s %s; %s", child, _told(code), _what_next(pause))

    def _start(self, slot: int) -> _Child | None:
        """Start a process, unless all is over."""
        heartbeat = self._folder and self._folder / f"worker-{slot}"
        with self._lock:
            if self._is_over.is_set():
                return None
            process = processes.start(self._entry, self._options, str(heartbeat or ""))
            child = _Child(slot, process, time.monotonic(), heartbeat)
            self._children.add(child)
        return child

    def _is_last(self, child: _Child, code: int) -> bool:
        """Whether nobody takes the place of a process that ended so."""
        reason = _REASONS.get(code)
        if self._is_over.is_set():
            if reason is None:
                logger.warning("%s %s while it was to stop", child, _told(code))
            return True
        is_early = time.monotonic() - self._began_at < _START_UP
        if reason == "cannot start" and is_early:
            self.reason = reason
            self.stop()
            return True
        return reason == "drained"


def _end_of(process: Popen[bytes]) -> int:
    with process:  # which closes the line to it, in the end
        return process.wait()


def _next_pause(pause: float, life: float) -> float:
    """Return the seconds before a process that lived so long is replaced."""
    if life >= _SOUND or not pause:
        return _PAUSE
    return min(2 * pause, _LONGEST_PAUSE)


def _what_next(pause: float) -> str:
    return f"another starts in {pause:g} s" if pause else "another takes its place"


_PLANNED = {
    "drained": "found nothing more to do",
    "stopped": "stopped because it was told to, though its supervisor was not",
    "max_jobs": "has run as many jobs as it may",
    "max_memory": "has come to use as much memory as it may",
    "threads lost": "has lost too many threads to jobs that do not end",
    "code changed": "ended because code has changed",
    "cannot start": "could not start",
}
_BY_SIGNAL = {
    "SIGKILL": "was killed by SIGKILL: by somebody, or by the system to free memory",
    "SIGSEGV": "crashed in native code (SIGSEGV)",
    "SIGBUS": "crashed in native code (SIGBUS)",
    "SIGFPE": "crashed in native code (SIGFPE)",
    "SIGILL": "crashed in native code (SIGILL)",
    "SIGABRT": "was aborted by native code (SIGABRT)",
}


def _told(code: int) -> str:
    """Return how a process ended, in words, from its exit code."""
    if code in _REASONS:
        return _PLANNED[_REASONS[code]]
    if code >= 0:
        return f"ended by itself with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return _BY_SIGNAL.get(name, f"was ended by {name}")
