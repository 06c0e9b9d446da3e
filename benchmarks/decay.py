"""``decay``: the rate at the end of a long backlog, beside that at its beginning."""

from functools import partial
from itertools import pairwise

from benchmarks.drain import drain
from benchmarks.ledger import Entry
from benchmarks.report import Measured
from benchmarks.run import Run, together
from benchmarks.systems import SYSTEMS
from benchmarks.systems.base import KINDS

_TENTHS = 10


def measure(run: Run) -> None:
    """Measure with the database as it is, so that it vacuums when it sees fit."""
    jobs = run.jobs * (5 if run.is_quick else 25)
    for kind in ("noop",) if run.is_quick else KINDS:
        subjects = together(
            ("last tenth", "first tenth"), partial(_look, run.vendor, kind, jobs)
        )
        run.compare("decay", f"{kind} 1x4", "jobs/s", subjects)


def _look(vendor: str, kind: str, jobs: int) -> dict[str, Measured]:
    drained = drain(SYSTEMS["async_queue"], vendor, kind=kind, jobs=jobs)
    rates = _rates(drained.calls)
    told = {f"tenth {number}": rate for number, rate in enumerate(rates, start=1)}
    return {
        "last tenth": Measured(rates[-1], told),
        "first tenth": Measured(rates[0]),
    }


def _rates(calls: list[Entry]) -> list[float]:
    """Return the calls a second in each tenth of them."""
    size = len(calls) // _TENTHS
    marks = [calls[number].at for number in range(0, size * _TENTHS, size)]
    marks.append(calls[size * _TENTHS - 1].at)
    return [size / (end - start) for start, end in pairwise(marks)]
