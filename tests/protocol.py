"""The protocol in steps: workers and runs that stand still until a test says go.

Each has connections of its own, and calls what a real one calls. A run stands still
in its function, before and after its effect, and at the points around each record.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue import conf, current_job, executor, hooks
from async_queue.context import RunningJob
from async_queue.db import private, vendor
from async_queue.outcomes import Outcome
from async_queue.peers import Peers
from async_queue.places import Place
from tests.jobs import leave

BEFORE_EFFECT, AFTER_EFFECT = "before the effect", "after the effect"
BEFORE_FENCE, AFTER_FENCE = "before_fence", "after_fence"
BEFORE_RECORD, AFTER_RECORD = "before_record", "after_record"
_POINTS = (BEFORE_FENCE, AFTER_FENCE, BEFORE_RECORD, AFTER_RECORD)
_PATIENCE = 30  # seconds
_LOCKS = 0.5  # seconds for which a keeper waits for them
# Of the clock that a test passes to `peers`; a look counts if the last is no older
# than three of them.
INTERVAL = 31

FACTS = vendor(connections["default"])
_of_thread = threading.local()


def here() -> BaseDatabaseWrapper:
    """Return the connection of this thread."""
    return connections["default"]


class Died(BaseException):
    """Here the process would have ended, and have done nothing more."""


@contextmanager
def stepped() -> Iterator[None]:
    """Let runs stand still at the points of the protocol."""
    with ExitStack() as stack:
        for name in _POINTS:
            stack.enter_context(hooks.at(name, partial(_stand_still, name)))
        yield


def _stand_still(where: str) -> None:
    if (run := getattr(_of_thread, "run", None)) is not None:
        run.stand_still(where)


def act(how: str) -> None:
    """Leave an effect that names the attempt; then fail, if that is wanted."""
    job = current_job()
    assert job is not None
    _stand_still(BEFORE_EFFECT)
    leave(f"{job.id}:{job.attempt}")
    _stand_still(AFTER_EFFECT)
    if how == "fail":
        raise ValueError("as intended")


class Run:
    """A claimed job in a thread, which goes on by a step at a time."""

    def __init__(self, job: RunningJob) -> None:
        self.job = job
        self.was_at: Any = None
        # Where it stands, or its outcome.
        self.at: Any = None
        self.cuts = 0
        # Since it was cut it has not moved.
        self.is_cut = False
        self._said: SimpleQueue[Any] = SimpleQueue()
        self._may_go: SimpleQueue[bool] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._hear()

    @property
    def is_over(self) -> bool:
        return isinstance(self.at, Outcome | BaseException)

    @property
    def is_in_transaction(self) -> bool:
        """Whether the database holds something for it."""
        if self.is_over or self.is_cut:
            return False
        return self.job.control.is_atomic or self.at in _POINTS

    @property
    def locks_its_row(self) -> bool:
        return self.at in (AFTER_FENCE, AFTER_RECORD) and not self.is_cut

    def step(self) -> None:
        """Go on until it stands still again, or is over."""
        self._may_go.put(True)
        self._hear()

    def cut(self) -> None:
        """End its session; called in the thread of whoever does so."""
        assert self.job.control.cut_off is not None
        self.is_cut = bool(self.job.control.cut_off(here()))
        self.cuts += 1

    def die(self) -> None:
        """End where it stands, with what its transaction has done."""
        self.job.control.is_ended = True
        self._may_go.put(False)
        self._thread.join(_PATIENCE)
        self.at = Outcome("lose")

    def stand_still(self, where: str) -> None:
        """Wait for the next step; called in its thread."""
        self._said.put(where)
        if not self._may_go.get():
            raise Died

    def _hear(self) -> None:
        self.was_at, self.at = self.at, self._said.get(timeout=_PATIENCE)
        self.is_cut = False
        if self.is_over:
            self._thread.join(_PATIENCE)

    def _run(self) -> None:
        _of_thread.run = self
        try:
            said: Any = executor.execute(self.job)
        except BaseException as error:
            said = error
        connections.close_all()
        self._said.put(said)


class Session:
    """A thread on a private connection, which calls what it is told."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        future: Future[Any] = Future()
        self._calls.put((future, function, args))
        return future.result(_PATIENCE)

    def cut(self) -> None:
        """End it from outside; the next call finds that out."""
        FACTS.end_session(here(), self.do(_session_here))

    def end(self) -> None:
        self._calls.put(None)
        self._thread.join(_PATIENCE)

    def _serve(self) -> None:
        with private("default", _LOCKS):
            while (call := self._calls.get()) is not None:
                future, function, args = call
                try:
                    future.set_result(function(*args))
                except BaseException as error:
                    if isinstance(error, Error):
                        here().close_if_unusable_or_obsolete()
                    future.set_exception(error)


def _session_here() -> Any:
    return FACTS.session_of(here())


class Hand:
    """A worker: its place, its keeper's session and its dispatcher's, and its jobs."""

    def __init__(self, clock: int) -> None:
        self.place = Place("default", threads=4)
        self.peers = Peers("default", INTERVAL)
        self.keeper, self.dispatcher = Session(), Session()
        self.claimed: list[RunningJob] = []
        self.runs: list[Run] = []
        self.orphans: dict[int, int] = {}
        self.beat_at = clock
        self.keeps_lock = True
        self.take_place()

    @property
    def number(self) -> int:
        return self.place.number

    def take_place(self) -> None:
        self.keeper.do(lambda: self.place.take(here()))
        self.keeps_lock = True

    def lose_place(self) -> None:
        self.keeper.do(self.place.lose)
        self.take_place()

    def leave(self) -> None:
        """Shut down; what it has begun goes on without it."""
        self.keeper.do(lambda: self.place.leave(here()))
        self._end_sessions()

    def die(self) -> None:
        for run in self.going():
            run.die()
        if not FACTS.has_heartbeat:
            # All of them share a process, which is what that lock belongs to.
            FACTS.drop_life(here(), self.number)
        self._end_sessions()

    def going(self) -> list[Run]:
        return [run for run in self.runs if not run.is_over]

    def stalled_workers(self) -> set[int]:
        """Return those whose sessions it has ended because they stood still."""
        limit = conf.settings().stall_after.total_seconds()
        still = self.peers._pulses._still.items()
        return {number for number, seconds in still if seconds >= limit}

    def begin(self) -> Run:
        """Begin the job that it has claimed first."""
        job = self.claimed.pop(0)
        job.control.slot = 1 + len(self.runs) % 16
        run = Run(job)
        self.runs.append(run)
        return run

    def _end_sessions(self) -> None:
        self.keeper.end()
        self.dispatcher.end()
