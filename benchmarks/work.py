"""The jobs that every system is given: one that does nothing, and one that inserts."""

import time

from benchmarks.ledger import record
from benchmarks.models import Effect


def noop(number: int) -> None:
    record(number)


def insert(number: int) -> None:
    record(number)
    Effect.objects.create(number=number)


def nap(number: int) -> None:
    """Keep a worker busy, and not the processor."""
    record(number)
    time.sleep(0.01)
