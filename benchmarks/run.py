"""One run of the benchmarks: its options, and how subjects are measured in turn."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from benchmarks.ledger import Refused
from benchmarks.places import Failed
from benchmarks.report import Measured, Report, Series

Subjects = Mapping[str, Callable[[], Measured]]
# The values of one look at a subject, by their cases.
Look = Callable[[], Mapping[str, Measured]]
T = TypeVar("T")
_ERRORS = (Refused, Failed, subprocess.TimeoutExpired)


@dataclass(frozen=True)
class Run:
    """What is asked for, and where it is told."""

    vendor: str
    report: Report
    repeat: int
    jobs: int
    rows: int
    threads: Sequence[int]
    processes: Sequence[int]
    beside: Sequence[str]
    is_quick: bool

    def measure(self, name: str, figure: Callable[["Run"], None]) -> None:
        """Measure a figure; one that cannot even begin is refused, not the others."""
        try:
            figure(self)
        except _ERRORS as error:
            series = Series(name, "preparation", "", "")
            series.fail(str(error))
            self.report.series.append(series)

    def compare(
        self,
        figure: str,
        case: str,
        unit: str,
        subjects: Subjects,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Measure the subjects in turn, round by round; the first is what it is about.

        One that has failed is left out of the rounds that follow.
        """
        looks = {name: _as_look(case, measure) for name, measure in subjects.items()}
        self.look(figure, {case: unit}, looks, notes)

    def look(
        self,
        figure: str,
        units: Mapping[str, str],
        looks: Mapping[str, Look],
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Do the same where one look at a subject gives the values of several cases."""
        notes = notes or {}
        series = {
            (case, name): Series(figure, case, name, unit, note=notes.get(name, ""))
            for case, unit in units.items()
            for name in looks
        }
        self.report.series += series.values()
        for _ in range(self.repeat):
            for name, look in looks.items():
                _add([series[case, name] for case in units], look)


def together(
    names: Iterable[str], measure: Callable[[], Mapping[str, T]]
) -> dict[str, Callable[[], T]]:
    """Return subjects that are measured at once; the first of a round sees to it."""
    found: dict[str, T] = {}

    def take(name: str) -> T:
        if name not in found:
            found.clear()
            found.update(measure())
        return found.pop(name)

    return {name: partial(take, name) for name in names}


def _as_look(case: str, measure: Callable[[], Measured]) -> Look:
    return lambda: {case: measure()}


def _add(series: Sequence[Series], look: Look) -> None:
    if any(each.error for each in series):
        return
    try:
        found = look()
    except _ERRORS as error:
        for each in series:
            each.fail(str(error))
    else:
        for each in series:
            each.add(found[each.case])
    for each in series:
        told = each.error.strip().splitlines()[-1:] or [
            f"{each.values[-1]:,.4g} {each.unit}"
        ]
        what = f"{each.figure}, {each.case}, {each.subject}"
        print(f"{what}: {told[0]}", file=sys.stderr, flush=True)
