"""Moments are exact whatever zones are set; a job's connection lives, and lasts."""

from datetime import UTC, datetime, timedelta, timezone
from threading import Event
from types import SimpleNamespace

import pytest
from django.db import connection, connections

from async_queue import executor, schedule, statements
from async_queue.db import Now, awake, keep_connection, sessions, vendor
from async_queue.models import Job, Status
from async_queue.threads import ThreadPoolExecutor
from tests import jobs, misbehaving
from tests.factories import JobFactory
from tests.models import Effect
from tests.stepping import claim_next, exceptions_of

pytestmark = pytest.mark.django_db

MOMENT = datetime(2030, 3, 31, 1, 30, 0, 123456, UTC)
KOLKATA = timezone(timedelta(hours=5, minutes=30))
CLOCKS_APART = timedelta(seconds=5)

has_sessions = pytest.mark.skipif(
    vendor(connection).runs_one_job_at_a_time, reason="a file has no sessions to end"
)


@pytest.fixture(params=["zone aware", "naive", "database zone", "session zone"])
def zones(request, settings):
    """The ways in which a project may tell Django and its sessions of a time zone."""
    if request.param == "naive":
        settings.USE_TZ, settings.TIME_ZONE = False, "Asia/Kolkata"
    elif request.param == "database zone":
        if connection.vendor == "postgresql":
            pytest.skip("sessions have zones here, columns do not")
        connection.settings_dict["TIME_ZONE"] = "Asia/Kolkata"
    elif request.param == "session zone":
        if connection.vendor != "mysql":
            pytest.skip("Django sets the zone of the session, or there is none")
        set_session_zone("+05:30")
    forget_zones()
    yield
    connection.settings_dict["TIME_ZONE"] = None
    forget_zones()
    if request.param == "session zone":
        set_session_zone("SYSTEM")


def set_session_zone(name):
    with connection.cursor() as cursor:
        cursor.execute("SET time_zone = %s", [name])


def forget_zones():
    """Django keeps what it has read from the settings."""
    for name in ("timezone", "timezone_name"):
        connection.__dict__.pop(name, None)


@pytest.mark.usefixtures("zones")
def test_a_moment_is_stored_and_read_exactly():
    row = schedule(jobs.leave, run_after=MOMENT.astimezone(KOLKATA))

    stored = Job.objects.get(pk=row.pk).run_after

    assert row.run_after == stored == MOMENT
    assert stored.utcoffset() == timedelta(0)
    assert Job.objects.filter(run_after=MOMENT).exists()
    assert not Job.objects.filter(run_after__lt=MOMENT).exists()


@pytest.mark.usefixtures("zones")
def test_the_databases_time_is_the_time():
    """Django's own Now is in the session's time zone on MySQL."""
    row = JobFactory()
    Job.objects.update(run_after=Now(), enqueued_at=Now(after=timedelta(hours=1)))

    row.refresh_from_db()

    assert abs(statements.now(connection) - host_now_in_utc()) < CLOCKS_APART
    assert abs(row.run_after - host_now_in_utc()) < CLOCKS_APART
    assert abs(row.enqueued_at - row.run_after - timedelta(hours=1)) < CLOCKS_APART


def host_now_in_utc():
    return datetime.now(UTC)


@pytest.mark.usefixtures("zones")
def test_a_job_due_in_an_hour_waits_and_one_due_an_hour_ago_is_ready():
    hour = timedelta(hours=1)
    later = schedule(jobs.leave, run_after=datetime.now(UTC) + hour)
    earlier = schedule(jobs.leave, run_after=datetime.now(UTC) - hour)

    assert [*Job.objects.due()] == [earlier]
    assert later.status == Status.WAITING


@pytest.mark.parametrize("after", [timedelta.max, timedelta.min])
def test_now_goes_no_further_than_databases_count(after):
    row = JobFactory()

    Job.objects.update(run_after=Now(after=after))

    row.refresh_from_db()
    assert abs(row.run_after - host_now_in_utc()) < timedelta(days=36_501)


def test_now_is_the_start_of_the_statement():
    row = JobFactory()
    before = statements.now(connection)

    Job.objects.update(run_after=Now())

    row.refresh_from_db()
    assert row.run_after >= before


def test_a_vendor_is_known_by_its_connection():
    assert vendor(connection) is vendor(connection.copy())


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that goes on when the test says so."""
    hands = SimpleNamespace(seconds=1000.0)
    made = SimpleNamespace(monotonic=lambda: hands.seconds, sleep=Event().wait)
    monkeypatch.setattr(sessions, "time", made)
    return hands


def driver():
    connections["default"].ensure_connection()
    return connections["default"].connection


@has_sessions
@pytest.mark.django_db(transaction=True)
def test_a_connection_that_died_while_it_idled_is_replaced_before_the_job(clock):
    row = schedule(jobs.leave)
    running = claim_next()
    with awake("default"):
        misbehaving.end_own_session()
    clock.seconds += 2

    outcome = executor.execute(running)

    row.refresh_from_db()
    assert outcome.action == "succeed"
    assert (row.status, row.failures) == (Status.SUCCESSFUL, 0)
    assert exceptions_of(row) == []
    assert Effect.objects.count() == 1


@has_sessions
@pytest.mark.django_db(transaction=True)
def test_a_connection_that_has_just_been_used_is_not_probed(clock):
    with awake("default"):
        dead = driver()
        clock.seconds += 60  # a long job, and used to its end
    misbehaving.end_own_session()
    clock.seconds += 0.5

    with awake("default") as trusted:
        assert trusted.connection is dead
    trusted.close()


@pytest.fixture
def job_thread(monkeypatch):
    """A job thread of a project that closes its connections after each request."""
    monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", 0)
    settings = {"initializer": keep_connection, "initargs": ("default",)}
    with ThreadPoolExecutor(1, **settings) as pool:
        yield pool


def age(minutes):
    connections["default"].close_at -= 60 * minutes


@pytest.mark.django_db(transaction=True)
def test_a_job_thread_keeps_its_connection_where_the_project_keeps_none(job_thread):
    drivers = {job_thread.submit(driver).result() for _ in range(3)}
    job_thread.submit(age, 9).result()
    drivers.add(job_thread.submit(driver).result())

    assert len(drivers) == 1


@pytest.mark.django_db(transaction=True)
def test_a_job_thread_closes_its_connection_after_ten_minutes(job_thread):
    first = job_thread.submit(driver).result()

    job_thread.submit(age, 10).result()

    assert job_thread.submit(driver).result() is not first


def test_to_keep_a_connection_changes_no_other_threads_settings(job_thread):
    job_thread.submit(driver).result()

    assert connection.settings_dict["CONN_MAX_AGE"] == 0
