"""The line of SQLite's writers: who comes next, and what becomes of who gives up."""

import time
from threading import Event, Thread

import pytest
from django.db.utils import OperationalError

from async_queue.db import sidefile
from async_queue.db.sidefile import Place, SideFile


@pytest.fixture
def file(tmp_path):
    return SideFile(str(tmp_path / "line"))


class Writer(Thread):
    """Stands in line, says that it writes, and does so until it is told to end."""

    def __init__(self, file, patience=None):
        super().__init__(daemon=True)
        self.file = file
        self.patience = patience
        self.writes, self.ends = Event(), Event()
        self.error = None
        self.start()

    def run(self):
        deadline = None if self.patience is None else time.monotonic() + self.patience
        try:
            with self.file.line(Place(), deadline):
                self.writes.set()
                self.ends.wait(10)
        except OperationalError as error:
            self.error = error


@pytest.fixture(params=[60.0, -1.0], ids=["short", "long"])
def waited(request, monkeypatch):
    """How long everybody has waited, as it seems to them."""
    monkeypatch.setattr(sidefile, "_LONG", request.param)


@pytest.fixture
def await_waiting(file, wait_until):
    """Return a function that returns when so many wait."""
    return lambda count: wait_until(lambda: len(file._waiting) == count)


def test_who_waits_writes_next(file, await_waiting):
    with file.line(Place(), None):
        writer = Writer(file)
        await_waiting(1)
        assert not writer.writes.is_set()
    assert writer.writes.wait(10)
    writer.ends.set()


def test_who_has_waited_for_long_comes_before_who_comes_back_at_once(
    file, await_waiting, monkeypatch
):
    monkeypatch.setattr(sidefile, "_LONG", -1.0)
    with file.line(Place(), None):
        writer = Writer(file)
        writer.ends.set()
        await_waiting(1)
    # It was its turn before this thread let go of the interpreter.
    with file.line(Place(), None):
        assert writer.writes.is_set()


@pytest.mark.usefixtures("waited")
def test_each_who_waits_writes_in_the_end(file, await_waiting):
    writers = []
    with file.line(Place(), None):
        for waiting in range(1, 6):
            writers.append(Writer(file))
            await_waiting(waiting)
    for writer in writers:
        writer.ends.set()
    for writer in writers:
        assert writer.writes.wait(10)


@pytest.mark.usefixtures("waited")
def test_who_waits_in_vain_gives_up_and_leaves_the_line_as_it_was(file, await_waiting):
    with file.line(Place(), None):
        hasty = Writer(file, patience=0.01)
        hasty.join(10)
        assert "another thread writes" in str(hasty.error)
        patient = Writer(file)
        await_waiting(1)
    assert patient.writes.wait(10)
    patient.ends.set()


@pytest.mark.usefixtures("waited")
def test_the_turn_of_who_gives_up_just_then_is_the_next_ones(
    file, await_waiting, monkeypatch
):
    place, waits = Place(), Place.wait

    def wait_and_fail(self, seconds):
        waits(self, seconds)
        if self is place:
            raise KeyboardInterrupt

    monkeypatch.setattr(Place, "wait", wait_and_fail)
    failed = Event()

    def enter():
        with pytest.raises(KeyboardInterrupt), file.line(place, None):
            pass
        failed.set()

    with file.line(Place(), None):
        Thread(target=enter, daemon=True).start()
        await_waiting(1)
        patient = Writer(file)
        await_waiting(2)
    assert failed.wait(10)
    assert patient.writes.wait(10)
    patient.ends.set()


def test_a_turn_taken_away_is_its_heirs_before_who_waits(file, await_waiting):
    place = Place()
    with file.line(place, None):
        writer = Writer(file)
        await_waiting(1)
        file.inherit(place)
    assert not writer.writes.is_set()
    with file.line(Place(), None):
        assert not writer.writes.is_set()
    assert writer.writes.wait(10)
    writer.ends.set()
