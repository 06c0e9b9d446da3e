"""``clients``: how fast many clients schedule at once, with and without NOTIFY."""

import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Barrier
from time import monotonic, sleep

from benchmarks.places import Place
from benchmarks.processes import python, running
from benchmarks.report import Measured
from benchmarks.run import Run
from benchmarks.systems import SYSTEMS, fill, home

_CLIENTS = 16
_ELSEWHERE = "elsewhere"
# Settings of async_queue for each subject.
_SUBJECTS: Mapping[str, Mapping[str, bool]] = {
    "async_queue": {},
    "without NOTIFY": {"NOTIFY": False},
}
_SETTLING = 5.0  # seconds until a worker has started, and is busy or idles
_NAPS = 400  # a second, by four threads


def measure(run: Run) -> None:
    """Measure, where there is such a thing as NOTIFY.

    Workers are busy with jobs that take 10 ms; or they idle until the first job comes;
    or they serve another queue, so that they idle all the time. The quick way, only the
    first of these.
    """
    if run.vendor != "postgres":
        return
    cases = ("workers busy", "workers idle", "workers idle elsewhere")
    for case in cases[: 1 if run.is_quick else None]:
        subjects = {
            name: partial(_look, case, dict(settings), run.jobs)
            for name, settings in _SUBJECTS.items()
        }
        run.compare("clients", case, "jobs/s", subjects)


def _look(case: str, settings: dict[str, bool], jobs: int) -> Measured:
    with home(SYSTEMS["async_queue"], "postgres") as bare:
        wanted = {**bare.wanted, "ASYNC_QUEUE": settings}
        place = replace(bare, wanted=wanted)
        # Enough that they last for as long as the clients take.
        backlog = jobs + 10 * _NAPS if case == "workers busy" else 1
        place.call(fill, "async_queue", "nap", backlog)
        queue = _ELSEWHERE if case.endswith(_ELSEWHERE) else "default"
        with _worker(place, queue):
            sleep(_SETTLING)
            return Measured(place.call(schedule_at_once, jobs))


@contextmanager
def _worker(place: Place, queue: str) -> Iterator[None]:
    command = python("-m", "django", "run_workers", "--threads=4", f"--queues={queue}")
    with running([command], place.environment, place.folder / "log"):
        yield


def schedule_at_once(jobs: int) -> float:
    """Return how many jobs a second all clients schedule, each of them committed."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(_CLIENTS + 1)
    share = jobs // _CLIENTS
    clients = [
        context.Process(target=_client, args=(barrier, share)) for _ in range(_CLIENTS)
    ]
    for client in clients:
        client.start()
    barrier.wait()
    began_at = monotonic()
    barrier.wait()
    seconds = monotonic() - began_at
    for client in clients:
        client.join()
    return share * _CLIENTS / seconds


def _client(barrier: Barrier, jobs: int) -> None:
    from async_queue import schedule

    schedule("benchmarks.work.noop", [0])  # so that it is connected
    barrier.wait()
    for number in range(jobs):
        schedule("benchmarks.work.noop", [number])
    barrier.wait()
