"""Passes in processes of their own: side by side, killed, stopped, beside a writer."""

import json
import signal
from collections import Counter

import pytest
from django.db import connection, transaction
from django.db.models import Count

from async_queue import schedule_many
from async_queue.db import vendor
from async_queue.models import Attempt, Job, Status, Worker
from tests.factories import JobFactory
from tests.models import Effect
from tests.process import finished, started

JOBS = 2000
THREADS = 8
WORKING = "--threads=8", "--keep-going", "--json"
pytestmark = pytest.mark.django_db(transaction=True)
is_serial = vendor(connection).runs_one_job_at_a_time
SESSIONS = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "mysql": "SELECT count(*) FROM information_schema.processlist"
    " WHERE db = DATABASE() AND id <> connection_id()",
}


def count_sessions():
    with connection.cursor() as cursor:
        cursor.execute(SESSIONS[connection.vendor])
        return cursor.fetchone()[0]


def statuses():
    return Counter(Job.objects.values_list("status", flat=True))


def assert_nobody_works():
    assert not Worker.objects.filter(dead_at=None).exists()
    assert not Job.objects.filter(status=Status.RUNNING).exists()


def test_two_processes_side_by_side_run_each_job_once():
    calls = [("tests.jobs.leave_or_fail", [i]) for i in range(JOBS)]
    # Once, because the later pass may find due again what the earlier one has run.
    schedule_many(calls, meta={"max_attempts": 1})

    with (
        started("flush_queue", *WORKING) as one,
        started("flush_queue", *WORKING) as other,
    ):
        summaries = [
            json.loads(each.communicate(timeout=60)[0]) for each in (one, other)
        ]

    assert sum(each["jobs"] for each in summaries) == JOBS
    assert all(each["jobs"] for each in summaries)
    labels = Effect.objects.values_list("label", flat=True)
    assert Counter(labels) == {str(i): 1 for i in range(JOBS) if i % 10}
    assert statuses() == {"SUCCESSFUL": JOBS * 9 // 10, "FAILED": JOBS // 10}
    assert set(Job.objects.values_list("attempt", flat=True)) == {1}
    assert_nobody_works()


def test_killed_process_loses_nothing_and_repeats_nothing(tmp_path):
    go_on = tmp_path / "go_on"
    JobFactory.create_batch(10, rank=-1)
    held = JobFactory(
        function="tests.jobs.leave_then_await", args=json.dumps([str(go_on), "held"])
    )
    JobFactory.create_batch(10, rank=1)
    with started("flush_queue", "--threads=2") as process:
        read_until(process.stdout, f"{held.pk}: ")
        process.kill()
        process.wait(20)
    assert Job.objects.get(pk=held.pk).status == Status.RUNNING

    go_on.touch()
    ended = finished("flush_queue")

    assert ended.returncode == 0, ended.stderr
    assert statuses() == {"SUCCESSFUL": 21}
    assert Effect.objects.count() == 21
    assert Effect.objects.filter(label="held").count() == 1
    lost = Attempt.objects.get(job=held)
    assert lost.exception == "async_queue.exceptions.WorkerLost"
    assert Job.objects.get(pk=held.pk).failures == 0
    assert_nobody_works()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_finish_what_runs_and_gives_back_the_rest(
    tmp_path, number, wait_until
):
    args = json.dumps([str(tmp_path), "held"])
    JobFactory(function="tests.hanging.wait_for_go", args=args)
    JobFactory.create_batch(20)
    with started("flush_queue", "--threads=1") as process:
        wait_until((tmp_path / "begun-held").exists)
        process.send_signal(number)
        read_until(process.stderr, number.name)
        (tmp_path / "go").touch()
        process.wait(20)

    assert process.returncode == 128 + number
    assert statuses() == {"SUCCESSFUL": 1, "READY": 20}
    assert [effect.label for effect in Effect.objects.all()] == ["held"]
    assert_nobody_works()
    assert not Worker.objects.exists()


@pytest.mark.skipif(not is_serial, reason="there may be many writers at a time")
def test_writer_beside_busy_threads_never_finds_the_database_locked():
    count = 100
    schedule_many([("tests.jobs.leave", [str(i)]) for i in range(count)])
    written = 0

    with started("flush_queue", *WORKING) as process:
        while process.poll() is None:
            with transaction.atomic():  # which raises after Django's five seconds
                Effect.objects.create(label="beside")
            written += 1
        summary = json.loads(process.stdout.read())

    assert summary["failures"] == 0
    assert summary["outcomes"]["succeed"] == count
    assert Effect.objects.filter(label="beside").count() == written > 0
    assert Effect.objects.exclude(label="beside").count() == count


PERSISTENCE = [
    {"CONN_MAX_AGE": 0},
    {"CONN_MAX_AGE": 60},
    {"CONN_MAX_AGE": None},
    {"CONN_MAX_AGE": 0, "CONN_HEALTH_CHECKS": True},
    {"CONN_MAX_AGE": 60, "CONN_HEALTH_CHECKS": True},
    {"OPTIONS": {"pool": {"min_size": 1, "max_size": THREADS}}},
]


@pytest.mark.skipif(is_serial, reason="there is no server in which to count")
@pytest.mark.parametrize("persistence", PERSISTENCE, ids=str)
def test_eight_threads_open_few_sessions_and_keep_them(persistence, wait_until):
    if "OPTIONS" in persistence and connection.vendor != "postgresql":
        pytest.skip(f"Django has no connection pool for {connection.display_name}")
    schedule_many([("tests.jobs.leave_number_of_session",)] * 200)
    most = 0

    with started("flush_queue", *WORKING, **persistence) as process:
        while process.poll() is None:
            most = max(most, count_sessions())
        summary = json.loads(process.stdout.read())

    assert summary["outcomes"]["succeed"] == 200
    sessions = Effect.objects.aggregate(found=Count("label", distinct=True))["found"]
    assert 1 < sessions <= THREADS
    assert sessions < most <= THREADS + 2
    wait_until(lambda: not count_sessions())


def read_until(stream, text):
    for line in stream:
        if text in line:
            return
    raise AssertionError(f"nothing said {text!r}")
