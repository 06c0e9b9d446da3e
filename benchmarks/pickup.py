"""``pickup``: how soon an idle worker calls a job, and what idling costs it."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from statistics import quantiles
from time import monotonic, sleep

from benchmarks import ledger
from benchmarks.ledger import Refused
from benchmarks.places import Place
from benchmarks.processes import Processes, running
from benchmarks.report import Measured
from benchmarks.run import Run
from benchmarks.systems import SYSTEMS, System, fill, home

_STARTS_IN = 60.0
_SETTLING = 3.0  # seconds until a worker that has just worked idles
_PAUSE = 0.1  # seconds between two jobs


def measure(run: Run) -> None:
    seconds, count = (2.0, 30) if run.is_quick else (20.0, 300)
    names = ["async_queue", *run.beside]
    looks = {
        name: partial(_look, SYSTEMS[name], run.vendor, seconds, count)
        for name in names
        if run.vendor in SYSTEMS[name].vendors
    }
    units = {"p50": "ms", "p99": "ms", "idle": "% of a core"}
    run.look("pickup", units, looks)


def _look(
    system: System, vendor: str, seconds: float, count: int
) -> Mapping[str, Measured]:
    with ExitStack() as around:
        place = around.enter_context(home(system, vendor))
        place.call(fill, system.name, "noop", 1)  # so that one sees when it is up
        commands = system.commands(place, 4, 1)
        log = place.folder / "log"
        worker = around.enter_context(running(commands, place.environment, log))
        _await_calls(place, 1, worker)
        sleep(_SETTLING)
        before, began_at = worker.cpu_seconds(), monotonic()
        sleep(seconds)
        share = (worker.cpu_seconds() - before) / (monotonic() - began_at)
        delays = _delays(system, place, worker, range(1, 1 + count))
        found = quantiles(delays, n=100)
        more = {"worst": max(delays)}
        if system.name == "async_queue":  # others have connections of their own
            numbers = range(1 + count, 1 + 2 * count)
            inside = quantiles(
                _delays(system, place, worker, numbers, is_atomic=True), n=100
            )
            more |= {"in a transaction": inside[49], "its p99": inside[98]}
    return {
        "p50": Measured(found[49], more),
        "p99": Measured(found[98]),
        "idle": Measured(100 * share),
    }


def _delays(
    system: System,
    place: Place,
    worker: Processes,
    numbers: range,
    *,
    is_atomic: bool = False,
) -> list[float]:
    """Return by how many ms the call of each job followed upon its commit."""
    ends = (numbers.start, numbers.stop)
    found = place.call(enqueue_slowly, system.name, *ends, is_atomic)
    committed_at = dict(zip(numbers, found, strict=True))
    _await_calls(place, numbers.stop, worker)
    calls = ledger.read(place.ledger)
    ledger.check(calls, numbers.stop)
    called_at = {call.number: call.at for call in calls}
    return [1000 * (called_at[number] - at) for number, at in committed_at.items()]


def _await_calls(place: Place, wanted: int, worker: Processes) -> None:
    until = monotonic() + _STARTS_IN
    while (calls := ledger.count(place.ledger)) < wanted:
        if worker.has_ended or monotonic() > until:
            raise Refused(f"{calls} calls instead of {wanted}: {worker.said()}")
        sleep(_PAUSE)


def enqueue_slowly(name: str, start: int, stop: int, is_atomic: bool) -> list[float]:
    """Enqueue jobs one by one, where Django is set up; return the moments after it."""
    from django.db import connection, transaction

    system, moments = SYSTEMS[name], []
    connection.ensure_connection()
    for number in range(start, stop):
        with ExitStack() as around:
            if is_atomic:
                around.enter_context(transaction.atomic())
            system.enqueue_one("noop", number)
        moments.append(monotonic())
        sleep(_PAUSE)
    return moments
