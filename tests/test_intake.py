from threading import Event

import pytest
from django.db import OperationalError, connections

from async_queue.db import private
from async_queue.intake import Intake
from async_queue.models import Job, Status, Worker
from async_queue.places import Place, seated
from async_queue.statements import Selection
from tests.factories import JobFactory

LONG = 1.0  # seconds that a job took


def made(place=None, threads=4, **options):
    options = {"left": None, "runs_one_at_a_time": False, "wants_word": False} | options
    return Intake(
        place or Place("default", threads=threads), Selection(), threads, **options
    )


@pytest.fixture
def place():
    with private("default"):
        taken = Place("default", threads=4)
        with seated(taken):
            yield taken


@pytest.mark.parametrize(
    ("in_flight", "seconds", "expected"),
    [
        (0, LONG, 4),
        (3, LONG, 1),
        (4, LONG, 0),
        (0, 0.01, 20),
        (0, 0.0, 128),
        (3, 0.0, 125),
        (4, 0.0, 124),
        (64, 0.0, 64),
        # No thread idles, and few at once cost as much as many.
        (65, 0.0, 0),
        (128, 0.0, 0),
    ],
)
def test_room_is_for_idle_threads_and_for_more_while_jobs_are_short(
    in_flight, seconds, expected
):
    intake = made()
    intake.note_run(seconds)

    assert intake.room(in_flight) == expected


def test_room_is_for_idle_threads_as_long_as_no_job_has_run():
    assert made().room(0) == 4


@pytest.mark.parametrize(
    ("in_flight", "seconds", "expected"),
    [
        (0, LONG, 2),
        (1, LONG, 1),
        (2, LONG, 0),
        (0, 0.01, 5),
        (0, 0.0, 32),
        (16, 0.0, 16),
        (17, 0.0, 0),
    ],
)
def test_room_where_one_runs_at_a_time_is_for_it_and_the_next_ones(
    in_flight, seconds, expected
):
    intake = made(runs_one_at_a_time=True)
    intake.note_run(seconds)

    assert intake.room(in_flight) == expected


def test_room_is_no_more_than_what_is_left():
    intake = made(left=3)

    assert (intake.room(0), intake.room(2)) == (3, 2)


def test_latest_runs_tell_whether_jobs_are_short():
    intake = made()
    intake.note_run(LONG)
    for _ in range(100):
        intake.note_run(0.0)

    assert intake.room(0) == 128


@pytest.mark.django_db(transaction=True)
def test_claim_counts_down_what_is_left(place):
    JobFactory.create_batch(3)
    intake = made(place, left=5)

    jobs = intake.claim(connections["default"], 2)

    assert [job.worker for job in jobs] == [place.number] * 2
    assert intake.left == 3
    assert not intake.is_dry


@pytest.mark.django_db(transaction=True)
def test_claim_that_comes_back_short_leaves_it_dry(place):
    JobFactory()
    intake = made(place)

    assert len(intake.claim(connections["default"], 2)) == 1

    assert intake.is_dry


@pytest.mark.django_db(transaction=True)
def test_worker_looks_again_once_it_has_said_that_it_wants_word(place):
    intake = made(place, wants_word=True)

    intake.claim(connections["default"], 2)
    assert wants_word(place)
    assert not intake.is_dry

    intake.claim(connections["default"], 2)
    assert intake.is_dry


@pytest.mark.django_db(transaction=True)
def test_worker_wants_no_word_while_it_is_busy(place, monkeypatch):
    intake = made(place, wants_word=True)
    intake.claim(connections["default"], 2)
    JobFactory.create_batch(2)

    intake.claim(connections["default"], 1)
    assert wants_word(place)
    monkeypatch.setattr("async_queue.intake._BUSY", 0.0)
    intake.claim(connections["default"], 1)

    assert not wants_word(place)


@pytest.mark.django_db(transaction=True)
def test_worker_looks_once_more_after_it_has_said_that_it_wants_word(place):
    """Who was about to commit then may have asked just before."""
    intake = made(place, wants_word=True)

    for _ in range(2):
        assert intake.claim(connections["default"], 2) == []

    assert intake.is_dry
    assert intake.patience(1.0) <= 0.1
    intake.wake()  # by word, which must not be in place of that
    assert intake.patience(1.0) <= 0.1


@pytest.mark.django_db(transaction=True)
def test_claimed_jobs_are_run_though_the_worker_cannot_say_what_it_wants(
    place, monkeypatch
):
    def fail(*args):
        raise OperationalError("somebody holds its row")

    monkeypatch.setattr("async_queue.statements.want_wakeup", fail)
    intake = made(place, wants_word=True)
    JobFactory()

    assert len(intake.claim(connections["default"], 2)) == 1
    assert not intake.is_dry
    with pytest.raises(OperationalError):
        intake.claim(connections["default"], 2)
    monkeypatch.undo()
    intake.claim(connections["default"], 2)
    assert wants_word(place)


