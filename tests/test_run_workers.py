import json
import logging
import os
import re
import signal
import socket
from contextlib import contextmanager
from http.client import HTTPConnection
from io import StringIO
from pathlib import Path
from threading import Thread

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder

from async_queue.db import vendor
from async_queue.models import Job, Worker
from tests.factories import JobFactory
from tests.jobs import leave_then_await
from tests.models import Effect
from tests.process import finished, started

pytestmark = pytest.mark.django_db(transaction=True)

Migration = MigrationRecorder.Migration
TERM, KILL = signal.SIGTERM, signal.SIGKILL


class Told:
    """What a process writes to its standard error, as it comes."""

    def __init__(self, process):
        self.process = process
        self.lines = []
        self._thread = Thread(target=self._read)
        self._thread.start()

    def _read(self):
        self.lines.extend(line.rstrip("\n") for line in self.process.stderr)

    def has(self, text):
        return any(text in line for line in self.lines)

    def end(self, *signals):
        """Send the signals, each once the one before has been heard; wait."""
        for number in signals:
            self.process.send_signal(number)
            while len(signals) > 1 and not self.has("the next signal ends it"):
                self._thread.join(0.01)
        code = self.process.wait(30)
        # Its processes have its standard error, so this is their end, too.
        self._thread.join(30)
        assert not self._thread.is_alive()
        return code

    def pids(self):
        """Return the numbers of the processes that have introduced themselves."""
        found = [re.search(r"\(pid (\d+)\) serves ", line) for line in self.lines]
        return [int(match[1]) for match in found if match]

    def stands(self, place):
        """Whether one of its threads has been seen there."""
        self.process.send_signal(signal.SIGQUIT)
        return self.has(place)


@contextmanager
def serving(*arguments, **options):
    with started("run_workers", *arguments, **options) as process:
        told = Told(process)
        try:
            yield told
        finally:
            process.kill()
            told.end()


def called(*arguments, **options):
    """Run the command here; return what it wrote, and its error."""
    stdout, stderr, error = StringIO(), StringIO(), None
    try:
        call_command("run_workers", *arguments, stdout=stdout, stderr=stderr, **options)
    except CommandError as raised:
        error = raised
    return stdout.getvalue(), stderr.getvalue(), error


def statuses():
    return list(Job.objects.order_by("id").values_list("status", flat=True))


def effects():
    return sorted(Effect.objects.values_list("label", flat=True))


def await_file(path):
    Path(f"{path}-begun").touch()
    leave_then_await(path)


class WaitingJob:
    """A job that waits until the test lets it go on."""

    def __init__(self, folder):
        self._path = folder / "go"
        args = json.dumps([str(self._path)])
        JobFactory(function="tests.test_run_workers.await_file", args=args)

    def has_begun(self):
        return Path(f"{self._path}-begun").exists()

    def go_on(self):
        self._path.touch()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def ask(port, path):
    client = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        client.request("GET", path)
        return client.getresponse().status
    except ConnectionRefusedError:
        return None
    finally:
        client.close()


def test_burst_runs_what_is_due_and_ends():
    JobFactory.create_batch(3)
    bad = JobFactory(function="tests.jobs.leave_then_fail")
    JobFactory(waiting=True)

    ended = finished("run_workers", "--burst", "--threads=2")

    assert (ended.returncode, ended.stdout) == (0, "")
    assert statuses() == ["SUCCESSFUL"] * 3 + ["WAITING"] * 2
    assert " succeeded in " not in ended.stderr
    assert f" WARNING job {bad.pk} tests.jobs.leave_then_fail raised " in ended.stderr
    assert not Worker.objects.exists()


def test_burst_of_several_processes():
    JobFactory.create_batch(4)

    ended = finished("run_workers", "--burst", "--processes=2")

    assert ended.returncode == 0, ended.stderr
    assert statuses() == ["SUCCESSFUL"] * 4


def test_queues_choose_the_jobs():
    for queue in ("a", "b1", "b2", "c"):
        JobFactory(queue=queue)

    called("--burst", "--queues=a,b*", "--queues=-b2")

    assert statuses() == ["SUCCESSFUL", "SUCCESSFUL", "READY", "READY"]


