from datetime import timedelta
from itertools import chain

import pytest
from django.db import OperationalError, connection, transaction

from async_queue import claims, maintenance
from async_queue.db import vendor
from async_queue.models import Job, Status
from async_queue.statements import Selection
from tests.factories import JobFactory, WorkerFactory, now
from tests.stepping import elsewhere, wrapped

pytestmark = pytest.mark.django_db
remembers = pytest.mark.skipif(
    not vendor(connection).keeps_dead_entries,
    reason="each claim looks at the beginnings here",
)


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


def test_claim_of_patterns_visits_their_queues_in_the_order_of_the_patterns(worker):
    queues = ("c", "mail-1", "a", "mail-2")
    last, second, _, first = (
        JobFactory(queue=queue, rank=rank)
        for queue, rank in zip(queues, (-3, -1, -2, -2), strict=True)
    )

    wanted = ("mail-*", "c", "-a")

    assert claimed(worker, queues=wanted) == numbers([first, second, last])


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

    assert claims.release("default", worker, attempts(jobs)) == 2

    for row in rows:
        row.refresh_from_db()
        assert (row.status, row.worker_id) == (Status.READY, None)
        assert (row.attempt, row.failures) == (1, 0)


def test_release_leaves_what_is_no_longer_the_workers(worker):
    JobFactory.create_batch(3)
    mine, lost, again = jobs = claims.claim("default", worker, 3)
    Job.objects.filter(pk=lost.id).update(worker=WorkerFactory())
    Job.objects.filter(pk=again.id).update(attempt=again.attempt + 1)

    assert claims.release("default", worker, attempts(jobs)) == 1
    assert claims.release("default", worker, {}) == 0
    assert Job.objects.get(pk=mine.id).status == Status.READY


def attempts(jobs):
    return {job.id: job.attempt for job in jobs}


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
def test_claim_tries_again_when_the_database_rolled_it_back(worker):
    row = JobFactory()

    with wrapped(Interference(3, transient_error())):
        assert claimed(worker, queues=("default",)) == [row.pk]


@pytest.mark.django_db(transaction=True)
def test_claim_tells_of_an_error_that_stays(worker):
    JobFactory()

    with (
        wrapped(Interference(4, transient_error())),
        pytest.raises(OperationalError, match="deadlock"),
    ):
        claimed(worker, queues=("default",))


def test_claim_tells_at_once_of_an_error_that_does_not_pass(worker):
    JobFactory()
    once = Interference(1, OperationalError("disk full"))

    with (
        wrapped(once),
        pytest.raises(OperationalError, match="disk full"),
    ):
        claimed(worker, queues=("default",))
    assert once.left == 0


def test_claim_takes_from_as_many_queues_as_there_are(worker):
    for number in range(70):
        JobFactory(queue=f"q{number}")

    assert len(claimed(worker)) == 70


# A worker's claims, one after the other.


class Clock:
    """The time that passes between claims, and with each of their statements."""

    now = 1000.0
    statement = 0.0

    def monotonic(self):
        return self.now

    def __call__(self, execute, *statement):
        self.now += self.statement
        return execute(*statement)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(claims, "time", clock)
    with wrapped(clock):
        yield clock


@pytest.fixture
def take(worker, clock):
    """Claim so many jobs, as a worker that remembers where it stands; return ids."""
    claimer = claims.Claimer("default")

    def take(limit, **selection):
        jobs = claimer.claim(worker, limit, Selection(**selection))
        return [job.id for job in jobs]

    return take


@remembers
def test_claim_goes_on_where_a_full_one_ended(take):
    rows = JobFactory.create_batch(4)
    assert take(2) == numbers(rows[:2])
    JobFactory(rank=-1)

    assert take(2) == numbers(rows[2:])


def test_jobs_of_a_higher_priority_are_found_after_a_second(take, clock):
    rows = JobFactory.create_batch(4)
    assert take(2) == numbers(rows[:2])
    urgent = JobFactory(rank=-1)
    clock.now += 1.1

    assert take(2) == numbers([urgent, rows[2]])


@remembers
@pytest.mark.parametrize(
    ("statement", "pause", "is_found"),
    [(0.3, 2.9, False), (0.3, 3.1, True), (9.0, 9.9, False), (9.0, 10.1, True)],
)
def test_looks_that_take_long_are_made_less_often(
    statement, pause, is_found, take, clock
):
    rows = JobFactory.create_batch(2)
    clock.statement = statement
    assert take(1, queues=("default",)) == [rows[0].pk]
    clock.statement = 0.0
    urgent = JobFactory(rank=-1)
    clock.now += pause

    found = urgent if is_found else rows[1]
    assert take(1, queues=("default",)) == [found.pk]


def test_claim_that_comes_back_short_looks_at_the_beginning_at_once(take):
    rows = JobFactory.create_batch(3)
    assert take(2) == numbers(rows[:2])
    urgent = JobFactory(rank=-1)

    assert set(take(9)) == {urgent.pk, rows[2].pk}


