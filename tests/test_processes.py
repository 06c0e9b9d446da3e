import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from async_queue import processes

HERE = "tests.test_processes"


@pytest.fixture
def start(tmp_path):
    """Start a child that calls a function of this file with a path and more."""
    started = []

    def start(entry, *args):
        started.append(
            processes.start(f"{HERE}:{entry}", str(tmp_path / "said"), *args)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.stdin.close()
        process.wait(20)


@pytest.fixture
def said(tmp_path):
    """Return what the child has written."""
    path = tmp_path / "said"
    return lambda: path.read_text().splitlines() if path.exists() else []


def say(path, text):
    with open(path, "a") as file:
        file.write(f"{text}\n")


def tell_surroundings(path, *args):
    found = {
        "path": sys.path,
        "flags": tuple(sys.flags),
        "warnings": sys.warnoptions,
        "settings": settings.SECRET_KEY,
        "args": args,
        "group": os.getpgrp(),
        "read": sys.stdin.read(),
    }
    say(path, json.dumps(found))


def repeat(path):
    processes.when_told(lambda word: say(path, f"heard {word or 'nothing more'}"))
    say(path, "listening")
    Event().wait(60)


def end_when_orphaned(path):
    orphaned = Event()
    processes.when_orphaned(orphaned.set)
    say(path, "listening")
    assert orphaned.wait(60)
    say(path, "orphaned")


def be_parent(path, forks=""):
    """Start a child and, perhaps, fork another that outlives this process."""
    Path(path).touch()
    with processes.start(f"{HERE}:end_when_orphaned", path):
        if forks and os.fork() == 0:
            while "orphaned" not in Path(path).read_text():
                Event().wait(0.01)
            os._exit(0)
        Event().wait(60)


def fail(path):
    raise ValueError("as intended")


def test_child_has_the_same_path_flags_and_settings(start, said, monkeypatch):
    monkeypatch.syspath_prepend("/somewhere/else")

    process = start("tell_surroundings", "one", "two words")

    assert process.wait(20) == 0
    found = json.loads(said()[0])
    assert found["path"] == sys.path
    assert found["flags"] == list(sys.flags)
    assert found["settings"] == settings.SECRET_KEY
    assert found["args"] == ["one", "two words"]


def test_flags_make_an_interpreter_with_the_same_flags():
    show = (
        "import sys; from async_queue.processes import interpreter_flags as again; "
        "print(tuple(sys.flags), sys.warnoptions, sys._xoptions); print(*again())"
    )
    given = ["-O", "-B", "-Werror", "-Xutf8=1", "-Xdev"]

    first = subprocess.check_output([sys.executable, *given, "-c", show], text=True)
    flags = first.splitlines()[1].split()
    second = subprocess.check_output([sys.executable, *flags, "-c", show], text=True)

    assert flags[:2] == ["-B", "-O"]
    assert second == first


def test_child_is_not_reached_by_the_terminal(start, said):
    process = start("tell_surroundings")

    process.wait(20)

    found = json.loads(said()[0])
    assert found["group"] == process.pid  # Ctrl-C goes to the group in front
    assert found["read"] == ""


def test_child_hears_each_word_and_the_end(start, said, wait_until):
    process = start("repeat")
    processes.tell(process, "stop")  # perhaps before it listens
    wait_until(lambda: "listening" in said())
    processes.tell(process, "now")
    process.stdin.close()

    wait_until(lambda: len(said()) == 4)

    words = [line for line in said() if line != "listening"]
    assert words == ["heard stop", "heard now", "heard nothing more"]


def test_nobody_hears_a_word_to_the_dead(start):
    process = start("fail")
    process.wait(20)

    processes.tell(process, "stop")
    process.stdin.close()
    processes.tell(process, "stop")

    assert process.returncode == 1


@pytest.mark.parametrize("forks", ["", "forks"])
def test_child_learns_that_its_parent_was_killed(start, said, wait_until, forks):
    """Also where a child that the parent forked lives on, which has the same files."""
    parent = start("be_parent", forks)
    wait_until(lambda: "listening" in said())

    parent.send_signal(signal.SIGKILL)

    wait_until(lambda: "orphaned" in said())


def test_process_that_nobody_started_has_no_parent():
    with pytest.raises(RuntimeError, match="has a parent"):
        processes.when_orphaned(print)


def test_settings_without_a_module_are_refused(monkeypatch):
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE")

    with pytest.raises(ImproperlyConfigured, match="set DJANGO_SETTINGS_MODULE"):
        processes.start(f"{HERE}:fail")


def test_memory_is_that_of_the_process():
    before = processes.memory()

    ballast = b"x" * (64 * 2**20)

    assert 48 * 2**20 < processes.memory() - before < 128 * 2**20
    assert len(ballast)
