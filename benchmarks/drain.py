"""``drain``: how fast a backlog is run, and what that costs the worker's processes."""

from contextlib import closing
from functools import partial
from time import monotonic, sleep
from typing import Any, NamedTuple

from benchmarks import ledger
from benchmarks.ledger import Entry, Refused
from benchmarks.places import Place
from benchmarks.processes import Memory, Processes, running
from benchmarks.report import Measured
from benchmarks.run import Run
from benchmarks.systems import REFERENCES, SYSTEMS, fill, home
from benchmarks.systems.base import KINDS, System

_USUAL_THREADS = 4  # with which other systems are compared
_LOOK = 0.02
_STALLED = 60.0  # seconds without a call, at most


class Drained(NamedTuple):
    """A run that counts. Seconds are those of all processes of the worker."""

    rate: float
    cpu_ms: float  # for each job
    memory: Memory
    calls: list[Entry]


def measure(run: Run) -> None:
    """Compare in all kinds and shapes; the quick way, only in some."""
    for kind in KINDS:
        for processes in run.processes:
            for threads in run.threads:
                if not run.is_quick or kind == "insert" or processes == 1:
                    _compare(run, kind, threads, processes)


def _compare(run: Run, kind: str, threads: int, processes: int) -> None:
    is_usual = threads == _USUAL_THREADS
    is_brief = run.is_quick and (kind == "noop" or processes > 1)
    names = ["async_queue", *(REFERENCES if is_usual and not is_brief else ("R",))]
    if is_usual:
        names += [name for name in run.beside if run.vendor in SYSTEMS[name].vendors]
    shape = {"threads": threads, "processes": processes}
    subjects = {
        name: partial(_measure, SYSTEMS[name], run, kind, shape) for name in names
    }
    notes = {name: SYSTEMS[name].note for name in names}
    run.compare("drain", f"{kind} {processes}x{threads}", "jobs/s", subjects, notes)


def _measure(system: System, run: Run, kind: str, shape: dict[str, int]) -> Measured:
    drained = drain(system, run.vendor, kind=kind, jobs=run.jobs, **shape)
    more = {"CPU ms/job": drained.cpu_ms, "PSS MiB": drained.memory.pss}
    return Measured(drained.rate, more)


def drain(
    system: System,
    vendor: str,
    *,
    kind: str,
    jobs: int,
    threads: int = 4,
    processes: int = 1,
) -> Drained:
    """Enqueue jobs, then run them by workers; from the first call until all is done.

    Raises Refused unless every job ran exactly once.
    """
    with home(system, vendor, threads, processes) as place:
        place.call(fill, system.name, kind, jobs)
        place.settle()
        return _drain(system, place, kind, jobs, threads, processes)


def _drain(system: System, place: Place, kind: str, jobs: int, *shape: int) -> Drained:
    commands = system.commands(place, *shape)
    effects = jobs if kind == "insert" else 0
    with (
        closing(place.connect()) as connection,
        running(commands, place.environment, place.folder / "log") as workers,
    ):
        _await_calls(1, workers, place)
        before = workers.cpu_seconds()
        _await_calls(jobs, workers, place)
        ended_at = _await_end(system, place, connection, effects, workers)
        used = workers.cpu_seconds() - before
        memory = workers.memory()
        calls = ledger.read(place.ledger)
        ledger.check(calls, jobs)
        _check_tables(system, connection, jobs, effects)
    return Drained(jobs / (ended_at - calls[0].at), 1000 * used / jobs, memory, calls)


def _await_calls(wanted: int, workers: Processes, place: Place) -> None:
    """Wait for so many calls, by the ledger, which costs the server nothing."""
    seen, seen_at = 0, monotonic()
    while (calls := ledger.count(place.ledger)) < wanted:
        if calls > seen:
            seen, seen_at = calls, monotonic()
        if workers.has_ended:
            raise Refused(f"a worker has ended after {calls} calls: {workers.said()}")
        if monotonic() - seen_at > _STALLED:
            raise Refused(f"nothing is called after {calls} calls: {workers.said()}")
        sleep(_LOOK)


def _await_end(
    system: System, place: Place, connection: Any, effects: int, workers: Processes
) -> float:
    """Return the moment from which the system has nothing left.

    Some forget a job before its effect is there.
    """
    until = monotonic() + _STALLED
    while left := (
        system.remaining(place, connection) or effects - _effects(connection)[0]
    ):
        if monotonic() > until:
            raise Refused(f"{left} jobs do not finish: {workers.said()}")
        sleep(_LOOK)
    return monotonic()


def _check_tables(system: System, connection: Any, jobs: int, effects: int) -> None:
    finished = system.finished(connection)
    if finished not in (None, jobs):
        raise Refused(f"{system.name} says that {finished} of {jobs} jobs succeeded")
    wanted = (effects, effects, *((0, jobs - 1) if effects else (None, None)))
    if (found := _effects(connection)) != wanted:
        raise Refused(
            f"effects, different ones, the first and the last: {found}, not {wanted}"
        )


def _effects(connection: Any) -> tuple[Any, ...]:
    cursor = connection.cursor()
    cursor.execute(
        "SELECT COUNT(*), COUNT(DISTINCT number), MIN(number), MAX(number) "
        "FROM benchmarks_effect"
    )
    return tuple(cursor.fetchone())
