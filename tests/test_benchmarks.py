"""That the benchmarks count what they say they count."""

import json
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from benchmarks import ledger
from benchmarks.drain import drain
from benchmarks.ledger import Entry, Refused
from benchmarks.places import Failed, Place, server
from benchmarks.processes import python
from benchmarks.report import Measured, Report
from benchmarks.run import Run, together
from benchmarks.systems import BESIDE, QUEUES, REFERENCES, SYSTEMS
from benchmarks.systems.ours import AsyncQueue

CALLS = """
import signal
from benchmarks.ledger import record
for number in (0, 1, 2, 1):
    record(number)
signal.pause()
"""
VENDORS = {"sqlite": "sqlite", "postgresql": "postgres", "mysql": "mariadb"}


def entries(*numbers: int) -> list[Entry]:
    return [Entry(number, float(at)) for at, number in enumerate(numbers)]


def report_of(vendor: str = "postgres") -> tuple[Run, Report]:
    report = Report(vendor, {})
    return Run(vendor, report, 3, 1, 1, [4], [1], [], False), report


def test_ledger_passes_jobs_that_ran_once_each():
    ledger.check(entries(2, 0, 1), jobs=3)


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ((0, 2), r"1 never called, such as \[1\]"),
        ((0, 1, 2, 1), r"1 called more than once, such as \[1\]"),
        ((0, 1, 2, 3), r"1 unknown, such as \[3\]"),
    ],
)
def test_ledger_refuses_what_is_missing_doubled_or_unknown(numbers, complaint):
    with pytest.raises(Refused, match=complaint):
        ledger.check(entries(*numbers), jobs=3)


def test_ledger_reads_what_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "ledger"
    monkeypatch.setenv(ledger.VARIABLE, str(path))
    ledger._descriptor.cache_clear()

    for number in (1, 0):
        ledger.record(number)

    ledger._descriptor.cache_clear()
    assert ledger.count(path) == 2
    assert [entry.number for entry in ledger.read(path)] == [1, 0]


def test_ratio_is_the_median_of_those_of_the_rounds():
    run, report = report_of()
    mine, its = iter([80.0, 90.0, 10.0]), iter([100.0, 100.0, 100.0])

    run.compare(
        "drain",
        "insert 1x4",
        "jobs/s",
        {"async_queue": lambda: Measured(next(mine)), "R": lambda: Measured(next(its))},
    )

    (ratio,) = report.ratios()
    assert (ratio.ratio, ratio.rounds) == (0.8, [0.8, 0.9, 0.1])
    assert (ratio.required, ratio.is_held) == (">= 0.75", True)
    assert [series.median for series in report.series] == [80, 100]


def test_ratio_below_its_bound_is_told():
    run, report = report_of()

    run.compare("pickup", "p50", "ms", {"async_queue": lambda: Measured(2.1)})

    (ratio,) = report.ratios()
    assert (ratio.against, ratio.ratio, ratio.is_held) == (None, 2.1, False)
    assert not report.is_held


def test_subject_that_was_refused_has_no_figure():
    run, report = report_of()

    def refuse() -> Measured:
        raise Refused("one job ran twice")

    run.compare(
        "drain",
        "insert 1x4",
        "jobs/s",
        {"async_queue": refuse, "R": lambda: Measured(1)},
    )

    refused, measured = report.series
    assert (refused.median, refused.error) == (None, "one job ran twice")
    assert measured.values == [1, 1, 1]
    assert report.has_failed
    assert not any(ratio.is_held for ratio in report.ratios())


def test_figure_that_cannot_begin_is_refused(capsys: pytest.CaptureFixture[str]):
    run, report = report_of()

    def figure(run: Run) -> None:
        raise Failed("no such database")

    run.measure("claims", figure)

    report.show()
    assert report.has_failed
    assert "claims, preparation, :\nno such database" in capsys.readouterr().out


def test_subjects_measured_together_are_measured_once_a_round():
    rounds = iter([1.0, 2.0, 3.0])
    run, report = report_of()

    def measure() -> dict[str, Measured]:
        value = next(rounds)
        return {"a": Measured(value), "b": Measured(-value)}

    run.compare("enqueue", "any", "jobs/s", together(("a", "b"), measure))

    assert [each.values for each in report.series] == [[1, 2, 3], [-1, -2, -3]]


def test_report_names_what_the_server_leaves_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PGOPTIONS", "-c synchronous_commit=off")
    vendor = VENDORS[connection.vendor]

    assert ("synchronous_commit off" in server(vendor)) == (vendor == "postgres")


def test_report_is_json_with_all_values(tmp_path: Path):
    run, report = report_of()
    run.compare("drain", "noop 1x4", "jobs/s", {"R": lambda: Measured(5, {"CPU": 1})})

    report.write(tmp_path / "results.json")

    told = json.loads((tmp_path / "results.json").read_text())
    assert told["versions"]["Django"]
    assert told["series"][0]["values"] == [5, 5, 5]
    assert told["series"][0]["more medians"] == {"CPU": 1}


def test_every_system_has_a_name_of_its_own():
    assert set(SYSTEMS) == {"async_queue", *QUEUES.values(), *REFERENCES, *BESIDE}


class Twice(AsyncQueue):
    """A worker that calls its jobs twice, and says that all is well."""

    def commands(self, place: Place, threads: int, processes: int) -> list[list[str]]:
        return [python("-c", CALLS)]

    def remaining(self, place: Place, connection: Any) -> int:
        return 0

    def finished(self, connection: Any) -> int:
        return 3


def test_drain_refuses_a_run_in_which_a_job_ran_twice():
    with pytest.raises(Refused, match="1 called more than once"):
        drain(Twice(), VENDORS[connection.vendor], kind="noop", jobs=3)


@pytest.mark.parametrize("name", ["async_queue", "10 queues", "R", "D"])
def test_drain_counts_fifty_jobs(name: str):
    drained = drain(SYSTEMS[name], VENDORS[connection.vendor], kind="insert", jobs=50)

    assert len(drained.calls) == 50
    assert drained.rate > 0
    assert drained.memory.uss > 0