def test_claim_after_a_short_one_begins_at_the_beginning(take):
    assert take(1) == []
    JobFactory(rank=5)
    assert take(2) != []
    last, first = (JobFactory(rank=rank) for rank in (9, 0))

    assert take(2) == numbers([first, last])


def test_idle_worker_that_was_woken_finds_the_best_job(take):
    JobFactory()
    assert len(take(1)) == 1
    assert take(1) == []
    last, first = (JobFactory(rank=rank) for rank in (1, -1))

    assert take(1) == [first.pk]
    assert take(1) == [last.pk]


def release(row, worker):
    assert claims.release("default", worker, {row.pk: 1}) == 1


def rescue(row, worker):
    Job.objects.filter(pk=row.pk).update(worker=WorkerFactory(dead=True))
    assert maintenance.rescue("default") == 1


def retry(row, worker):
    Job.objects.filter(pk=row.pk).transition("retry")
    assert maintenance.promote("default") == 1


@pytest.mark.parametrize("come_back", [release, rescue, retry])
def test_jobs_that_come_back_are_found_after_a_second(come_back, take, worker, clock):
    rows = JobFactory.create_batch(4)
    assert take(2) == numbers(rows[:2])
    come_back(rows[0], worker)
    clock.now += 1.1

    assert take(2) == numbers([rows[0], rows[2]])


@pytest.mark.parametrize("come_back", [release, rescue, retry])
def test_jobs_that_come_back_are_found_before_there_is_nothing(come_back, take, worker):
    rows = JobFactory.create_batch(3)
    assert take(2) == numbers(rows[:2])
    come_back(rows[0], worker)

    assert set(take(9)) == {rows[0].pk, rows[2].pk}


@pytest.mark.django_db(transaction=True)
def test_jobs_that_somebody_had_locked_are_found(take):
    if not connection.features.has_select_for_update_skip_locked:
        pytest.skip("nobody locks rows one by one here")
    rows = JobFactory.create_batch(3)

    with transaction.atomic():
        Job.objects.select_for_update().get(pk=rows[0].pk)
        assert elsewhere(take, 1).result(20) == [rows[1].pk]

    assert set(take(9)) == {rows[0].pk, rows[2].pk}


def test_workers_take_turns_without_missing_or_sharing_a_job():
    rows = JobFactory.create_batch(9)
    claimers = [(claims.Claimer("default"), WorkerFactory().pk) for _ in range(2)]

    taken = [
        [job.id for job in claimer.claim(worker, limit)]
        for limit in (1, 2, 3)
        for claimer, worker in claimers
    ]

    assert list(chain(*taken)) == numbers(rows)


def test_another_selection_begins_at_the_beginning(take):
    rows = JobFactory.create_batch(4)
    shards = [(rows[number].pk % 2, 2) for number in (1, 0)]

    assert take(1, shard=shards[0]) == [rows[1].pk]
    assert take(1, shard=shards[1]) == [rows[0].pk]


def test_claim_goes_on_within_its_restrictions(take):
    rows = JobFactory.create_batch(6, queue="a")
    JobFactory.create_batch(2, queue="a", function="other.function")
    selection = {"until": now(), "shard": (rows[0].pk % 2, 2), "prefix": "tests."}

    found = [take(1, queues=("a",), **selection) for _ in range(4)]

    assert found == [[rows[0].pk], [rows[2].pk], [rows[4].pk], []]


@pytest.mark.parametrize("queues", [(), ("a*", "b*")])
def test_queue_of_the_best_job_comes_first_with_each_claim(queues, take):
    columns = [("a", 0), ("a2", 1), ("a", 2), ("a2", 3), ("b", 4), ("b2", 5), ("b", 6)]
    rows = [JobFactory(queue=queue, rank=rank) for queue, rank in columns]

    found = [take(1, queues=queues) for _ in rows]

    assert list(chain(*found)) == numbers(rows)


def test_queue_that_was_empty_is_found_after_a_second(take, clock):
    JobFactory.create_batch(3, queue="a", rank=1)
    assert len(take(1)) == 1
    row = JobFactory(queue="b")
    clock.now += 1.1

    assert take(1) == [row.pk]


def test_queue_that_is_named_first_comes_first_with_each_claim(take):
    first, second, _ = JobFactory.create_batch(3, queue="b")
    queues = ("a", "b")
    assert take(1, queues=queues) == [first.pk]

    for _ in range(2):
        row = JobFactory(queue="a")
        assert take(1, queues=queues) == [row.pk]

    assert take(1, queues=queues) == [second.pk]


def test_queue_that_a_look_did_not_reach_is_looked_at_in_its_turn(take, worker, clock):
    queues = ("a", "b")
    rows = JobFactory.create_batch(3, queue="b")
    assert take(2, queues=queues) == numbers(rows[:2])
    release(rows[0], worker)
    urgent = JobFactory(queue="a")
    clock.now += 1.1

    assert take(1, queues=queues) == [urgent.pk]
    assert take(1, queues=queues) == [rows[0].pk]