def test_one_process_ends_after_so_many_jobs():
    JobFactory.create_batch(3)

    assert called("--max-jobs=2", "--threads=1")[2] is None
    assert statuses() == ["SUCCESSFUL", "SUCCESSFUL", "READY"]


def test_several_processes_are_replaced_after_so_many_jobs():
    JobFactory.create_batch(5)

    ended = finished("run_workers", "--burst", "--processes=2", "--max-jobs=1")

    assert ended.returncode == 0
    assert statuses() == ["SUCCESSFUL"] * 5
    assert "has run as many jobs as it may; another takes its place" in ended.stderr


hoarded = []


def hoard():
    hoarded.append(b"x" * 2**28)


def test_process_ends_once_it_uses_so_much_memory():
    JobFactory.create_batch(2, function="tests.test_run_workers.hoard")

    ended = finished("run_workers", "--max-memory=200M", "--threads=1")

    assert ended.returncode == 0, ended.stderr
    assert statuses() == ["SUCCESSFUL", "READY"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads=0"], "--threads is 0: it must be at least 1"),
        (["--processes=0"], "--processes is 0: it must be at least 1"),
        (["--max-jobs=-1"], "--max-jobs is -1: it must be at least 1"),
        (["--max-memory=many"], "--max-memory is 'many': it must be such as 512M"),
        (["--max-memory=1M"], "M before its first job"),
        (["--queues=a,,b"], "--queues is 'a,,b': a name is empty"),
        (["--database=other"], "--database is 'other': the databases are default"),
        (["--shutdown-timeout=soon"], "--shutdown-timeout is 'soon': it must be"),
        (["--health-port=http"], "--health-port is 'http': it must be such as 8001"),
        (["--health-port=65536"], "--health-port is '65536': it must be such as"),
        (["--heartbeat-file=/no/where"], "--heartbeat-file is '/no/where': "),
        (["--heartbeat-file="], "--heartbeat-file is '': "),
        (["--thread=x"], "invalid int value: 'x'"),
    ],
)
def test_wrong_values_are_named_before_anything_runs(arguments, message):
    JobFactory()

    error = called("--burst", *arguments)[2]

    assert message in str(error)
    assert statuses() == ["READY"]


def test_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        error = called("--burst", f"--health-port={port}")[2]

    assert f"--health-port is '{port}': " in str(error)


def test_wrong_settings_are_a_plain_error(settings):
    settings.ASYNC_QUEUE = {"PROCESES": 3}

    assert "Did you mean 'PROCESSES'?" in str(called("--burst")[2])


def test_several_processes_need_a_settings_module(monkeypatch):
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE")

    assert "set DJANGO_SETTINGS_MODULE" in str(called("--processes=2")[2])


