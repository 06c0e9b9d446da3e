"""What was measured, as a table for people and as JSON, with the ratios that must hold.

Subjects of one case are measured in turn, round by round, so that what the machine does
otherwise hits all of them. A ratio is the median of those of the rounds.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.bounds import BOUNDS, Bound
from benchmarks.places import ROOT

_PACKAGES = (
    *("async_queue", "Django", "psycopg", "mysqlclient"),
    *("asyncpg", "pgqueuer", "procrastinate", "django-ox", "huey", "peewee"),
    *("django-tasks-db", "dj-queue", "celery", "redis"),
)


class Measured(NamedTuple):
    """A value, and what else was seen while it was measured."""

    value: float
    more: Mapping[str, float] = {}


@dataclass
class Series:
    """The values of one subject in one case, a value each round; None for an error."""

    figure: str
    case: str
    subject: str
    unit: str
    values: list[float | None] = field(default_factory=list)
    more: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""
    note: str = ""

    def add(self, measured: Measured) -> None:
        self.values.append(measured.value)
        for name, value in measured.more.items():
            self.more.setdefault(name, []).append(value)

    def fail(self, error: str) -> None:
        self.values.append(None)
        self.error = error

    @property
    def median(self) -> float | None:
        """The median of its rounds; none where one of them was refused."""
        values = [value for value in self.values if value is not None]
        return median(values) if values and not self.error else None

    def as_dict(self) -> dict[str, Any]:
        medians = {name: median(values) for name, values in self.more.items()}
        return {**asdict(self), "median": self.median, "more medians": medians}


class Ratio(NamedTuple):
    """A subject's values in those of another, and what is required of that."""

    figure: str
    case: str
    subject: str
    against: str | None  # None: the value itself is bounded
    ratio: float | None
    rounds: list[float]
    required: str
    is_held: bool | None  # None: nothing is required


@dataclass
class Report:
    """All of one run."""

    vendor: str
    options: Mapping[str, Any]
    server: str = ""
    series: list[Series] = field(default_factory=list)

    def ratios(self) -> Iterator[Ratio]:
        """Yield the ratios of all subjects to the first of their case."""
        for found in self._cases():
            subject, *others = found
            bounds = [bound for bound in BOUNDS if self._is_about(bound, subject)]
            for bound in (bound for bound in bounds if bound.against is None):
                values = [value for value in subject.values if value is not None]
                yield _bounded(subject, None, subject.median, values, bound)
            for other in others:
                rounds = _quotients(subject, other)
                is_whole = bool(rounds) and _is_whole(subject, other)
                ratio = median(rounds) if is_whole else None
                mine = [each for each in bounds if each.against == other.subject]
                yield _bounded(
                    subject, other.subject, ratio, rounds, mine[0] if mine else None
                )

    def _cases(self) -> list[list[Series]]:
        cases: dict[tuple[str, str], list[Series]] = {}
        for each in self.series:
            cases.setdefault((each.figure, each.case), []).append(each)
        return list(cases.values())

    def _is_about(self, bound: Bound, series: Series) -> bool:
        case = (self.vendor, series.figure, series.case)
        return (bound.vendor, bound.figure, bound.case) == case

    @property
    def has_failed(self) -> bool:
        """Whether a run was refused."""
        return any(series.error for series in self.series)

    @property
    def is_held(self) -> bool:
        """Whether nothing failed and all that is required, and was measured, holds."""
        is_held = all(each.is_held is not False for each in self.ratios())
        return is_held and not self.has_failed

    def as_dict(self) -> dict[str, Any]:
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "database": self.vendor,
            "server": self.server,
            "options": dict(self.options),
            "machine": _machine(),
            "versions": _versions(),
            "series": [each.as_dict() for each in self.series],
            "ratios": [each._asdict() for each in self.ratios()],
            "held": self.is_held,
        }

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    def show(self) -> None:
        print(f"\n{self.server}, {_machine()['cores']} cores, {_commit()}\n")
        _table(
            ("figure", "case", "subject", "median", "", "rounds", "and"),
            [_row(each) for each in self.series],
        )
        print()
        _table(
            ("figure", "case", "subject", "against", "ratio", "required", ""),
            [_ratio_row(each) for each in self.ratios()],
        )
        # What goes wrong often goes wrong for many.
        errors: dict[str, list[str]] = {}
        for each in self.series:
            if each.error:
                who = f"{each.figure}, {each.case}, {each.subject}"
                errors.setdefault(each.error, []).append(who)
        for error, refused in errors.items():
            print(f"\nRefused: {'; '.join(refused)}:\n{error.strip()}")


def _quotients(subject: Series, other: Series) -> list[float]:
    pairs = zip(subject.values, other.values, strict=False)
    return [round(mine / its, 4) for mine, its in pairs if mine is not None and its]


def _is_whole(*series: Series) -> bool:
    return all(each.median is not None for each in series)


def _bounded(
    subject: Series,
    against: str | None,
    ratio: float | None,
    rounds: list[float],
    bound: Bound | None,
) -> Ratio:
    required, is_held = "", None
    if bound is not None:
        required = f"{bound.sense} {bound.limit:g}"
        is_held = ratio is not None and bound.holds(ratio)
    case = (subject.figure, subject.case, subject.subject)
    return Ratio(*case, against, ratio, rounds, required, is_held)


def _row(series: Series) -> list[str]:
    medians = {name: median(values) for name, values in series.more.items()}
    told = [f"{name} {_number(value)}" for name, value in medians.items()]
    return [
        series.figure,
        series.case,
        series.subject,
        "refused" if series.error else _number(series.median),
        series.unit,
        " ".join(_number(value) for value in series.values),
        "; ".join([*told, series.note] if series.note else told),
    ]


def _ratio_row(ratio: Ratio) -> list[str]:
    verdict = {True: "held", False: "NOT HELD", None: ""}[ratio.is_held]
    return [
        *(ratio.figure, ratio.case, ratio.subject, ratio.against or "(itself)"),
        *("-" if ratio.ratio is None else f"{ratio.ratio:.2f}", ratio.required),
        verdict,
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(header: tuple[str, ...], rows: list[list[str]]) -> None:
    lines = [list(header), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "no commit"


def _machine() -> dict[str, Any]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory in GiB": round(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1
        ),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
