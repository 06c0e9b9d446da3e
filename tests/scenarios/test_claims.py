"""Claims from a full table: as many as wanted, each job once, by the index alone."""

from datetime import timedelta
from itertools import chain
from statistics import median
from threading import Barrier
from time import perf_counter

import pytest
from django.db import connection, transaction

from async_queue import claims, statements
from async_queue.db import vendor
from async_queue.models import Job, Status
from async_queue.statements import Selection
from async_queue.threads import ThreadPoolExecutor
from tests.factories import JobFactory, WorkerFactory, now
from tests.figures import figure
from tests.long import long
from tests.stepping import elsewhere, wrapped

pytestmark = pytest.mark.django_db(transaction=True)

ANALYZE = {
    "postgresql": "VACUUM ANALYZE async_queue_job",
    "mysql": "ANALYZE TABLE async_queue_job",
    "sqlite": "ANALYZE async_queue_job",
}
EXPLAIN = {"sqlite": "EXPLAIN QUERY PLAN"}
# What a plan says where it reads a table, or sorts it, instead of following an index.
DETOURS = (
    "Seq Scan on async_queue_job",
    "SCAN async_queue_job'",
    "'async_queue_job', 'ALL'",
)
SORTS = ("filesort", "TEMP B-TREE", "Sort Key: async_queue_job")
ONE_QUEUE = Selection(("default",))
RESTRICTED = Selection(("default",), None, (1, 2), "tests.")


def run_sql(sql, params=()):
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall() if cursor.description else []


def multiply(rows):
    """Copy the rows of the table until there are so many, within the server."""
    names = [field.column for field in Job._meta.concrete_fields[1:]]
    columns = ", ".join(map(connection.ops.quote_name, names))
    copy = f"INSERT INTO async_queue_job ({columns}) SELECT {columns}"
    while missing := rows - Job.objects.count():
        run_sql(f"{copy} FROM async_queue_job LIMIT {missing}")


def plan_of(action):
    """Return the plan of the statement that reads the READY rows in ``action``."""
    sent = []

    def note(execute, sql, params, many, context):
        sent.append((sql, params))
        return execute(sql, params, many, context)

    with transaction.atomic(), wrapped(note):
        action()
        transaction.set_rollback(True)
    sql, params = next(each for each in sent if "ORDER BY" in each[0])
    explain = EXPLAIN.get(connection.vendor, "EXPLAIN")
    return "\n".join(map(str, run_sql(f"{explain} {sql}", params)))


@pytest.fixture
def without_vacuum():
    """Let nobody but the test gather statistics."""
    if connection.vendor != "postgresql":
        yield
        return
    run_sql("ALTER TABLE async_queue_job SET (autovacuum_enabled = off)")
    yield
    run_sql("ALTER TABLE async_queue_job RESET (autovacuum_enabled)")


@pytest.fixture
def worker():
    return WorkerFactory().pk


@pytest.mark.usefixtures("without_vacuum")
# So few rows fill no second page: the planner goes on believing that there is one.
@pytest.mark.parametrize(
    ("rows", "limit"), [(16, 1), (16, 5), (10_000, 1), (10_000, 5), (10_000, 50)]
)
def test_claim_takes_exactly_its_limit_under_stale_statistics(rows, limit, worker):
    JobFactory()
    run_sql(ANALYZE[connection.vendor])
    multiply(rows)

    for _ in range(3):
        assert len(claims.claim("default", worker, limit)) == limit

    assert Job.objects.filter(status=Status.RUNNING).count() == 3 * limit


@pytest.mark.parametrize("limit", [1, 5, 50])
def test_a_second_worker_finds_its_jobs_while_the_first_ones_claim_is_open(limit):
    if not connection.features.has_select_for_update_skip_locked:
        pytest.skip("writers take turns here, so no claim meets an open one")
    JobFactory()
    multiply(1000)
    first, second = WorkerFactory.create_batch(2)

    with transaction.atomic():
        mine = claims.claim("default", first.pk, limit)
        theirs = elsewhere(claims.claim, "default", second.pk, limit).result(20)

    assert len(mine) == len(theirs) == limit
    taken = [job.id for job in mine + theirs]
    oldest = Job.objects.order_by("pk").values_list("pk", flat=True)
    assert taken == list(oldest[: 2 * limit])


def test_threads_that_race_claim_each_job_once():
    JobFactory()
    multiply(2000)
    together = Barrier(4)

    def claim_all(worker):
        together.wait(20)
        taken = []
        while jobs := claims.claim("default", worker, 7):
            taken += [job.id for job in jobs]
        return taken

    with ThreadPoolExecutor(4) as pool:
        workers = [worker.pk for worker in WorkerFactory.create_batch(4)]
        shares = list(pool.map(claim_all, workers))

    assert sorted(chain(*shares)) == sorted(Job.objects.values_list("pk", flat=True))
    for worker, share in zip(workers, shares, strict=True):
        assert Job.objects.filter(worker_id=worker, attempt=1).count() == len(share)


