import json
import re
import signal
import sys
from datetime import timedelta
from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from async_queue import health, hooks
from async_queue.models import Attempt, Job, Worker
from tests.factories import JobFactory, now
from tests.models import Effect
from tests.process import finished, started

pytestmark = pytest.mark.django_db(transaction=True)


class Terminal(StringIO):
    def isatty(self):
        return True


class Said:
    """What a command wrote, and the error with which it ended."""

    def __init__(self, *arguments, stdout=None, **options):
        self.stdout, self.stderr = stdout or StringIO(), StringIO()
        self.error = None
        streams = {"stdout": self.stdout, "stderr": self.stderr}
        try:
            call_command("flush_queue", *arguments, **streams, **options)
        except CommandError as error:
            self.error = error

    @property
    def out(self):
        return self.stdout.getvalue()

    @property
    def err(self):
        return self.stderr.getvalue()


def statuses():
    return list(Job.objects.order_by("id").values_list("status", flat=True))


def test_each_job_is_announced_and_the_pass_summed_up():
    first, second = (
        JobFactory(),
        JobFactory(args='["x", 3]', function="tests.jobs.take"),
    )

    said = Said()

    lines = said.out.splitlines()
    assert set(lines[:2]) == {
        f"{first.pk}: tests.jobs.leave()",
        f"{second.pk}: tests.jobs.take('x', 3)",
    }
    assert re.fullmatch(r"2 jobs in \d+\.\d\d s: 2 succeeded", lines[2])
    assert (said.err, said.error) == ("", None)


def test_secrets_are_not_announced():
    JobFactory(function="tests.jobs.take", kwargs='{"password":"hunter2"}')

    said = Said()

    assert "password=***" in said.out
    assert "hunter2" not in said.out


def test_pass_without_jobs_says_so():
    said = Said()

    assert said.out == "No jobs to execute\n"
    assert said.error is None


def test_first_failure_stops_the_pass_and_shows_its_traceback():
    JobFactory()
    bad = JobFactory(function="tests.jobs.leave_then_fail")
    JobFactory.create_batch(3)

    said = Said("--threads=1")

    assert said.error.returncode == 1
    assert str(said.error) == "1 of 2 jobs failed"
    assert f"job {bad.pk} failed (to be tried again)" in said.err
    assert 'raise ValueError("as intended")' in said.err
    assert statuses() == ["SUCCESSFUL", "WAITING"] + ["READY"] * 3


def test_pass_misses_no_job_that_comes_back_behind_it():
    before = now() - timedelta(hours=1)
    JobFactory.create_batch(6)
    claims = iter(range(100))

    def give_back():
        if next(claims) == 1:
            JobFactory(rank=-1, run_after=before, enqueued_at=before)

    with hooks.at("after_claim", give_back):
        Said("--threads=1")

    assert statuses() == ["SUCCESSFUL"] * 7


def test_keep_going_runs_all_and_fails_at_the_end():
    JobFactory(function="tests.jobs.leave_then_fail")
    JobFactory.create_batch(3)

    said = Said("--keep-going", "--threads=1")

    assert said.error.returncode == 1
    assert str(said.error) == "1 of 4 jobs failed"
    assert said.err.count("ValueError: as intended") == 1
    assert statuses() == ["WAITING"] + ["SUCCESSFUL"] * 3


def test_job_that_steers_itself_is_no_failure():
    JobFactory(function="tests.jobs.leave_then_snooze", args="[60]")
    JobFactory(function="tests.jobs.leave_then_cancel")
    JobFactory(function="tests.jobs.leave_then_retry", args="[60]")

    said = Said()

    assert (said.error, said.err) == (None, "")
    assert "1 to be tried again, 1 put off, 1 cancelled" in said.out


def test_job_of_an_unavailable_function_is_told_of(caplog, tmp_path, monkeypatch):
    (tmp_path / "half_done.py").write_text("raise RuntimeError('50% of it')")
    monkeypatch.syspath_prepend(tmp_path)
    job = JobFactory(function="half_done.f")

    said = Said()

    reason = Attempt.objects.get().message
    (logged,) = [record for record in caplog.records if hasattr(record, "job")]
    (check,) = health()["checks"]["queue:unavailable-functions"]
    assert "RuntimeError: 50% of it" in reason
    assert (said.error, statuses()) == (None, ["WAITING"])
    assert f"job {job.pk} " in said.err
    assert reason in said.err
    assert (logged.job, logged.levelname) == (job.pk, "WARNING")
    assert reason in logged.getMessage()
    assert (check["status"], check["observedValue"]) == ("warn", 1)


