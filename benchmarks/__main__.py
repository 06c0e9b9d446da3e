"""Measure async_queue beside what the database allows, and beside other queues.

    python -m benchmarks --quick                   everything, small
    python -m benchmarks drain --beside all        one figure, with all other queues
    python -m benchmarks --json results/postgres.json --plots docs/figures

Figures:

FIGURES

Subjects of a case are measured in turn, in the same run, on the same work, and the
ratios printed are medians of the rounds. A run counts only if every job ran exactly
once, by a ledger in which each call is written, by the table of effects, and by what
the system itself says. "2x4" are 2 processes of 4 threads. R, E and D are references:

REFERENCES

Every database is made for one run, on the server that is there, and dropped after it.
"""

import argparse
import signal
import sys
from pathlib import Path

from benchmarks import references
from benchmarks.figures import FIGURES, described
from benchmarks.places import VENDORS, server
from benchmarks.report import Report
from benchmarks.run import Run
from benchmarks.systems import BESIDE, SYSTEMS

# What --quick changes.
_FULL = {"jobs": 20_000, "rows": 1_000_000, "repeat": 3}
_QUICK = {"jobs": 1_000, "rows": 20_000, "repeat": 1}


def main() -> int:
    options = _options()
    # So that workers end with it, and databases are dropped.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report = Report(options.db, vars(options), server(options.db))
    names = ("repeat", "jobs", "rows", "threads", "processes", "beside")
    run = Run(
        vendor=options.db,
        report=report,
        is_quick=options.quick,
        **{name: getattr(options, name) for name in names},
    )
    try:
        for name in options.figures:
            run.measure(name, FIGURES[name])
    finally:
        if options.json:
            report.write(Path(options.json))
        report.show()
        if options.plots:
            from benchmarks.plots import draw

            draw(report.as_dict(), Path(options.plots))
    # What is small and measured once proves no ratio.
    return int(report.has_failed if options.quick else not report.is_held)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=_description(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "figures",
        nargs="*",
        metavar="FIGURE",
        help=f"{', '.join(FIGURES)}; all if none is given",
    )
    add("--db", choices=VENDORS, default="postgres")
    add(
        "--beside",
        nargs="+",
        metavar="SYSTEM",
        choices=["all", *BESIDE],
        default=[],
        help=f"drain with these, too: {', '.join(BESIDE)}, or all",
    )
    add("--repeat", type=int, metavar="N", help="rounds, of which medians are told (3)")
    add("--jobs", type=int, metavar="N", help="that are drained (20,000)")
    add(
        "--rows",
        type=int,
        metavar="N",
        help="beside which jobs are claimed (1,000,000)",
    )
    add("--threads", type=int, nargs="+", metavar="N", default=[4])
    add("--processes", type=int, nargs="+", metavar="N", default=[1, 2])
    add("--quick", action="store_true", help="all small and once: to see that it works")
    add("--json", metavar="FILE", help="where all values are written")
    add("--plots", metavar="FOLDER", help="where figures are drawn")
    options = parser.parse_args()
    options.figures = options.figures or list(FIGURES)
    if unknown := [name for name in options.figures if name not in FIGURES]:
        parser.error(f"there is no figure {unknown[0]!r}: {', '.join(FIGURES)}")
    for name, value in (_QUICK if options.quick else _FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.beside = _installed(options.beside)
    return options


def _installed(wanted: list[str]) -> list[str]:
    names = BESIDE if "all" in wanted else wanted
    found = [name for name in names if SYSTEMS[name].is_installed]
    if missing := ", ".join(name for name in names if name not in found):
        print(f"left out, because they are not installed: {missing}", file=sys.stderr)
    return found


def _description() -> str:
    told = (references.__doc__ or "").partition("\n\nR  ")[2]
    doc = (__doc__ or "").replace("REFERENCES", f"R  {told.rstrip()}")
    return doc.replace("FIGURES", described())


if __name__ == "__main__":
    sys.exit(main())