@pytest.fixture
def crowded(worker):
    """READY jobs of two queues beside 100,000 finished and 100 waiting ones."""
    JobFactory(successful=True)
    multiply(100_000)
    JobFactory.create_batch(100, waiting=True, run_after=now() + timedelta(days=1))
    for queue in ("default", "other"):
        JobFactory.create_batch(50, queue=queue)
    run_sql(ANALYZE[connection.vendor])
    return worker


def test_the_hot_path_follows_the_index_beside_many_finished_jobs(crowded):
    for selection in (ONE_QUEUE, RESTRICTED):
        plan = plan_of(lambda s=selection: claims.claim("default", crowded, 5, s))
        assert "async_queue_job_ready" in plan
        assert [detour for detour in DETOURS + SORTS if detour in plan] == []


def test_the_look_for_queues_follows_the_index_beside_many_finished_jobs(crowded):
    plan = plan_of(lambda: statements.heads(connection))

    assert "async_queue_job_ready" in plan
    assert [detour for detour in DETOURS if detour in plan] == []


@pytest.mark.parametrize("selection", [ONE_QUEUE, RESTRICTED], ids=["all", "some"])
def test_a_claim_goes_on_by_the_index(selection, crowded):
    if not vendor(connection).keeps_dead_entries:
        pytest.skip("each claim looks at the beginnings here")
    claimer = claims.Claimer("default")
    assert len(claimer.claim(crowded, 5, selection)) == 5

    plan = plan_of(lambda: claimer.claim(crowded, 5, selection))

    # The position is where the index is entered, and no filter behind it.
    (entry,) = [line for line in plan.splitlines() if "Index Cond" in line][:1]
    assert "ROW(rank, run_after, id) >= ROW(" in entry
    assert [detour for detour in DETOURS + SORTS if detour in plan] == []


def test_queues_are_asked_by_the_index_from_where_a_claim_ended(crowded):
    if not vendor(connection).keeps_dead_entries:
        pytest.skip("each claim looks at the beginnings here")
    known = statements.heads(connection)
    assert set(known) == {"default", "other"}

    plan = plan_of(lambda: statements.heads_from(connection, known, False))

    (entry,) = [line for line in plan.splitlines() if "Index Cond" in line]
    assert ">= ROW(" in entry
    assert [detour for detour in DETOURS if detour in plan] == []


@pytest.mark.usefixtures("without_vacuum")
@pytest.mark.parametrize("is_pinned", [False, True], ids=["free", "pinned"])
def test_claims_are_as_fast_after_many_jobs_without_vacuum(
    is_pinned, worker, second_connection
):
    """Behind a transaction that has written, nobody may forget what was READY."""
    if not vendor(connection).keeps_dead_entries:
        pytest.skip("this is about what PostgreSQL keeps until a vacuum")
    count, claimer = long(20_000, 200_000), claims.Claimer("default")
    JobFactory()
    multiply(count + 10_000)
    second_connection.set_autocommit(not is_pinned)
    with second_connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_xact_id()")

    first = median(claimed_and_finished(claimer, worker, 100, 10))
    claimed_and_finished(claimer, worker, count // 100, 100)
    last = median(claimed_and_finished(claimer, worker, 100, 10))

    second_connection.rollback()
    how = "behind an open job" if is_pinned else "without vacuum"
    figure(f"claims {how}, after {count} jobs, ratio", last / first)
    assert last <= 3 * first


def claimed_and_finished(claimer, worker, times, limit):
    """Claim and finish so many jobs so often; return the seconds of each claim."""
    seconds = []
    for _ in range(times):
        started_at = perf_counter()
        jobs = claimer.claim(worker, limit)
        seconds.append(perf_counter() - started_at)
        assert len(jobs) == limit
        Job.objects.filter(pk__in=[job.id for job in jobs]).transition("succeed")
    return seconds


@pytest.mark.parametrize("queues", [(), ("default", "other")], ids=["all", "two"])
def test_a_tick_follows_the_indexes_beside_many_finished_jobs(crowded, queues):
    plan = plan_of(lambda: statements.tick(connection, crowded, queues))

    for index in ("ready", "waiting", "running"):
        assert f"async_queue_job_{index}" in plan
    assert [detour for detour in DETOURS + SORTS if detour in plan] == []


def test_the_look_for_queues_does_not_read_every_ready_job():
    """The plans of some databases look the same and read them all, for each queue."""
    for queue in ("a", "b", "c"):
        JobFactory(queue=queue)
    multiply(60_000)
    run_sql(ANALYZE[connection.vendor])
    ready = Job.objects.filter(status=Status.READY, queue__gt="")

    looking = fastest(lambda: statements.heads(connection))
    reading = fastest(lambda: ready.count())

    assert looking < reading / 2


def fastest(action):
    def seconds():
        started_at = perf_counter()
        action()
        return perf_counter() - started_at

    return min(seconds() for _ in range(7))


def test_promotion_and_rescue_follow_their_indexes(crowded):
    due = Job.objects.filter(status=Status.WAITING).order_by("run_after", "id")
    held = Job.objects.filter(status=Status.RUNNING, worker_id=crowded)

    for rows, index in [(due[:500], "waiting"), (held.order_by("id"), "running")]:
        plan = plan_of(lambda rows=rows: list(rows.values_list("pk")))
        assert f"async_queue_job_{index}" in plan
        assert [detour for detour in DETOURS if detour in plan] == []