@pytest.mark.parametrize("arguments", [[], ["--processes=2"], ["--reload"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_what_runs_finish(arguments, number, tmp_path, wait_until):
    job = WaitingJob(tmp_path)

    with serving(*arguments) as told:
        wait_until(job.has_begun)
        told.process.send_signal(number)
        wait_until(lambda: told.has("the next signal ends it"))
        job.go_on()
        code = told.end()

    assert code == 0, told.lines
    assert statuses() == ["SUCCESSFUL"]
    assert effects() == ["effect"]
    assert not Worker.objects.exists()


def test_what_does_not_finish_in_time_is_given_back(tmp_path, wait_until):
    job = WaitingJob(tmp_path)

    with serving("--shutdown-timeout=0") as told:
        wait_until(job.has_begun)
        code = told.end(TERM)

    assert code == 0, told.lines
    (row,) = Job.objects.all()
    assert (row.status, row.failures, row.crashes) == ("READY", 0, 0)
    assert effects() == []


@pytest.mark.parametrize("arguments", [[], ["--processes=2"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_it_at_once(arguments, number, tmp_path, wait_until):
    job = WaitingJob(tmp_path)

    with serving(*arguments) as told:
        wait_until(job.has_begun)
        code = told.end(number, number)

    assert code == 128 + number, told.lines
    assert effects() == []


def test_signal_to_the_whole_group_is_one_signal(tmp_path, wait_until):
    """As systemd sends it: to the supervisor and to each of its processes."""
    with serving("--processes=2") as told:
        wait_until(lambda: len(told.pids()) == 2)
        job = WaitingJob(tmp_path)
        wait_until(job.has_begun)
        for pid in [told.process.pid, *told.pids()]:
            os.kill(pid, TERM)
        wait_until(lambda: told.has("the next signal ends it"))
        job.go_on()
        code = told.end()

    assert code == 0, told.lines
    assert effects() == ["effect"]


def test_killed_process_is_replaced_and_its_job_runs_again(tmp_path, wait_until):
    with serving("--processes=2") as told:
        wait_until(lambda: len(told.pids()) == 2)
        job = WaitingJob(tmp_path)
        wait_until(job.has_begun)
        os.kill(Job.objects.get().worker.pid, KILL)
        wait_until(lambda: told.has("was killed by SIGKILL"))
        job.go_on()
        wait_until(lambda: statuses() == ["SUCCESSFUL"])
        wait_until(lambda: len(set(told.pids())) == 3)
        code = told.end(TERM)

    assert code == 0, told.lines
    assert effects() == ["effect"]


def test_processes_of_a_killed_supervisor_stop(tmp_path, wait_until):
    with serving("--processes=2") as told:
        wait_until(lambda: len(told.pids()) == 2)
        job = WaitingJob(tmp_path)
        wait_until(job.has_begun)
        told.process.kill()
        job.go_on()
        wait_until(lambda: not Worker.objects.filter(dead_at=None).exists())

    assert statuses() == ["SUCCESSFUL"]


@pytest.mark.parametrize(
    ("arguments", "number", "code"),
    [([], TERM, 0), (["--processes=2"], KILL, -KILL)],
)
def test_worker_that_waits_for_a_lock_ends_in_time(
    arguments, number, code, wait_until, second_connection
):
    """On SQLite it would wait to write for ever, even if its supervisor had died."""
    facts = vendor(connection)
    if not facts.runs_one_job_at_a_time:
        pytest.skip("nobody waits for another's transaction here")
    port = free_port()
    arguments = [*arguments, "--shutdown-timeout=0", f"--health-port={port}"]

    with facts.turn(second_connection), serving(*arguments) as told:
        wait_until(lambda: ask(port, "/live") == 200)
        assert told.end(number) == code

    assert not Worker.objects.exists()


def test_idle_worker_introduces_itself_and_is_silent(tmp_path, wait_until):
    path = tmp_path / "heart"
    arguments = ["--queues=mail", "--threads=1", f"--heartbeat-file={path}"]

    with serving(*arguments) as told:
        wait_until(lambda: told.lines)
        since = path.stat().st_mtime
        wait_until(lambda: path.stat().st_mtime > since + 1.5)
        number = Worker.objects.get().pk
        told.end(TERM)

    first, second = told.lines
    assert f"worker {number} (pid {told.process.pid}) serves the queues mail" in first
    assert first.endswith("with 1 thread on the database default")
    assert second.startswith("SIGTERM: ")


@pytest.mark.parametrize(
    ("verbosity", "expected"), [(0, [0, 0, 0]), (1, [1, 0, 0]), (2, [1, 2, 1])]
)
def test_verbosity_chooses_the_lines(verbosity, expected):
    JobFactory()
    JobFactory(function="tests.jobs.leave_then_snooze", args="[60]")

    ended = finished("run_workers", "--burst", f"-v{verbosity}")

    words = (" was put off ", " begins", " succeeded in ")
    assert [ended.stderr.count(word) for word in words] == expected


def test_log_goes_where_the_project_sends_it(caplog):
    """Here to pytest."""
    caplog.set_level(logging.DEBUG, "async_queue")
    JobFactory()

    said = called("--burst")

    assert said == ("", "", None)
    assert "succeeded in" in caplog.text


@pytest.mark.skipif(not hasattr(signal, "SIGQUIT"), reason="the system has none")
def test_sigquit_shows_where_all_threads_stand(wait_until):
    with serving() as told:
        wait_until(lambda: told.lines)
        wait_until(lambda: told.stands("keeper.py"))
        code = told.end(TERM)

    assert told.has("worker.py")
    assert code == 0


@pytest.mark.parametrize("arguments", [[], ["--processes=2"]])
def test_probes_tell_that_it_is_ready(arguments, tmp_path, wait_until):
    port, path = free_port(), tmp_path / "heart"
    arguments = [*arguments, f"--health-port={port}", f"--heartbeat-file={path}"]

    with serving(*arguments) as told:
        wait_until(lambda: ask(port, "/live") == 200)
        wait_until(lambda: ask(port, "/ready") == 200)
        wait_until(lambda: path.read_text() == "ready")
        code = told.end(TERM)

    assert code == 0, told.lines
    assert not path.exists()


@pytest.fixture
def unmigrated():
    """Make the database forget that the queue's migrations are applied."""
    executed = Migration.objects.filter(app="async_queue")
    rows = list(executed)
    executed.delete()
    yield
    Migration.objects.bulk_create(rows, ignore_conflicts=True)


def test_missing_migrations_are_waited_for(unmigrated, wait_until):
    JobFactory()

    with serving("--burst") as told:
        wait_until(lambda: told.has("run manage.py migrate; waiting for up to 60 s"))
        Migration.objects.create(app="async_queue", name="0001_initial")
        code = told.end()

    assert code == 0
    assert statuses() == ["SUCCESSFUL"]


def test_migrations_that_stay_away_are_an_error(unmigrated, monkeypatch):
    monkeypatch.setattr("async_queue.management.serving.PATIENCE", 0.0)

    error = called("--burst")[2]

    assert "lacks 1 migrations, the first is async_queue.0001_initial: run" in str(
        error
    )
    assert error.returncode == 1


@pytest.mark.parametrize("arguments", [[], ["--processes=2"]])
def test_signal_ends_the_wait_for_migrations(unmigrated, arguments, wait_until):
    with serving(*arguments) as told:
        wait_until(lambda: told.has("waiting for up to 60 s"))
        code = told.end(TERM)

    assert code == 0


@pytest.mark.skipif(connection.vendor == "sqlite", reason="a file is always there")
def test_server_that_does_not_answer_is_a_plain_error(monkeypatch):
    monkeypatch.setattr("async_queue.management.serving.PATIENCE", 0.0)
    connection.close()

    with monkeypatch.context() as patch:
        patch.setitem(connection.settings_dict, "PORT", "1")
        error = called("--burst")[2]

    assert "the database default does not answer: " in str(error)


CHANGING = """
from pathlib import Path
from tests.jobs import leave, leave_then_await

def work(path):
    Path(path + "-begun").touch()
    leave_then_await(path, {label!r})
"""


@pytest.mark.parametrize("arguments", [[], ["--processes=2"]])
def test_change_of_code_is_loaded_once_what_runs_has_finished(
    arguments, tmp_path, wait_until
):
    module, go = tmp_path / "changing.py", tmp_path / "go"
    module.write_text(CHANGING.format(label="old"))
    job = {"function": "changing.work", "args": json.dumps([str(go)])}
    JobFactory(**job)

    environment = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    with serving("--reload", *arguments, environment=environment) as told:
        wait_until((tmp_path / "go-begun").exists)
        module.write_text(CHANGING.format(label="new"))
        wait_until(lambda: is_noticed(module, told))
        assert statuses() == ["RUNNING"]
        go.touch()
        wait_until(lambda: statuses() == ["SUCCESSFUL"])
        wait_until(lambda: told.has("another takes its place"))
        JobFactory(**job)
        wait_until(lambda: statuses() == ["SUCCESSFUL"] * 2)
        code = told.end(TERM)

    assert code == 0, told.lines
    assert effects() == ["new", "old"]
    assert set(Job.objects.values_list("attempt", "failures")) == {(1, 0)}


def is_noticed(module, told):
    """Make the file younger still: whoever watches may not have seen the first."""
    moment = module.stat().st_mtime + 1
    os.utime(module, (moment, moment))
    return told.has("code has changed")