def test_dry_run_lists_in_order_and_changes_nothing():
    last = JobFactory(rank=1)
    due = JobFactory(waiting=True, run_after=now() - timedelta(days=1))
    first = JobFactory(rank=-1)
    JobFactory(waiting=True)
    before = list(Job.objects.values())

    said = Said("--dry-run")

    call = "tests.jobs.leave()"
    expected = [f"{row.pk}: {call}" for row in (first, due, last)]
    assert said.out.splitlines() == expected
    assert list(Job.objects.values()) == before
    assert not Effect.objects.exists()


def test_dry_run_of_nothing_says_so():
    assert Said("--dry-run").out == "No jobs to execute\n"


def test_dry_run_as_json():
    row = JobFactory()

    said = Said("--dry-run", "--json")

    assert json.loads(said.out) == {
        "dry_run": True,
        "jobs": [{"id": row.pk, "call": "tests.jobs.leave()"}],
    }


CHOICES = [
    (["-j", "2"], {0, 1}),
    (["--jobs=9"], {0, 1, 2, 3}),
    (["-w1", "-o2"], "odd"),
    (["-f", "tests.jobs.le"], {0, 1, 2}),
    (["--filter=TESTS.jobs.le"], "capitals"),
    (["--queue", "mail"], {0, 3}),
    (["--queue", "mail,bulk"], {0, 1, 3}),
    (["--queue=mail", "--queue=bulk"], {0, 1, 3}),
    (["--queue=mail", "-f", "tests.jobs.leave"], {0}),
]


@pytest.mark.parametrize(("arguments", "expected"), CHOICES)
@pytest.mark.parametrize("is_dry", [True, False])
def test_options_choose_the_jobs(arguments, expected, is_dry):
    rows = [
        JobFactory(queue="mail", rank=0),
        JobFactory(queue="bulk", rank=1),
        JobFactory(queue="slow", rank=2),
        JobFactory(queue="mail", rank=3, function="tests.jobs.take"),
    ]
    if expected == "odd":
        expected = {index for index, row in enumerate(rows) if row.pk % 2}
    if expected == "capitals":
        expected = set() if connection.vendor != "mysql" else {0, 1, 2}

    said = Said(*arguments, *(["--dry-run"] if is_dry else []), "--threads=1")

    numbers = {int(number) for number in re.findall(r"^(\d+): ", said.out, re.M)}
    assert numbers == {rows[index].pk for index in expected}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-j0"], "--jobs is 0: it must be at least 1"),
        (["-jx"], "invalid int value: 'x'"),
        (["--threads=-1"], "--threads is -1: it must be at least 1"),
        (["-o0"], "--outof is 0: it must be at least 1"),
        (["-w2", "-o2"], "--which is 2: it must be from 0 to 1"),
        (["-w-1", "-o2"], "--which is -1: it must be from 0 to 1"),
        (["-w1"], "--which is 1: it must be from 0 to 0"),
        (["--queue=a,,b"], "--queue is 'a,,b': a name is empty"),
        (["--deadline=soon"], "--deadline is 'soon': it must be seconds"),
        (["--deadline=-5"], "--deadline is '-5': it must not be negative"),
        (["--deadline=nan"], "--deadline is 'nan': it "),
        (["--deadline=inf"], "--deadline is 'inf': it "),
        (["--database=other"], "--database is 'other': the databases are default"),
    ],
)
def test_wrong_values_are_named_before_anything_runs(arguments, message):
    JobFactory()

    said = Said(*arguments)

    assert message in str(said.error)
    assert statuses() == ["READY"]


@pytest.mark.parametrize("deadline", ["60", "50s", "1m", 0.5, timedelta(seconds=9)])
def test_deadline_takes_seconds_and_durations(deadline):
    JobFactory()

    assert Said(deadline=deadline).error is None


def test_deadline_that_is_over_lets_nothing_begin():
    JobFactory()

    said = Said("--deadline=0")

    assert said.error is None
    assert statuses() == ["READY"]


def test_options_may_be_given_by_name():
    JobFactory.create_batch(2, queue="mail")

    Said(jobs=1, queue="mail", threads=1, keep_going=True)

    assert statuses().count("SUCCESSFUL") == 1


def test_json_is_one_object_and_nothing_else():
    JobFactory()
    JobFactory(function="tests.jobs.leave_then_fail")

    said = Said("--json", "--keep-going", "--progress")

    summary = json.loads(said.out)
    assert summary.pop("seconds") > 0
    assert {key: count for key, count in summary.pop("outcomes").items() if count} == {
        "succeed": 1,
        "retry": 1,
    }
    assert summary == {"jobs": 2, "failures": 1, "given_back": 0, "signal": None}
    assert said.error.returncode == 1


