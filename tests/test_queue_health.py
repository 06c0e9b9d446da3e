"""manage.py queue_health: what it writes, and its exit code."""

import io
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, connections
from django.db.migrations.recorder import MigrationRecorder

from tests.factories import AttemptFactory, JobFactory, let_die, living, now

# Nobody listens on the port, and on SQLite the folder does not exist.
UNREACHABLE = {"HOST": "127.0.0.1", "PORT": "1", "NAME": "/nowhere/at/all.db"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def nobody_lives_on():
    yield
    let_die()


def queue_health(*arguments: str, out: io.StringIO | None = None) -> tuple[int, str]:
    """Return the exit code and what was written."""
    out = out or io.StringIO()
    try:
        call_command("queue_health", *arguments, stdout=out, no_color=True)
    except SystemExit as end:
        return end.code, out.getvalue()
    except CommandError as error:
        return error.returncode, str(error)
    return 0, out.getvalue()


@contextmanager
def unreachable_database():
    """Give this thread a connection to a server that does not exist."""
    shared = connections["default"]
    connections["default"] = type(shared)(
        {**shared.settings_dict, **UNREACHABLE}, "default"
    )
    try:
        yield
    finally:
        connections["default"] = shared


@pytest.mark.django_db
def test_writes_json_where_no_terminal_is():
    JobFactory(successful=True)

    code, written = queue_health()

    found = json.loads(written)
    assert code == 0
    assert found["status"] == "pass"
    assert found["queue"]["executed"] == 1


@pytest.mark.django_db
def test_writes_json_on_a_terminal_when_asked():
    code, written = queue_health("--json", out=Terminal())

    assert json.loads(written)["status"] == "pass"
    assert code == 0


@pytest.mark.django_db
def test_writes_a_summary_on_a_terminal():
    JobFactory(successful=True)
    JobFactory.create_batch(2, queue="mail")
    living(host="web1", pid=12, threads=3)

    code, written = queue_health(out=Terminal())

    assert code == 0
    assert written.splitlines()[0].startswith("pass: 1 job executed, 0 failed")
    assert re.search(r"queue mail: 2 ready, 0 waiting, 0 running", written)
    assert re.search(r"web1, process 12, 0 running on 3 threads", written)


@pytest.mark.django_db
def test_a_warning_exits_with_1_and_tells_the_remedy():
    JobFactory(run_after=now() - timedelta(seconds=100))

    code, written = queue_health(out=Terminal())

    assert code == 1
    assert written.startswith("warn")
    assert "1 job ready, no live worker: run manage.py run_workers" in written


@pytest.mark.django_db
@pytest.mark.parametrize("out", [io.StringIO, Terminal])
def test_a_failure_exits_with_2(out):
    job = JobFactory(waiting=True, attempt=1)
    AttemptFactory(job=job, exception="async_queue.exceptions.UnknownSealKey")

    code, _ = queue_health(out=out())

    assert code == 2


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("arguments", "is_known"),
    [
        ([], True),
        (["-a", "precise"], True),
        (["--algorithm", "rough"], False),
    ],
)
def test_only_the_rough_estimate_forgets_after_a_day(arguments, is_known):
    finished_at = now() - timedelta(days=2)
    started_at = finished_at - timedelta(seconds=8)
    JobFactory(successful=True, started_at=started_at, finished_at=finished_at)
    JobFactory(waiting=True)

    _, written = queue_health(*arguments)

    estimate = json.loads(written)["queue"]["estimated-completion"]
    assert (estimate is not None) is is_known


@pytest.mark.django_db
def test_an_unknown_estimate_is_called_so_on_a_terminal():
    JobFactory()

    _, written = queue_health(out=Terminal())

    assert "1 remaining (estimated time: unknown)" in written


def test_an_algorithm_that_does_not_exist_is_refused():
    with pytest.raises(CommandError, match="invalid choice: 'exact'"):
        call_command("queue_health", "-a", "exact")


@pytest.mark.django_db
def test_health_of_an_unreachable_database_is_unknown_and_exits_with_3():
    with unreachable_database():
        code, message = queue_health()

    assert code == 3
    assert message.startswith("the queue's health is unknown")


def test_live_does_not_touch_the_database():
    with unreachable_database():
        code, written = queue_health("--live")

    assert (code, written) == (0, "live\n")


@pytest.mark.django_db
def test_ready_exits_with_0_when_all_migrations_are_applied():
    assert queue_health("--ready") == (0, "ready\n")


@pytest.mark.django_db
def test_ready_exits_with_1_when_the_database_is_unreachable():
    with unreachable_database():
        code, message = queue_health("--ready")

    assert code == 1
    assert message.startswith("not ready")


@pytest.mark.django_db
def test_ready_exits_with_1_and_the_remedy_when_a_migration_is_missing():
    MigrationRecorder(connection).record_unapplied("async_queue", "0001_initial")

    code, message = queue_health("--ready")

    assert code == 1
    assert "async_queue.0001_initial" in message
    assert "manage.py migrate" in message


@pytest.mark.django_db
def test_ready_passes_on_a_database_of_a_newer_version():
    MigrationRecorder(connection).record_applied("async_queue", "9999_newer")

    assert queue_health("--ready") == (0, "ready\n")


def test_a_process_exits_with_the_code_and_a_plain_message():
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "DB": "postgres",
        "PGPORT": "1",
    }

    done = subprocess.run(
        [sys.executable, "-m", "django", "queue_health"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 3
    assert done.stderr.startswith("CommandError: the queue's health is unknown")
    assert "Traceback" not in done.stderr
