import json
import os
import signal
from datetime import timedelta

import pytest
from django.db import connection

from async_queue import claims, codec, lone
from async_queue.exceptions import JobTimeout, WorkerCrashed
from async_queue.models import FINAL, Attempt, Job, Status
from async_queue.statements import Selection
from tests.factories import JobFactory, WorkerFactory
from tests.jobs import leave
from tests.models import Effect
from tests.stepping import elsewhere

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def same_database(monkeypatch):
    """Let the other process work on the database of this test."""
    monkeypatch.setenv("AQ_TEST_DATABASE", str(connection.settings_dict["NAME"]))


def kill_process(number):
    leave()
    os.kill(os.getpid(), number)


def end_process(code):
    leave()
    os._exit(code)


def claim_suspect(function="tests.jobs.leave", *args, **columns):
    JobFactory(function=function, args=json.dumps(args), suspect=True, **columns)
    worker = WorkerFactory().pk
    (job,) = claims.claim("default", worker, 1, Selection(suspect=True))
    return job


def run_alone(function, *args, **columns):
    return lone.execute_alone(claim_suspect(function, *args, **columns))


def test_job_runs_in_a_process_of_its_own():
    outcome = run_alone("tests.jobs.leave_number_of_process")

    assert outcome.action == "succeed"
    assert Job.objects.get().status == Status.SUCCESSFUL
    assert Effect.objects.get().label != str(os.getpid())


def test_job_that_raises_there_waits_for_its_next_attempt():
    outcome = run_alone("tests.jobs.leave_then_fail")

    assert outcome.action == "retry"
    assert Job.objects.get().status == Status.WAITING
    assert Attempt.objects.get().exception == "builtins.ValueError"
    assert not Effect.objects.exists()


@pytest.mark.parametrize(
    ("function", "number", "words"),
    [
        ("kill_process", signal.SIGSEGV, "was ended by SIGSEGV"),
        ("kill_process", signal.SIGRTMIN + 1, "was ended by signal "),
        ("end_process", 0, "exited with 0 before the job had an outcome"),
    ],
)
def test_job_that_kills_its_process_has_crashed(function, number, words):
    outcome = run_alone(f"tests.test_lone.{function}", int(number))

    row = Job.objects.get()
    assert outcome.action == "crash"
    assert (row.crashes, row.failures, row.suspect) == (1, 0, True)
    assert words in Attempt.objects.get().message
    assert not Effect.objects.exists()


def test_job_that_kills_one_process_after_the_other_fails():
    outcome = run_alone("tests.test_lone.end_process", 0, crashes=2)

    assert outcome.action == "fail"
    assert isinstance(outcome.error, WorkerCrashed)
    assert Job.objects.get().status == Status.FAILED


@pytest.mark.parametrize("change", ["cancel", "delete"])
def test_job_that_is_not_its_workers_any_more_does_not_run(change):
    job = claim_suspect()
    rows = Job.objects.filter(pk=job.id)
    rows.transition("cancel") if change == "cancel" else rows.delete()

    assert lone.execute_alone(job).action == "lose"

    assert not Effect.objects.exists()


def test_process_is_killed_when_its_run_is_ended(tmp_path, wait_until):
    path = str(tmp_path / "never")
    job = claim_suspect("tests.test_in_process.await_file", path)
    running = elsewhere(lone.execute_alone, job)
    wait_until((tmp_path / "never-begun").exists)

    assert job.control.stop(JobTimeout("it is over"))
    job.control.interrupt()
    job.control.cut_off(None)

    outcome = running.result(20)
    assert outcome.action == "lose"
    assert isinstance(outcome.error, JobTimeout)
    assert not Effect.objects.exists()


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        (codec.encode({"timeout": timedelta(seconds=5)}, "meta"), 15.0),
        ("{}", None),
        # The other process refuses them.
        ("[]", None),
        ('{"timeout":"x"}', None),
    ],
)
def test_process_has_time_to_start(meta, expected):
    job = claim_suspect(meta=meta)

    lone.execute_alone(job)

    assert job.control.timeout == expected
    assert Job.objects.get().status in FINAL


def test_job_runs_beside_others_where_no_process_finds_the_settings(
    monkeypatch, caplog
):
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE")

    outcome = run_alone("tests.jobs.leave_number_of_process")

    assert outcome.action == "succeed"

    assert Effect.objects.get().label == str(os.getpid())
    assert "runs beside others: worker processes need a settings module" in caplog.text
