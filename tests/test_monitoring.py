"""health(), its checks, and the three estimators."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection
from django.db.utils import ConnectionDoesNotExist

from async_queue import conf, health, monitoring
from async_queue.db import vendor
from async_queue.models import Status
from tests.factories import (
    AttemptFactory,
    JobFactory,
    WorkerFactory,
    let_die,
    living,
    now,
)

pytestmark = pytest.mark.django_db

SECOND = timedelta(seconds=1)
UNKNOWN_KEY = "async_queue.exceptions.UnknownSealKey"


@pytest.fixture(autouse=True)
def nobody_lives_on():
    yield
    let_die()


def succeeded(seconds: float, *, ago: timedelta = SECOND, **columns):
    """Make a job that ran for so many seconds."""
    finished_at = now() - ago
    started_at = finished_at - timedelta(seconds=seconds)
    return JobFactory(
        successful=True, started_at=started_at, finished_at=finished_at, **columns
    )


def running(seconds: float, **columns):
    """Make a job that has been running for so many seconds on one of two threads."""
    worker = living(threads=2)
    started_at = now() - timedelta(seconds=seconds)
    return JobFactory(running=True, started_at=started_at, worker=worker, **columns)


def ready_for(seconds: float, **columns):
    return JobFactory(run_after=now() - timedelta(seconds=seconds), **columns)


def put_off_for_its_key(**columns):
    job = JobFactory(attempt=1, **columns)
    AttemptFactory(job=job, number=1, exception=UNKNOWN_KEY)
    return job


def threads(number: int) -> int:
    """Return how many of so many threads the database lets run jobs."""
    return 1 if vendor(connection).runs_one_job_at_a_time else number


def check(name: str):
    (found,) = health()["checks"][name]
    return found


def test_health_of_an_empty_queue_passes_and_is_ready_for_json():
    found = json.loads(json.dumps(health()))

    assert found["status"] == "pass"
    assert found["queues"] == {}
    assert found["workers"] == []
    assert found["errors"] == {"number": 0}
    assert found["queue"] == {
        "all-jobs": 0,
        "executed": 0,
        "executed-details": {},
        "oldest-executed": None,
        "most-recent-executed": None,
        "remaining": 0,
        "oldest-remaining": None,
        "not-executed": 0,
        "not-executed-details": {},
        "cancelled": 0,
        "cancelled-details": {},
        "oldest-cancelled": None,
        "most-recent-cancelled": None,
        "estimated-completion-current-job": 0.0,
        "estimated-completion": 0.0,
    }


def test_health_counts_a_job_of_each_status_where_it_belongs():
    for status in ("waiting", "running", "successful", "failed", "cancelled"):
        JobFactory(**{status: True})
    JobFactory()
    AttemptFactory.create_batch(2, job=JobFactory(failed=True))

    found = health()

    assert found["queue"]["all-jobs"] == 7
    assert found["queue"]["executed"] == 1
    assert found["queue"]["remaining"] == 3
    assert found["queue"]["not-executed"] == 5
    assert found["queue"]["cancelled"] == 1
    assert found["errors"]["number"] == 2


def test_details_count_by_function_over_all_queues():
    JobFactory(successful=True, function="a.b")
    JobFactory(successful=True, function="a.b", queue="mail")
    JobFactory(cancelled=True, function="a.c")
    JobFactory(function="a.d")
    JobFactory(failed=True, function="a.d")

    queue = health()["queue"]

    assert queue["executed-details"] == {"a.b": {"count": 2}}
    assert queue["cancelled-details"] == {"a.c": {"count": 1}}
    assert queue["not-executed-details"] == {"a.d": {"count": 2}}


@pytest.mark.parametrize(
    ("trait", "name"), [("successful", "executed"), ("cancelled", "cancelled")]
)
def test_health_tells_the_oldest_and_the_most_recent(trait, name):
    moments = [datetime(2020, 1, day, 12, 30, tzinfo=UTC) for day in (2, 1, 3)]
    for moment in moments:
        JobFactory(**{trait: True}, finished_at=moment, function=f"a.day{moment.day}")

    queue = health()["queue"]

    assert queue[f"oldest-{name}"] == "2020-01-01T12:30:00+00:00"
    assert queue[f"most-recent-{name}"] == "2020-01-03T12:30:00+00:00"


def test_health_tells_since_when_the_oldest_live_job_is_there():
    JobFactory(successful=True, enqueued_at=datetime(2020, 1, 1, tzinfo=UTC))
    JobFactory(waiting=True, enqueued_at=datetime(2020, 1, 2, tzinfo=UTC))

    assert health()["queue"]["oldest-remaining"] == "2020-01-02T00:00:00+00:00"


def test_queues_are_counted_each_for_itself():
    ready_for(20, queue="mail")
    ready_for(10, queue="mail", function="a.b")
    JobFactory(waiting=True, queue="mail")
    JobFactory(running=True)

    queues = health()["queues"]

    age = queues["mail"].pop("oldest_ready_age")
    assert 20 <= age < 30
    assert queues == {
        "mail": {"ready": 2, "waiting": 1, "running": 0},
        "default": {"ready": 0, "waiting": 0, "running": 1, "oldest_ready_age": 0.0},
    }


def test_a_waiting_job_that_nobody_promotes_is_ready_once_it_is_due():
    ready_for(20, status=Status.WAITING)

    found = health()["queues"]["default"]

    assert (found["ready"], found["waiting"]) == (1, 0)
    assert found["oldest_ready_age"] >= 20


def test_workers_are_those_that_live():
    worker = living(host="web1", pid=12, queues="mail,default", threads=3)
    WorkerFactory(dead=True)
    JobFactory.create_batch(2, running=True, worker=worker)

    assert health()["workers"] == [
        {
            "id": worker.pk,
            "host": "web1",
            "pid": 12,
            "version": "1",
            "queues": ["mail", "default"],
            "threads": 3,
            "seen_at": worker.seen_at.isoformat(),
            "running": 2,
        }
    ]


def test_a_worker_for_all_queues_names_none():
    living(queues="")

    assert health()["workers"][0]["queues"] == []


def test_a_check_has_the_form_of_the_draft():
    found = check("queue:latency")

    assert found.keys() == {
        "componentType",
        "observedValue",
        "observedUnit",
        "status",
        "time",
    }
    assert datetime.fromisoformat(found["time"]) <= now()


@pytest.mark.parametrize(("seconds", "status"), [(280, "pass"), (301, "fail")])
def test_latency_fails_beyond_the_longest_that_is_allowed(seconds, status):
    living()
    ready_for(seconds)

    found = check("queue:latency")

    assert found["status"] == status
    assert found["observedValue"] >= seconds
    assert health()["status"] == status


def test_latency_is_measured_against_the_setting(settings):
    settings.ASYNC_QUEUE = {"HEALTH": {"MAX_LATENCY": "5s"}}
    ready_for(6)

    assert check("queue:latency")["status"] == "fail"


def test_ready_jobs_without_a_worker_are_warned_of_with_the_remedy():
    for _ in range(3):
        ready_for(100)

    found = check("workers:live")

    assert found["status"] == "warn"
    assert found["output"] == (
        "3 jobs ready, no live worker: run manage.py run_workers"
    )
    assert health()["status"] == "warn"


def test_the_pause_between_two_passes_of_cron_is_not_warned_of():
    ready_for(50)

    assert check("workers:live")["status"] == "pass"


def test_ready_jobs_with_a_worker_are_not_warned_of():
    living()
    ready_for(100)

    assert check("workers:live")["status"] == "pass"


def test_jobs_that_failed_within_the_last_hour_are_warned_of():
    JobFactory(failed=True)
    JobFactory(failed=True, finished_at=now() - timedelta(minutes=61))
    JobFactory(successful=True)

    found = check("queue:failed")

    assert (found["status"], found["observedValue"]) == ("warn", 1)
    assert found["output"].startswith("1 job failed")


@pytest.mark.parametrize("trait", [{"waiting": True}, {}])
def test_a_job_put_off_for_an_unknown_key_fails_health(trait):
    put_off_for_its_key(**trait)

    found = check("queue:unknown-keys")

    assert (found["status"], found["observedValue"]) == ("fail", 1)
    assert health()["status"] == "fail"


def test_a_job_whose_key_has_come_passes():
    put_off_for_its_key(successful=True)
    retried = put_off_for_its_key(waiting=True)
    AttemptFactory(job=retried, number=2)
    retried.attempt = 2
    retried.save()

    assert check("queue:unknown-keys")["status"] == "pass"


def test_workers_that_died_within_the_last_hour_are_warned_of():
    worker = WorkerFactory(dead=True)
    WorkerFactory(dead_at=now() - timedelta(minutes=61))

    found = check("workers:dead")

    assert (found["status"], found["observedValue"]) == ("warn", 1)
    assert str(worker) in found["output"]


def test_an_estimation_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'rough' or 'precise'; it is 'exact'"):
        health("exact")


def test_health_is_that_of_the_alias_it_is_asked_for():
    assert health(using="default")["status"] == "pass"
    with pytest.raises(ConnectionDoesNotExist, match="elsewhere"):
        health(using="elsewhere")


def test_health_counts_the_same_whatever_is_estimated():
    succeeded(4)
    JobFactory(waiting=True)

    rough, precise = health("rough"), health("precise")

    assert rough["queue"] == precise["queue"]


def test_health_asks_six_questions_however_much_there_is(django_assert_num_queries):
    for number in range(5):
        succeeded(1, function=f"a.b{number}")
        running(1, queue=f"queue{number}")
        put_off_for_its_key(waiting=True)

    with django_assert_num_queries(6):
        health("precise")


@pytest.mark.parametrize("estimate", monitoring.ESTIMATORS.values())
def test_nothing_is_estimated_without_a_job_that_ran(estimate):
    JobFactory()
    JobFactory(failed=True)
    JobFactory(cancelled=True, started_at=None)

    assert estimate(monitoring.look()) is None


def test_the_current_job_is_not_estimated_without_a_job_that_ran():
    running(1)

    assert monitoring.estimate_current_job_completion(monitoring.look()) is None


def test_the_rough_estimate_takes_one_average_for_all():
    succeeded(10, function="a.slow")
    succeeded(2, function="a.quick")
    succeeded(1000, ago=timedelta(hours=25))
    living(threads=3)
    JobFactory.create_batch(4, function="a.quick")
    JobFactory(waiting=True, function="a.quick")

    estimate = monitoring.estimate_rough_queue_completion(monitoring.look())

    assert estimate == 5 * 6 / threads(3)


def test_the_precise_estimate_takes_an_average_for_each_function():
    succeeded(10, function="a.slow")
    succeeded(20, function="a.slow", queue="mail")
    succeeded(3, function="a.quick", ago=timedelta(days=2))
    JobFactory.create_batch(2, function="a.slow")
    JobFactory(waiting=True, function="a.quick")
    JobFactory(function="a.new")

    seen = monitoring.look(history=timedelta(days=30))

    number = threads(conf.settings().threads)
    assert monitoring.estimate_queue_completion(seen) == pytest.approx(
        (2 * 15 + 3 + 11) / number, abs=0.01
    )


def test_a_precise_health_learns_from_more_than_a_day():
    succeeded(3, ago=timedelta(days=2))
    JobFactory()

    assert health("rough")["queue"]["estimated-completion"] is None
    assert health("precise")["queue"]["estimated-completion"] > 0


def test_the_current_jobs_are_done_when_the_last_of_them_is():
    succeeded(100, function="a.slow")
    succeeded(10, function="a.quick")
    running(30, function="a.slow")
    running(50, function="a.slow")
    running(1, function="a.quick")

    estimate = monitoring.estimate_current_job_completion(monitoring.look())

    assert estimate == pytest.approx(70, abs=5)


def test_a_job_that_takes_longer_than_usual_is_never_done_in_the_past():
    succeeded(10)
    running(60)

    seen = monitoring.look()

    assert monitoring.estimate_current_job_completion(seen) == 0.0
    assert monitoring.estimate_queue_completion(seen) == 0.0


def test_the_queue_is_not_done_before_its_longest_running_job():
    succeeded(100, function="a.slow")
    succeeded(1, function="a.quick")
    running(0, function="a.slow")
    running(0, function="a.quick")

    estimate = monitoring.estimate_queue_completion(monitoring.look())

    assert estimate >= 90
