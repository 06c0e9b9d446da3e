"""``memory``: what a worker's process has above a bare ``manage.py shell``."""

from functools import partial
from time import monotonic, sleep

from benchmarks.drain import drain
from benchmarks.places import Place
from benchmarks.processes import Memory, python, running
from benchmarks.report import Measured
from benchmarks.run import Run
from benchmarks.systems import SYSTEMS, System, home

_LONGEST = 20.0
_SAID = "ready"
_SHELL = f"import signal; print('{_SAID}', flush=True); signal.pause()"


def measure(run: Run) -> None:
    """Tell private memory (USS): what the end of the process would give back.

    The worker has run jobs that insert, on four threads.
    """
    subjects = {"async_queue": partial(_look, SYSTEMS["async_queue"], run)}
    run.compare("memory", "above a shell", "MiB USS", subjects)


def _look(system: System, run: Run) -> Measured:
    shell = _shell(system, run.vendor)
    worker = drain(system, run.vendor, kind="insert", jobs=max(run.jobs // 10, 100))
    above = Memory(
        *(mine - its for mine, its in zip(worker.memory, shell, strict=True))
    )
    return Measured(
        above.uss, {"RSS": above.rss, "PSS": above.pss, "shell's USS": shell.uss}
    )


def _shell(system: System, vendor: str) -> Memory:
    with home(system, vendor) as place:
        command = python("-m", "django", "shell", "--command", _SHELL)
        log = place.folder / "shell"
        with running([command], place.environment, log) as shell:
            _await_word(place)
            return shell.memory()


def _await_word(place: Place) -> None:
    until = monotonic() + _LONGEST
    while _SAID not in (place.folder / "shell").read_text() and monotonic() < until:
        sleep(0.05)
