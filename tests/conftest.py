"""Fixtures that several files share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from time import monotonic

import pytest
from django.db import connection
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.db import sidefile
from tests import jobs


def pytest_sessionfinish() -> None:
    # SQLite's file of locks, of which Django does not know.
    name = connection.settings_dict["TEST"]["NAME"]
    Path(f"{name}-aqlock").unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def no_life_is_left_over() -> Iterator[None]:
    """Each test gives back what it has taken, for its number may come again."""
    before = lives()
    yield
    assert lives() <= before


def lives() -> set[int]:
    """Return the numbers whose locks this process holds, which only SQLite's are."""
    return {number for file in sidefile._open_files for number in file._mine}


@pytest.fixture
def second_connection() -> Iterator[BaseDatabaseWrapper]:
    """Another session on the tests' database, as another process would have it."""
    other = connection.copy()
    yield other
    other.close()


@pytest.fixture
def gate() -> Iterator[Event]:
    """What lets `jobs.leave_then_wait` return; open at the end in any case."""
    jobs.begun.clear()
    jobs.go_on.clear()
    yield jobs.go_on
    jobs.go_on.set()


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return _wait_until


def _wait_until(predicate: Callable[[], object], seconds: float = 20) -> None:
    """Return as soon as the predicate is true; fail where it is not in time."""
    deadline, pause = monotonic() + seconds, Event()
    while not predicate():
        assert monotonic() < deadline, f"not true within {seconds} s: {predicate}"
        pause.wait(0.01)
