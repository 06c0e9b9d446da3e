from contextlib import contextmanager
from itertools import count
from threading import Event

import pytest
from django.db import connection, connections

from async_queue.db import awake, private, vendor
from async_queue.models import Worker
from async_queue.peers import GRACE, Peers, Pulses
from async_queue.statements import Other
from tests.factories import WorkerFactory, let_die, living
from tests.stepping import elsewhere

facts = vendor(connection)
has_heartbeat = pytest.mark.skipif(
    not facts.has_heartbeat, reason="a lock alone is the proof of life here"
)
INTERVAL, LIMIT = 1.0, 30.0


def test_beats_that_stand_still_are_counted_as_long_as_somebody_looks():
    pulses = Pulses(INTERVAL)

    seen = [pulses.look({7: 1}, at)[7] for at in (100.0, 101.0, 103.0)]

    assert seen == [0.0, 1.0, 3.0]


def test_beat_that_moves_begins_anew():
    pulses = Pulses(INTERVAL)
    for at in (100.0, 101.0):
        pulses.look({7: 1}, at)

    assert pulses.look({7: 2}, 102.0) == {7: 0.0}
    assert pulses.look({7: 2}, 103.0) == {7: 1.0}


def test_time_in_which_nobody_looked_accuses_nobody():
    """Whoever stood still himself cannot tell who else did."""
    pulses = Pulses(INTERVAL)
    for at in (100.0, 101.0):
        pulses.look({7: 1}, at)

    assert pulses.look({7: 1}, 161.0) == {7: 1.0}
    assert pulses.look({7: 1}, 162.0) == {7: 2.0}


def test_worker_that_was_away_is_watched_from_its_return():
    pulses = Pulses(INTERVAL)
    pulses.look({7: 1, 8: 1}, 100.0)

    assert pulses.look({8: 1}, 101.0) == {8: 1.0}
    assert pulses.look({7: 1, 8: 1}, 102.0) == {7: 0.0, 8: 2.0}


@pytest.fixture
def peers():
    """The others as a keeper sees them, on its own connection."""
    with private("default"):
        yield Peers("default", INTERVAL)
    let_die()


def as_seen(worker, **columns):
    seen = {"beat": worker.beat, "has_lock": worker.has_lock, "is_free": None}
    return Other(id=worker.pk, threads=worker.threads, **seen | columns)


def watch(peers, other, seconds, **options):
    """Look once a second; tell whether anybody was buried at last."""
    options = {"trusts_locks": True} | options
    return [peers.look([other], at, **options) for at in range(seconds + 1)][-1]


def is_dead(worker):
    return Worker.objects.get(pk=worker.pk).dead_at is not None


@pytest.mark.django_db(transaction=True)
def test_worker_without_its_lock_is_dead(peers, caplog):
    worker = WorkerFactory(has_lock=True)

    assert peers.look([as_seen(worker)], 0.0, trusts_locks=True)

    assert is_dead(worker)
    assert f"worker {worker.pk} has died; its jobs run again" in caplog.text


@contextmanager
def held(worker):
    """Let another session hold the lock of the worker's life."""
    begun, over = Event(), Event()

    def hold():
        with private("default") as own:
            facts.take_life(own, worker.pk)
            begun.set()
            assert over.wait(20)

    future = elsewhere(hold)
    assert begun.wait(20)
    try:
        yield
    finally:
        over.set()
        future.exception(20)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("is_free", [False, None])
def test_worker_that_has_its_lock_lives(peers, is_free):
    worker = living(has_lock=True)

    with held(worker):
        assert not peers.look(
            [as_seen(worker, is_free=is_free)], 0.0, trusts_locks=True
        )

    assert not is_dead(worker)


@pytest.mark.django_db(transaction=True)
def test_locks_prove_nothing_where_they_are_not_trusted(peers):
    worker = WorkerFactory(has_lock=True)

    assert not peers.look([as_seen(worker)], 0.0, trusts_locks=False)

    assert not is_dead(worker)


@has_heartbeat
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("seconds", [1, LIMIT - 1, LIMIT])
def test_worker_whose_heart_stands_still_is_dead_after_the_limit(peers, seconds):
    worker = WorkerFactory(has_lock=False)

    assert watch(peers, as_seen(worker), int(seconds)) == (seconds >= LIMIT)

    assert is_dead(worker) == (seconds >= LIMIT)


@has_heartbeat
@pytest.mark.django_db(transaction=True)
def test_worker_whose_heart_has_moved_since_is_spared(peers):
    worker = WorkerFactory(has_lock=False, beat=5)

    assert not watch(peers, as_seen(worker, beat=4), int(LIMIT))

    assert not is_dead(worker)


@has_heartbeat
@pytest.mark.django_db(transaction=True)
def test_session_of_a_worker_that_stands_still_is_ended_with_its_lock(
    peers, wait_until
):
    worker = WorkerFactory(has_lock=True)

    with held(worker):
        other = as_seen(worker, is_free=False)
        assert not watch(peers, other, int(LIMIT) - 1)
        # A server may take a while to end a session.
        later = count(int(LIMIT))
        wait_until(lambda: peers.look([other], next(later), trusts_locks=True))
        assert facts.is_life_free(connections["default"], worker.pk)

    assert is_dead(worker)


@pytest.mark.skipif(not facts.has_heartbeat, reason="a file has no sessions to see")
@pytest.mark.django_db(transaction=True)
def test_worker_whose_jobs_have_sessions_has_time_to_come_back(peers):
    worker = WorkerFactory(has_lock=True)
    begun, over = Event(), Event()

    def work():
        with awake("default", worker.pk, 1) as mine:
            mine.ensure_connection()
            begun.set()
            assert over.wait(20)

    future = elsewhere(work)
    assert begun.wait(20)
    try:
        assert not peers.look([as_seen(worker)], 0.0, trusts_locks=True)
        back = as_seen(worker, beat=7)
        assert not peers.look([back], GRACE, trusts_locks=True)
        assert not is_dead(worker)
        assert peers.look([back], 2 * GRACE, trusts_locks=True)
    finally:
        over.set()
        future.exception(20)

    assert is_dead(worker)
