"""``growth``: the rate as queues become more, and the time of a claim as rows do."""

from functools import partial

from benchmarks import claims
from benchmarks.drain import drain
from benchmarks.report import Measured
from benchmarks.run import Run
from benchmarks.systems import QUEUES, SYSTEMS, System

_ROWS = (1_000, 10_000, 100_000, 1_000_000)  # of each kind of `claims.BESIDE`


def measure(run: Run) -> None:
    """Measure jobs in 1 to 1,000 queues, then claims beside 1,000 rows to all.

    The quick way, only the first two steps of each.
    """
    names = ["async_queue", *QUEUES.values()]
    most = 2 if run.is_quick else None
    subjects = {name: partial(_rate, run, SYSTEMS[name]) for name in names[:most]}
    run.compare("growth", "insert 1x4", "jobs/s", subjects)
    with claims.table(run.vendor) as empty, claims.table(run.vendor) as beside:
        held = 0
        for rows in (rows for rows in _ROWS[:most] if rows <= run.rows):
            for columns in claims.BESIDE.values():
                beside.call(claims.insert_rows, rows - held, *columns)
            held = rows
            what = f"{rows:,} rows of each kind"
            count = 20 if run.is_quick else 200
            claims.compare(run, "growth", what, beside, empty, count)


def _rate(run: Run, system: System) -> Measured:
    drained = drain(system, run.vendor, kind="insert", jobs=run.jobs)
    return Measured(drained.rate, {"CPU ms/job": drained.cpu_ms})