def trickle(intake, times):
    """Let single jobs come, one after the other, and be claimed."""
    for _ in range(times):
        JobFactory()
        intake.wake()
        assert len(intake.claim(connections["default"], 2)) == 1


@pytest.mark.django_db(transaction=True)
def test_worker_to_which_word_comes_too_often_looks_by_itself(place, monkeypatch):
    """Each word makes a commit of whoever schedules wait for others."""
    monkeypatch.setattr("async_queue.intake._BRISK_SECONDS", 1e6)
    intake = made(place, wants_word=True)
    trickle(intake, 15)
    assert wants_word(place)

    trickle(intake, 1)

    assert not wants_word(place)
    assert intake.is_dry
    assert intake.patience(1.0) < 0.1
    Event().wait(intake.patience(1.0))
    assert intake.is_rested()


@pytest.mark.django_db(transaction=True)
def test_worker_wants_word_again_once_a_nap_brings_nothing(place, monkeypatch):
    monkeypatch.setattr("async_queue.intake._BRISK_SECONDS", 1e6)
    intake = made(place, wants_word=True)
    trickle(intake, 16)
    assert not wants_word(place)
    monkeypatch.setattr("async_queue.intake._BRISK_SECONDS", 0.0)

    trickle(intake, 1)
    assert not wants_word(place)
    intake.wake()
    intake.claim(connections["default"], 2)

    assert wants_word(place)
    # It looks once more: nobody has told of what came meanwhile.
    assert not intake.is_dry
    intake.claim(connections["default"], 2)
    assert intake.is_dry


def wants_word(place):
    return Worker.objects.get(pk=place.number).wants_wakeup


@pytest.mark.django_db(transaction=True)
def test_suspects_are_taken_one_by_one_and_by_nobody_else(place):
    JobFactory.create_batch(2, suspect=True)
    intake = made(place, left=3)

    assert intake.claim(connections["default"], 2) == []
    assert len(intake.claim_suspect()) == 1
    assert intake.may_have_suspects
    assert intake.left == 2
    assert len(intake.claim_suspect()) == 1
    assert intake.claim_suspect() == []
    assert not intake.may_have_suspects


@pytest.mark.django_db(transaction=True)
def test_queue_of_which_word_comes_to_an_idle_worker_is_claimed_at_once(place):
    intake = made(place)
    assert intake.claim(connections["default"], 4) == []
    first, second = JobFactory(queue="default"), JobFactory(queue="mail")

    intake.hear("mail")

    assert [job.id for job in intake.claim(connections["default"], 4)] == [second.pk]
    assert [job.id for job in intake.claim(connections["default"], 4)] == [first.pk]


@pytest.mark.django_db(transaction=True)
def test_word_that_comes_to_a_busy_worker_changes_no_order(place):
    first, second = JobFactory(queue="default"), JobFactory(queue="mail")
    intake = made(place)

    intake.hear("mail")

    jobs = intake.claim(connections["default"], 4)
    assert [job.id for job in jobs] == [first.pk, second.pk]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("queues", [(), ("default", "mail")], ids=["all", "named"])
def test_word_of_several_queues_changes_no_order(place, queues):
    intake = made(place)
    intake.selection = Selection(queues=queues)
    assert intake.claim(connections["default"], 4) == []
    first, second = JobFactory(queue="default"), JobFactory(queue="mail")

    for queue in ("mail", "default") if not queues else ("mail",):
        intake.hear(queue)

    jobs = intake.claim(connections["default"], 4)
    assert [job.id for job in jobs] == [first.pk, second.pk]


@pytest.mark.django_db(transaction=True)
def test_word_of_a_queue_that_is_empty_by_now_hides_no_other(place):
    intake = made(place)
    assert intake.claim(connections["default"], 4) == []
    job = JobFactory(queue="default")

    intake.hear("mail")

    assert [one.id for one in intake.claim(connections["default"], 4)] == [job.pk]


@pytest.mark.django_db(transaction=True)
def test_selection_bounds_what_is_taken(place):
    mine = JobFactory(queue="mail")
    JobFactory()
    intake = made(place)
    intake.selection = Selection(queues=("mail",))

    (job,) = intake.claim(connections["default"], 4)

    assert job.id == mine.pk
    assert Job.objects.filter(status=Status.READY).count() == 1
