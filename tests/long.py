"""Scenarios that have a short form, for every run, and a long one."""

import os
from typing import TypeVar

T = TypeVar("T")


def long(usual: T, thorough: T) -> T:
    """Return the second one if AQ_LONG is set, and the first one if not."""
    return thorough if os.environ.get("AQ_LONG") else usual


def bound(strict: float) -> float:
    """Return the seconds that something may take: the others are for a busy machine."""
    return strict if os.environ.get("AQ_LONG") else max(10 * strict, 15.0)
