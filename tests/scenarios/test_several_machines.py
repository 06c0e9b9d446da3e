"""Workers on several machines, some of which are cut off. Faults 20 and 21."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from async_queue import schedule
from async_queue.models import Attempt, Job, Status, Worker
from tests import fleet, hosts, servers
from tests.figures import figure
from tests.fleet import Stopwatch, employed, employed_at
from tests.hosts import Host
from tests.invariants import assert_kept, assert_nobody_works
from tests.jobs import await_file, take_time
from tests.long import bound, long
from tests.proxy import DIRECTIONS, proxy
from tests.servers import Server
from tests.workers import Running, registered

pytestmark = pytest.mark.django_db(transaction=True)
SETTINGS = connection.settings_dict
WAYS = ("cut", "cut_outgoing", "cut_incoming")
THREADS = 2
STALL_AFTER = long(6, 30)  # seconds
SHORTLY = 2  # seconds
DELAY = long(200, 1000)  # milliseconds, each way
# Seconds after which PostgreSQL, as workers set it, misses a host at the latest.
KEPT_ALIVE = 15
PATIENCE = 60  # seconds
WaitUntil = Callable[..., None]
Settings = dict[str, Any]


@pytest.fixture(scope="module")
def network() -> Iterator[list[Host]]:
    if reason := servers.obstacle() or hosts.obstacle():
        pytest.skip(reason)
    with hosts.hosts(len(WAYS) + 1) as made:
        yield made


@pytest.fixture(scope="module")
def listening(network: list[Host], django_db_setup: None) -> Iterator[Server]:
    """A server on this machine, which the hosts reach."""
    with servers.server(listen=(servers.LOCALHOST, network[0].gateway)) as made:
        yield made


@pytest.fixture(scope="module")
def tables(listening: Server) -> Settings:
    return servers.migrated(listening)


@pytest.fixture
def remote(tables: Settings, network: list[Host]) -> Iterator[Settings]:
    """The settings of its database for the hosts; the test works on it, too."""
    with fleet.at_database(tables):
        yield tables | {"HOST": network[0].gateway}


@pytest.fixture
def machines(
    network: list[Host], remote: Settings, tmp_path: Path, wait_until: WaitUntil
) -> Iterator[dict[Host, Running]]:
    """A worker on each host."""
    threads = f"--threads={THREADS}"
    with ExitStack() as stack:
        made = {
            host: stack.enter_context(
                employed_at(host, tmp_path, threads, on=remote, STALL_AFTER=STALL_AFTER)
            )
            for host in network
        }
        wait_until(lambda: registered(*made.values()), PATIENCE)
        yield made
        for host in network:
            host.mend()


def count_begun(may_end: Path) -> int:
    """Count the jobs that have begun; of a claim its worker may not know."""
    return len(list(may_end.parent.glob(f"{may_end.name}-*")))


def held_by(number: int) -> int:
    return Job.objects.filter(status=Status.RUNNING, worker_id=number).count()


def seconds_until_free(numbers: list[int], wait_until: WaitUntil) -> list[float]:
    """Return how long it takes until each of these workers holds no job any more."""
    watch, seconds = Stopwatch(), dict.fromkeys(numbers, 0.0)

    def note() -> bool:
        for number in numbers:
            if not seconds[number] and not held_by(number):
                seconds[number] = watch.seconds()
        return all(seconds.values())

    wait_until(note, PATIENCE)
    return list(seconds.values())


def test_jobs_of_machines_that_are_cut_off_run_elsewhere_and_never_twice(
    machines: dict[Host, Running], tmp_path: Path, wait_until: WaitUntil
) -> None:
    *cut_off, survivor = machines.values()
    numbers = [worker.number for worker in cut_off]
    may_end = tmp_path / "may_end"
    count = THREADS * len(machines)
    jobs = [schedule(await_file, [f"job-{i}", str(may_end)]) for i in range(count)]
    wait_until(lambda: count_begun(may_end) == count)
    lost = set(Job.objects.exclude(worker_id=survivor.number).values_list("pk"))

    for host, way in zip(machines, WAYS, strict=False):
        getattr(host, way)()
    seconds = seconds_until_free(numbers, wait_until)
    may_end.touch()
    wait_until(fleet.is_drained, PATIENCE)
    assert survivor.number not in numbers
    done_at = dict(Job.objects.values_list("pk", "finished_at"))

    for host in machines:
        host.mend()
    wait_until(lambda: not {worker.number for worker in cut_off} & set(numbers), 60)
    later = [schedule(take_time, [f"later-{i}", 0.0]) for i in range(20)]
    wait_until(fleet.is_drained)
    assert [worker.end() for worker in machines.values()] == [0] * len(machines)

    for worker in cut_off:
        assert worker.said.count("lost its claim") == THREADS
    assert set(Attempt.objects.values_list("job_id")) == lost
    assert done_at.items() <= dict(Job.objects.values_list("pk", "finished_at")).items()
    assert fleet.counted() == {"SUCCESSFUL": len(jobs) + len(later)}
    assert_kept()
    for way, passed in zip(WAYS, seconds, strict=True):
        assert passed < bound(most_seconds())
        name = f"a machine's {way.replace('_', ' ')}, STALL_AFTER {STALL_AFTER} s"
        figure(f"{name}, {fleet.server_version()}: rescued after", passed, "s")


def most_seconds() -> float:
    """Return by when a machine is missed: by its server, or by the other workers."""
    by_others = STALL_AFTER + 2.5
    is_missed = connection.vendor == "postgresql"
    return min(KEPT_ALIVE, by_others) if is_missed else by_others


def test_short_partitions_cost_no_worker_its_jobs(
    machines: dict[Host, Running], tmp_path: Path, wait_until: WaitUntil
) -> None:
    numbers = [worker.number for worker in machines.values()]
    may_end = tmp_path / "may_end"
    count = THREADS * len(machines)
    for i in range(count):
        schedule(await_file, [f"job-{i}", str(may_end)])
    wait_until(lambda: count_begun(may_end) == count)

    for host, way in zip(machines, WAYS, strict=False):
        getattr(host, way)()
    fleet.let_pass(SHORTLY)
    may_end.touch()
    for host in machines:
        host.mend()
    wait_until(fleet.is_drained, PATIENCE)

    assert set(Job.objects.values_list("status", "attempt")) == {("SUCCESSFUL", 1)}
    assert [worker.number for worker in machines.values()] == numbers
    assert not Attempt.objects.exists()
    assert_kept()
    figure(f"partitions of {SHORTLY} s: jobs taken from the living", 0)


@pytest.mark.skipif(not SETTINGS.get("HOST"), reason="there is no way to a file")
def test_slow_way_to_the_database_lets_nobody_seem_dead(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    with proxy(SETTINGS["HOST"], int(SETTINGS["PORT"])) as wire:
        far = {**SETTINGS, "HOST": servers.LOCALHOST, "PORT": str(wire.port)}
        del far["TEST"]
        with employed(tmp_path) as near, employed(tmp_path, on=far) as off:
            wait_until(lambda: registered(near, off))
            numbers = [near.number, off.number]
            for direction in DIRECTIONS:
                wire.delay[direction] = DELAY / 1000
            fleet.schedule_work(40, 0.1)
            wait_until(fleet.is_drained, PATIENCE)
            fleet.let_pass(long(1, 35))

            assert [near.number, off.number] == numbers
            assert not Worker.objects.exclude(dead_at=None).exists()
            assert not Attempt.objects.exists()
            wire.delay.update(dict.fromkeys(DIRECTIONS, 0.0))
            assert [near.end(), off.end()] == [0, 0]

    assert_kept()
    assert_nobody_works()
    figure(f"{2 * DELAY} ms to the database and back: false deaths", 0)
