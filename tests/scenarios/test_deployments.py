"""Two versions of a project's code beside each other; functions that go wrong (37, 39).

The project's code is a module in a folder of its own, so that each worker can have the
version that a test gives it.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from async_queue import callables, schedule
from async_queue.models import Job, Status
from tests import jobs, misbehaving
from tests.fleet import counted, is_drained
from tests.invariants import assert_nobody_works
from tests.models import Effect
from tests.process import ROOT
from tests.stepping import exceptions_of, make_due
from tests.workers import Running, working

pytestmark = pytest.mark.django_db(transaction=True)
WaitUntil = Callable[..., None]

GOOD = """
from tests.jobs import leave

def deliver(label):
    leave(label)
"""
# By the name of the module; None is for one that is not there.
BROKEN = {
    "no_function": "def something_else(label): ...",
    "import_error": f"import no_such_module\n{GOOD}",
    "syntax_error": f"{GOOD}\ndef deliver(label:\n",
    "raises": f"raise RuntimeError('while it was loaded')\n{GOOD}",
    "no_module": None,
}


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the version with which jobs are scheduled."""
    folder = version(tmp_path / "new", dict.fromkeys(BROKEN, GOOD))
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    callables.resolve.cache_clear()
    for name in BROKEN:
        sys.modules.pop(name, None)


def version(folder: Path, sources: Mapping[str, str | None]) -> Path:
    folder.mkdir()
    for name, source in sources.items():
        if source is not None:
            (folder / f"{name}.py").write_text(source)
    return folder


@contextmanager
def deployed(folder: Path, tmp_path: Path, *arguments: str) -> Iterator[Running]:
    """A worker with the version of the code that is in ``folder``."""
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    with working(tmp_path, *arguments, environment=environment) as running:
        yield running


def labels() -> list[str]:
    return sorted(Effect.objects.values_list("label", flat=True))


def test_jobs_whose_function_is_not_there_wait_and_run_after_the_next_deployment(
    new: Path, tmp_path: Path, wait_until: WaitUntil
) -> None:
    waiting = {name: schedule(f"{name}.deliver", [name]) for name in BROKEN}
    schedule(jobs.leave, ["other"], priority=-1)

    with deployed(version(tmp_path / "old", BROKEN), tmp_path) as running:
        wait_until(lambda: counted() == {"WAITING": len(BROKEN), "SUCCESSFUL": 1})
        code = running.end()
    for job in waiting.values():
        job.refresh_from_db()
        assert (job.status, job.failures, job.crashes) == (Status.WAITING, 0, 0)
        assert exceptions_of(job) == ["FunctionUnavailable"]
        make_due(job)
    assert code == 0, running.said

    with deployed(new, tmp_path) as running:
        wait_until(is_drained)
        code = running.end()

    assert code == 0, running.said
    assert counted() == {"SUCCESSFUL": len(BROKEN) + 1}
    assert labels() == sorted([*BROKEN, "other"])
    assert set(Job.objects.values_list("failures", flat=True)) == {0}
    assert_nobody_works()


def test_worker_with_new_code_runs_what_one_with_old_code_cannot(
    new: Path, tmp_path: Path, wait_until: WaitUntil
) -> None:
    scheduled = [schedule(f"{name}.deliver", [name]) for name in BROKEN]

    def are_done() -> bool:
        for job in scheduled:
            if Job.objects.filter(pk=job.pk, status=Status.WAITING).exists():
                make_due(job)
        return is_drained()

    with deployed(version(tmp_path / "old", BROKEN), tmp_path, "--threads=1"):
        wait_until(lambda: counted()["WAITING"] > 0)
        with deployed(new, tmp_path, "--threads=1"):
            wait_until(are_done)

    assert counted() == {"SUCCESSFUL": len(BROKEN)}
    assert labels() == sorted(BROKEN)
    assert set(Job.objects.values_list("failures", flat=True)) == {0}


def test_job_that_cannot_import_something_itself_has_failed(
    new: Path, tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule("raises.deliver", ["never"], meta={"max_attempts": 1})
    source = "def deliver(label):\n    import no_such_module\n"

    with deployed(version(tmp_path / "old", {"raises": source}), tmp_path):
        wait_until(is_drained)

    job.refresh_from_db()
    assert (job.status, job.failures) == (Status.FAILED, 1)
    assert exceptions_of(job) == ["ModuleNotFoundError"]


ENDS = {
    "SystemExit": jobs.leave_then_exit,
    "KeyboardInterrupt": misbehaving.leave_then_interrupt,
    "GeneratorExit": misbehaving.leave_then_exit_generator,
    "Unspeakable": misbehaving.raise_unspeakable,
    "RuntimeError": misbehaving.raise_with_huge_traceback,
}


def test_threads_outlive_whatever_jobs_raise(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    once = {"max_attempts": 1}
    raised = {name: schedule(function, meta=once) for name, function in ENDS.items()}

    with working(tmp_path, "--threads=2") as running:
        wait_until(is_drained)
        after = [schedule(jobs.leave, [f"after-{i}"]) for i in range(4)]
        wait_until(is_drained)
        code = running.end()

    for name, job in raised.items():
        job.refresh_from_db()
        assert job.status == Status.FAILED, name
        assert exceptions_of(job) == [name]
    assert labels() == sorted(f"after-{i}" for i in range(len(after)))
    assert "the worker itself failed" not in running.said
    assert code == 0, running.said
    assert_nobody_works()
