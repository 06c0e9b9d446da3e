"""The ledger in which each call of a job is written, by all systems alike.

A file to which processes append: one write for each call, so that none is torn.
"""

import os
import struct
from collections import Counter
from functools import cache
from pathlib import Path
from time import monotonic
from typing import NamedTuple

VARIABLE = "BENCHMARKS_LEDGER"
_ENTRY = struct.Struct("<qd")
_SHOWN = 5


class Refused(Exception):
    """A run that does not count, and what was wrong with it."""


class Entry(NamedTuple):
    """The call of the job of this number, and when it was, by the machine's clock."""

    number: int
    at: float


def record(number: int) -> None:
    """Write down that the job of this number is called now."""
    os.write(_descriptor(), _ENTRY.pack(number, monotonic()))


@cache
def _descriptor() -> int:
    return os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def count(path: Path) -> int:
    """Return how many calls there have been."""
    return path.stat().st_size // _ENTRY.size if path.exists() else 0


def read(path: Path) -> list[Entry]:
    """Return the calls in the order in which they were made."""
    if not path.exists():
        return []
    return sorted(
        (Entry(*entry) for entry in _ENTRY.iter_unpack(path.read_bytes())),
        key=lambda entry: entry.at,
    )


def check(entries: list[Entry], jobs: int) -> None:
    """Raise Refused unless each number below ``jobs`` was called exactly once."""
    calls = Counter(entry.number for entry in entries)
    wrong = {
        "never called": [number for number in range(jobs) if not calls[number]],
        "called more than once": [n for n, times in calls.items() if times > 1],
        "unknown": [n for n in calls if not 0 <= n < jobs],
    }
    told = [
        f"{len(numbers)} {what}, such as {sorted(numbers)[:_SHOWN]}"
        for what, numbers in wrong.items()
        if numbers
    ]
    if told:
        raise Refused(f"of {jobs} jobs, {'; '.join(told)}")
