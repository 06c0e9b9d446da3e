"""``enqueue``: how fast jobs are scheduled, beside the ORM's INSERT of such rows."""

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from functools import partial
from time import monotonic
from typing import Any

from benchmarks.places import Place
from benchmarks.report import Measured
from benchmarks.run import Run, together
from benchmarks.systems import SYSTEMS, home

_WARMING = 100
_TURNS = 20
_FUNCTION = "benchmarks.work.noop"


def measure(run: Run) -> None:
    with ExitStack() as around:
        place = around.enter_context(home(SYSTEMS["async_queue"], run.vendor))
        place.call(prepare, "async_queue")
        for case in ("each committed", "in one transaction"):
            ways = together(
                ("schedule", "objects.create"),
                partial(_rates, place, case, run.jobs),
            )
            run.compare("enqueue", case, "jobs/s", ways)
        many = run.jobs * 5 // 2
        subjects: dict[str, Callable[[], Measured]] = {
            name: partial(_rate, place, at_once, name, many)
            for name in ("schedule_many", "bulk_create")
        }
        for name in _others(run):
            other = around.enter_context(home(SYSTEMS[name], run.vendor))
            other.call(prepare, name)
            called = "batch_defer" if name == "procrastinate" else name
            subjects[called] = partial(_rate, other, in_bulk, name, many)
        run.compare("enqueue", "many at once", "jobs/s", subjects)


def _others(run: Run) -> list[str]:
    """Return those that have a way to enqueue many; procrastinate's is a yardstick."""
    names = ["procrastinate", "pgqueuer", "django-ox", "dj-queue"]
    yardstick = ["procrastinate"] if SYSTEMS["procrastinate"].is_installed else []
    wanted = [*run.beside, *yardstick]
    return [n for n in names if n in wanted and run.vendor in SYSTEMS[n].vendors]


def _rates(place: Place, case: str, count: int) -> dict[str, Measured]:
    rates = place.call(one_by_one, case == "in one transaction", count)
    return {name: Measured(rate) for name, rate in rates.items()}


def _rate(place: Place, function: Callable[..., float], *args: Any) -> Measured:
    return Measured(place.call(function, *args))


# What is called where Django is set up.


def prepare(name: str) -> None:
    """Make the tables of a system."""
    SYSTEMS[name].prepare()


def one_by_one(is_atomic: bool, count: int) -> dict[str, float]:
    """Return how many jobs a second are inserted by a statement each, in turns."""
    from django.db import transaction

    from async_queue import schedule

    ways: dict[str, Callable[[int], object]] = {
        "schedule": lambda number: schedule(_FUNCTION, [number]),
        "objects.create": _create(),
    }
    turn = max(1, count // _TURNS)
    seconds = dict.fromkeys(ways, 0.0)
    for start in range(-turn, turn * _TURNS, turn):
        for name, act in ways.items():
            began_at = monotonic()
            with transaction.atomic() if is_atomic else nullcontext():
                for number in range(start, start + turn):
                    act(number)
            if start >= 0:  # else it was to get warm
                seconds[name] += monotonic() - began_at
    return {name: turn * _TURNS / used for name, used in seconds.items()}


def at_once(name: str, count: int) -> float:
    """Return how many jobs a second are inserted, by one call."""
    from async_queue import schedule_many
    from async_queue.models import Job

    row = _row()
    act: dict[str, Callable[[Iterable[int]], object]] = {
        "schedule_many": lambda numbers: schedule_many(
            [(_FUNCTION, [number]) for number in numbers]
        ),
        "bulk_create": lambda numbers: Job.objects.bulk_create(
            [Job(**row(number)) for number in numbers]
        ),
    }
    return _timed(act[name], count)


def in_bulk(name: str, count: int) -> float:
    """Return how many jobs a second another system takes, by the best of its ways."""
    return _timed(partial(SYSTEMS[name].enqueue, "noop"), count)


def _timed(act: Callable[[range], object], count: int) -> float:
    act(range(_WARMING))
    began_at = monotonic()
    act(range(count))
    return count / (monotonic() - began_at)


def _create() -> Callable[[int], object]:
    from async_queue.models import Job

    row = _row()
    return lambda number: Job.objects.create(**row(number))


def _row() -> Callable[[int], dict[str, Any]]:
    """Return what makes the columns of a job; its seal and identity cost nothing."""
    from django.utils.timezone import now

    from async_queue import schedule
    from async_queue.models import Job

    like = Job.objects.filter(pk=schedule(_FUNCTION, [0]).pk).values().get()
    for name in ("id", "args", "run_after", "enqueued_at"):
        del like[name]

    def row(number: int) -> dict[str, Any]:
        moment = now()
        moments = {"run_after": moment, "enqueued_at": moment}
        return {**like, "args": json.dumps([number]), **moments}

    return row