def test_verbosity_0_prints_only_errors():
    JobFactory()
    JobFactory(function="tests.jobs.leave_then_fail")

    said = Said(verbosity=0, keep_going=True, stdout=Terminal())

    assert said.out == ""
    assert "ValueError: as intended" in said.err


def test_cron_gets_no_progress():
    JobFactory.create_batch(3)

    said = Said()

    assert "\r" not in said.out
    assert "\x1b" not in said.out


@pytest.mark.parametrize("option", ["--progress", None])
def test_terminal_gets_a_bar_and_the_lines_above_it(option):
    pytest.importorskip("rich")
    row = JobFactory(function="tests.jobs.take", args='["[red]x[/]"]')

    said = Said(*([option] if option else []), stdout=Terminal())

    assert f"{row.pk}: tests.jobs.take('[red]x[/]')\n" in said.out
    assert "100%" in said.out
    assert said.out.endswith("1 succeeded\n")


def test_terminal_without_rich_gets_a_plain_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    row = JobFactory()

    said = Said(stdout=Terminal())

    assert f"{row.pk}: tests.jobs.leave()\n" in said.out
    assert "\r0 of 1 jobs" in said.out or "0 of 1 jobs" in said.out
    assert "1 of 1 jobs" in said.out
    assert "\x1b" not in said.out


def test_no_progress_gives_a_terminal_plain_lines():
    JobFactory()

    assert "\r" not in Said("--no-progress", stdout=Terminal()).out


def test_no_color_is_heeded():
    JobFactory()

    said = Said("--no-color", stdout=Terminal())

    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", said.out)


def test_stream_that_lacks_a_letter_ends_no_pass():
    JobFactory(function="tests.jobs.take", args='["\\u2713"]')

    ended = finished("flush_queue", environment={"PYTHONIOENCODING": "ascii"})

    assert ended.returncode == 0, ended.stderr
    assert "tests.jobs.take('\\u2713')" in ended.stdout


def test_missing_tables_are_a_plain_error():
    with connection.schema_editor() as editor:
        editor.execute("ALTER TABLE async_queue_job RENAME TO elsewhere")
    try:
        ended = finished("flush_queue")
    finally:
        with connection.schema_editor() as editor:
            editor.execute("ALTER TABLE elsewhere RENAME TO async_queue_job")

    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "has `migrate` been run?" in ended.stderr


@pytest.mark.skipif(connection.vendor == "sqlite", reason="a file is always there")
def test_server_that_does_not_answer_is_a_plain_error():
    ended = finished("flush_queue", PORT="1")

    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "cannot work on the queue: " in ended.stderr


def test_wrong_settings_are_a_plain_error(settings):
    settings.ASYNC_QUEUE = {"THREDS": 3}

    assert "Did you mean 'THREADS'?" in str(Said().error)


def test_failure_in_a_process_exits_1_and_shows_its_traceback_once():
    """Where no logging is set up, logging itself would print it once more."""
    JobFactory(function="tests.jobs.leave_then_fail")

    ended = finished("flush_queue")

    assert ended.returncode == 1
    assert ended.stderr.count("ValueError: as intended") == 1
    assert ended.stderr.endswith("CommandError: 1 of 1 jobs failed\n")


def test_warnings_that_are_about_no_job_are_shown_in_a_process():
    JobFactory(orphaned=True)

    ended = finished("flush_queue")

    assert ended.returncode == 0
    assert "has died" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_process_at_once(tmp_path, number):
    path = tmp_path / "never"
    JobFactory(function="tests.jobs.leave_then_await", args=json.dumps([str(path)]))

    with started("flush_queue") as process:
        process.stdout.readline()
        process.send_signal(number)
        # The first in a SQLite database says that it is switched to WAL, too.
        assert any("the next signal ends it" in line for line in process.stderr)
        process.send_signal(number)
        process.wait(10)

    assert process.returncode == 128 + number
    assert not Effect.objects.exists()
    if connection.vendor != "sqlite":  # whose only writer is the job that was ended
        assert statuses() == ["READY"]
        assert not Worker.objects.exists()


def test_what_is_too_old_is_deleted_after_the_pass(settings):
    settings.ASYNC_QUEUE = {"RETENTION": {"successful": "1d"}}
    long_ago = now() - timedelta(days=2)
    JobFactory.create_batch(
        3, successful=True, enqueued_at=long_ago, finished_at=long_ago
    )
    kept = JobFactory()

    Said()

    assert [job.pk for job in Job.objects.all()] == [kept.pk]
