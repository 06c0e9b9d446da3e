from datetime import timedelta
from itertools import chain

import pytest
from django.db import OperationalError, connection

from async_queue import claims
from async_queue.models import Job, Status
from async_queue.statements import Selection
from tests.factories import JobFactory, WorkerFactory, now

pytestmark = pytest.mark.django_db


@pytest.fixture
def worker():
    return WorkerFactory().pk


def claimed(worker, limit=100, **selection):
    jobs = claims.claim("default", worker, limit, Selection(**selection))
    return [job.id for job in jobs]


def numbers(rows):
    return [row.pk for row in rows]


def test_claim_takes_the_highest_priority_then_the_longest_wait_then_the_first(worker):
    moment = now()
    earlier = moment - timedelta(seconds=1)
    last, third, second, fourth, first = (
        JobFactory(rank=rank, run_after=run_after)
        for rank, run_after in [
            (1, earlier),
            (0, moment),
            (0, earlier),
            (0, moment),
            (-5, moment),
        ]
    )

    assert claimed(worker) == numbers([first, second, third, fourth, last])


def test_claim_makes_the_jobs_running_under_its_worker(worker):
    row = JobFactory(attempt=4, failures=2, args='["a"]')
    before = now()

    (job,) = claims.claim("default", worker, 1)

    row.refresh_from_db()
    assert (row.status, row.worker_id, row.attempt) == (Status.RUNNING, worker, 5)
    assert before <= row.started_at <= now()
    assert (job.id, job.worker, job.attempt, job.failures) == (row.pk, worker, 5, 2)
    assert (job.alias, job.args, job.priority) == ("default", '["a"]', 0)
    assert (job.run_after, job.enqueued_at) == (row.run_after, row.enqueued_at)
    assert before <= job.claimed_at <= now()


@pytest.mark.parametrize("limit", [1, 2, 5, 50])
def test_claim_takes_exactly_as_many_as_it_may(limit, worker):
    rows = JobFactory.create_batch(60)

    assert claimed(worker, limit) == numbers(rows[:limit])
    assert Job.objects.filter(status=Status.RUNNING).count() == limit


@pytest.mark.parametrize("state", ["waiting", "running", "successful", "cancelled"])
def test_claim_takes_ready_jobs_only(state, worker):
    JobFactory(**{state: True})

    assert claimed(worker) == []


def test_claim_visits_the_queue_of_the_best_job_first(worker):
    dull, urgent = JobFactory(queue="a"), JobFactory(queue="b", rank=-1)
    slow = JobFactory(queue="b", rank=9)

    assert claimed(worker, 2) == numbers([urgent, slow])
    assert claimed(worker, 2) == numbers([dull])


def test_claim_fills_its_limit_from_several_queues(worker):
    rows = [JobFactory(queue=queue) for queue in ("c", "a", "b")]

    assert claimed(worker, 2) == numbers(rows[:2])


def test_claim_of_named_queues_visits_them_in_their_order(worker):
    first, second, _ = (JobFactory(queue=queue) for queue in ("b", "a", "c"))

    assert claimed(worker, queues=("a", "missing", "b")) == numbers([second, first])


def test_claim_leaves_what_became_due_after_its_moment(worker):
    row = JobFactory()
    until = now()
    later = JobFactory(run_after=until + timedelta(seconds=1), enqueued_at=until)

    assert claimed(worker, until=until) == [row.pk]
    assert claimed(worker) == [later.pk]


def test_claim_leaves_what_was_scheduled_after_its_moment(worker):
    past = now() - timedelta(hours=1)
    JobFactory(run_after=past, enqueued_at=past + timedelta(minutes=1))

    assert claimed(worker, until=past + timedelta(seconds=1)) == []


def test_claims_of_all_shards_take_each_job_once(worker):
    rows = JobFactory.create_batch(10)

    shards = [claimed(worker, shard=(which, 3)) for which in range(3)]

    assert sorted(chain(*shards)) == numbers(rows)
    assert [{number % 3 for number in shard} for shard in shards] == [{0}, {1}, {2}]


def test_claim_of_a_prefix_takes_the_functions_that_begin_so(worker):
    wanted = JobFactory(function="shop.jobs_%.pay")
    JobFactory(function="shop.jobsXX.pay")

    assert claimed(worker, prefix="shop.jobs_%") == [wanted.pk]


def test_claim_combines_its_restrictions(worker):
    rows = JobFactory.create_batch(4, queue="a")
    JobFactory(queue="a", function="other.function")

    found = claimed(
        worker, queues=("a",), until=now(), shard=(rows[0].pk % 2, 2), prefix="tests."
    )

    assert found == numbers(rows[::2])


def test_release_gives_jobs_back_uncharged(worker):
    rows = JobFactory.create_batch(2)
    jobs = claims.claim("default", worker, 2)

    assert claims.release("default", worker, jobs) == 2

    for row in rows:
        row.refresh_from_db()
        assert (row.status, row.worker_id) == (Status.READY, None)
        assert (row.attempt, row.failures) == (1, 0)


def test_release_leaves_what_is_no_longer_the_workers(worker):
    JobFactory.create_batch(2)
    mine, lost = claims.claim("default", worker, 2)
    Job.objects.filter(pk=lost.id).update(worker=WorkerFactory())

    assert claims.release("default", worker, [mine, lost]) == 1
    assert claims.release("default", worker, []) == 0


class Interference:
    """Fails the first statements that claim, as the database would."""

    def __init__(self, times, error):
        self.left, self.error = times, error

    def __call__(self, execute, sql, *rest):
        if self.left and "SELECT" in sql and "queue = %s" in sql:
            self.left -= 1
            raise self.error
        return execute(sql, *rest)


def transient_error():
    """Return an error that each vendor counts among those that pass."""
    error = OperationalError(1213, "deadlock")
    error.__cause__ = Exception()
    error.__cause__.sqlstate = "40P01"
    error.__cause__.sqlite_errorcode = 5
    return error


@pytest.mark.django_db(transaction=True)
@pytest.mark.django_db(transaction=True)
def test_claim_tries_again_when_the_database_rolled_it_back(worker):
    row = JobFactory()

    with connection.execute_wrapper(Interference(3, transient_error())):
        assert claimed(worker, queues=("default",)) == [row.pk]


@pytest.mark.django_db(transaction=True)
def test_claim_tells_of_an_error_that_stays(worker):
    JobFactory()

    with (
        connection.execute_wrapper(Interference(4, transient_error())),
        pytest.raises(OperationalError, match="deadlock"),
    ):
        claimed(worker, queues=("default",))


def test_claim_tells_at_once_of_an_error_that_does_not_pass(worker):
    JobFactory()
    once = Interference(1, OperationalError("disk full"))

    with (
        connection.execute_wrapper(once),
        pytest.raises(OperationalError, match="disk full"),
    ):
        claimed(worker, queues=("default",))
    assert once.left == 0


def test_claim_takes_from_as_many_queues_as_there_are(worker):
    for number in range(70):
        JobFactory(queue=f"q{number}")

    assert len(claimed(worker)) == 70
