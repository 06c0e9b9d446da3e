"""What the scenarios measure, kept for ``docs/reliability.rst``.

With AQ_FIGURES=FILE a run of the tests appends to that file; ``python -m tests.figures
FILE ... > docs/figures.csv`` makes the page's table of such files.
"""

import ast
import csv
import fileinput
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from django.db import connection

ROOT = Path(__file__).parent.parent
HEADER = ["Fault", "Figure", "PostgreSQL", "MariaDB", "SQLite"]


def figure(name: str, value: float | int | str, unit: str = "") -> None:
    """Append a figure to the file that AQ_FIGURES names, if it names one."""
    path = os.environ.get("AQ_FIGURES")
    if not path:
        return
    line = {
        "name": name,
        "value": value,
        "unit": unit,
        "database": connection.display_name,
        "test": os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0],
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{json.dumps(line)}\n")


def table(lines: Iterable[str]) -> list[list[str]]:
    """Return a row for each figure, in the order of the faults; the latest counts."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for line in map(json.loads, lines):
        cells = found.setdefault(_named(line["name"], faults(line["test"])), {})
        cells[line["database"]] = _shown(line["name"], line["value"], line["unit"])
    rows = [
        [number, name, *(cells.get(database, "") for database in HEADER[2:])]
        for (number, name), cells in found.items()
    ]
    return [HEADER, *sorted(rows, key=_first)]


def _shown(name: str, value: float | int | str, unit: str) -> str:
    if isinstance(value, float):
        unit = unit or ("" if "ratio" in name else "s")
        value = f"{value:.3f}".rstrip("0").rstrip(".")
    return f"{value} {unit}".rstrip()


def _named(name: str, numbers: str) -> tuple[str, str]:
    """Return the fault and the figure: some names begin with one of the faults."""
    # One row for all databases.
    name = re.sub(rf",? (?:{'|'.join(HEADER[2:])}) [\d.]+", "", name)
    first, _, rest = name.partition(" ")
    return (first, rest) if first in re.findall(r"\d+", numbers) else (numbers, name)


def faults(path: str) -> str:
    """Return the numbers of the faults that a scenario's docstring names."""
    story = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    named = re.findall(r"(?:[Ff]aults? |\()(\d+(?:(?:, | and |-)\d+)*)", story)
    return named[-1] if named else ""


def _first(row: list[str]) -> int:
    numbers = re.findall(r"\d+", row[0])
    return int(numbers[0]) if numbers else sys.maxsize


if __name__ == "__main__":
    with fileinput.input() as figures:
        csv.writer(sys.stdout, lineterminator="\n").writerows(table(figures))
