"""What is in flight is told of once, and only what matters wakes the dispatcher."""

from dataclasses import replace
from threading import Thread

import pytest

from async_queue.flight import Flight
from async_queue.outcomes import Finished, Outcome
from tests.test_crew import claimed

DONE = Outcome("succeed")


@pytest.fixture
def flight():
    """Four jobs, of which two are few."""
    made = Flight(few=2)
    for number in range(4):
        made.add(claimed(number))
    return made


def end(flight, number, **options):
    job = flight.jobs()[number, 1]
    flight.end(job, Finished(job, DONE, 0.0), **options)
    return job


def test_job_is_in_flight_until_the_dispatcher_has_seen_its_end(flight):
    job = end(flight, 1, is_urgent=False)

    assert job.fencing_token in flight.jobs()
    assert [(told, finished.outcome) for told, finished in flight.ended()] == [
        (job, DONE)
    ]
    assert list(flight.jobs()) == [(0, 1), (2, 1), (3, 1)]
    assert list(flight.ended()) == []


def test_job_that_was_given_up_before_ends_once(flight):
    job = end(flight, 1)
    flight.end(job, None)

    assert len(list(flight.ended())) == 1


def test_job_that_was_claimed_again_meanwhile_stays(flight):
    former = end(flight, 1)
    again = replace(claimed(1), attempt=2)
    flight.add(again)

    assert [job for job, _ in flight.ended()] == [former]
    assert flight.jobs()[1, 2] is again
    flight.remove(former)
    assert flight.jobs()[1, 2] is again


@pytest.mark.parametrize(
    ("ended", "is_urgent", "woken"),
    [(1, False, False), (2, False, True), (1, True, True)],
)
def test_an_end_wakes_where_few_are_left_or_it_is_urgent(
    flight, ended, is_urgent, woken
):
    waits = Thread(target=flight.wait, args=[20], daemon=True)
    waits.start()

    for number in range(ended):
        end(flight, number, is_urgent=is_urgent)

    waits.join(20 if woken else 0.2)
    assert waits.is_alive() is not woken
    flight.look()
    waits.join(20)


def test_word_of_a_claim_is_not_lost_among_others(flight):
    end(flight, 0)
    flight.look()
    end(flight, 1)

    assert flight.wait(20)
    assert not flight.wait(0)
