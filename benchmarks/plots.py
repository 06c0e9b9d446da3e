"""Drawings for the docs, of what a run has written as JSON.

``python -m benchmarks.plots results.json docs/figures`` draws them again.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.systems.base import KINDS

Series = Mapping[str, Any]
Curve = tuple[list[int], list[float]]  # where, and how much there

_OURS = "#0c4b33"
_OTHERS = "#8a9a93"
_SUBJECT = "async_queue"
_WIDTH = 7.0


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Draw bars of rates and of claims, and curves of all that grows."""
    folder.mkdir(parents=True, exist_ok=True)
    cases: dict[tuple[str, str], list[Series]] = {}
    for series in report["series"]:
        cases.setdefault((series["figure"], series["case"]), []).append(series)
    name = report["database"]
    for (figure, case), found in cases.items():
        if figure in ("drain", "enqueue", "pickup"):
            words = case.replace(",", "").replace(" ", "-")
            path = folder / f"{name}-{figure}-{words}.svg"
            # The first of a case is what it is about.
            ours = {found[0]["subject"]}
            _bars(f"{report['server']}: {figure}, {case}", found, ours, path)
    _claims(report, folder / f"{name}-claims.svg")
    _decay(report, folder / f"{name}-decay.svg")
    for kind in KINDS:
        _threads(report, kind, folder / f"{name}-{kind}-threads.svg")
    _queues(report, folder / f"{name}-queues.svg")
    _rows(report, folder / f"{name}-rows.svg")


def _bars(title: str, found: Sequence[Series], ours: set[str], path: Path) -> None:
    known = [series for series in found if series["median"] is not None]
    if not known:
        return
    figure = Figure(figsize=(_WIDTH, 0.8 + 0.32 * len(known)), layout="constrained")
    axes = figure.add_subplot()
    names = [series["subject"] for series in known]
    bars = axes.barh(
        names,
        [series["median"] for series in known],
        color=[_OURS if series["subject"] in ours else _OTHERS for series in known],
    )
    axes.bar_label(bars, fmt="{:,.4g}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    _finish(figure, axes, title, known[0]["unit"], path)


def _claims(report: Mapping[str, Any], path: Path) -> None:
    unit = "times as long as in an empty table"
    found = [
        {"subject": each["case"], "median": each["ratio"], "unit": unit}
        for each in report["ratios"]
        if each["figure"] == "claims"
    ]
    rows = f"{report['options']['rows']:,}"
    ours = {each["subject"] for each in found}
    _bars(f"{report['server']}: beside {rows} rows", found, ours, path)


def _decay(report: Mapping[str, Any], path: Path) -> None:
    found = {
        series["case"]: [
            value
            for name, value in series["more medians"].items()
            if name.startswith("tenth ")
        ]
        for series in report["series"]
        if series["figure"] == "decay" and series["subject"] == "last tenth"
    }
    tenths = list(range(1, 11))
    curves = {case: (tenths, values) for case, values in found.items() if values}
    _curves(f"{report['server']}: a long backlog", curves, "tenth of the jobs", path)


def _threads(report: Mapping[str, Any], kind: str, path: Path) -> None:
    curves: dict[str, Curve] = {}
    for series in report["series"]:
        of, _, shape = series["case"].partition(" ")
        if (series["figure"], of) != ("drain", kind) or series["median"] is None:
            continue
        processes, _, threads = shape.partition("x")
        many = "processes" if processes != "1" else "process"
        name = f"{series['subject']}, {processes} {many}"
        counts, rates = curves.setdefault(name, ([], []))
        counts.append(int(threads))
        rates.append(series["median"])
    curves = {name: curve for name, curve in curves.items() if len(curve[0]) > 1}
    _curves(f"{report['server']}: {kind}, by threads", curves, "threads", path)


def _queues(report: Mapping[str, Any], path: Path) -> None:
    curve: Curve = ([], [])
    for series in report["series"]:
        if (series["figure"], series["unit"]) == ("growth", "jobs/s"):
            # "1,000 queues", or async_queue with one.
            number = series["subject"].partition(" queues")[0].replace(",", "")
            curve[0].append(int(number) if number.isdigit() else 1)
            curve[1].append(series["median"] or 0.0)
    curves = {"jobs with an INSERT, 1x4": curve} if curve[0] else {}
    title = f"{report['server']}: jobs in many queues"
    _curves(title, curves, "queues", path, is_log=True)


def _rows(report: Mapping[str, Any], path: Path) -> None:
    curves: dict[str, Curve] = {}
    for ratio in report["ratios"]:
        if (ratio["figure"], ratio["against"]) == ("growth", "empty table"):
            what, _, rows = ratio["case"].partition(", ")
            where, values = curves.setdefault(what, ([], []))
            where.append(int(rows.partition(" ")[0].replace(",", "")))
            values.append(ratio["ratio"])
    title = f"{report['server']}: claims and looks in a table that grows"
    unit = "times as long as in an empty table"
    _curves(title, curves, "rows of each kind", path, unit=unit, is_log=True)


def _curves(
    title: str,
    curves: Mapping[str, Curve],
    label: str,
    path: Path,
    *,
    unit: str = "jobs/s",
    is_log: bool = False,
) -> None:
    if not curves:
        return
    figure = Figure(figsize=(_WIDTH, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, (where, values) in curves.items():
        is_ours = name.startswith(_SUBJECT)
        axes.plot(where, values, marker="o", linewidth=2 if is_ours else 1, label=name)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    if is_log:
        axes.set_xscale("log")
    figure.legend(loc="outside right upper", fontsize="small")
    _finish(figure, axes, title, label, path)


def _finish(figure: Figure, axes: Any, title: str, label: str, path: Path) -> None:
    axes.set_title(title, fontsize="medium", loc="left")
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
