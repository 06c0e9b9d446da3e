"""Long jobs: what they hold meanwhile, and that it is told (40, 41, 44)."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from threading import Event
from typing import Any

import pytest
from django.db import Error, OperationalError, connection, connections, transaction

from async_queue import claims, schedule, schedule_many
from async_queue.db import vendor
from async_queue.models import Job, Status
from tests import hanging, jobs
from tests.factories import WorkerFactory
from tests.figures import figure
from tests.fleet import Stopwatch, let_pass
from tests.long import bound, long
from tests.models import Effect
from tests.stepping import elsewhere, execute_next, one_pass
from tests.workers import working

pytestmark = pytest.mark.django_db(transaction=True)
WaitUntil = Callable[..., None]
facts = vendor(connection)
has_server = pytest.mark.skipif(
    facts.runs_one_job_at_a_time, reason="a file has one writer at a time"
)
is_file = pytest.mark.skipif(
    not facts.runs_one_job_at_a_time, reason="others can write meanwhile"
)
# Whether a session keeps what others have changed from being cleaned up.
PINS = {
    "postgresql": "SELECT backend_xid IS NOT NULL OR backend_xmin IS NOT NULL"
    " FROM pg_stat_activity WHERE pid = %s",
    "mysql": "SELECT count(*) FROM information_schema.innodb_trx"
    " WHERE trx_mysql_thread_id = %s"
    " AND (trx_rows_locked > 0 OR trx_rows_modified > 0 OR trx_tables_locked > 0)",
}
NO_WAIT = {
    "postgresql": "SELECT id FROM async_queue_job WHERE id = %s FOR UPDATE NOWAIT",
    "mysql": "SELECT id FROM async_queue_job WHERE id = %s FOR UPDATE NOWAIT",
}
# What a careful migration does: it would rather fail than keep everybody waiting.
PATIENCE = {
    "postgresql": "SET lock_timeout = '1s'",
    "mysql": "SET SESSION lock_wait_timeout = 1",
}
ADD_COLUMN = "ALTER TABLE async_queue_job ADD COLUMN extra integer"
DROP_COLUMN = "ALTER TABLE async_queue_job DROP COLUMN extra"


def ask(sql: dict[str, str], *params: Any) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql[connection.vendor], params)
        row = cursor.fetchone()
    return row and row[0]


@contextmanager
def at_work(function: Callable[..., object], folder: Path) -> Iterator[Job]:
    """Run a job that has begun, until a file "go" is there, in another thread."""
    job = schedule(function, [str(folder)])
    running = elsewhere(execute_next)
    wait_for(folder / "begun", running)
    try:
        yield job
    finally:
        (folder / "go").touch()
        assert running.result(30).action == "succeed"


def wait_for(path: Path, running: Future[Any]) -> None:
    while not path.exists():
        assert not running.done()
        Event().wait(0.01)


# Faults 40 and 41.


@has_server
def test_job_that_has_not_written_yet_holds_nothing_that_others_need(
    tmp_path: Path,
) -> None:
    with at_work(hanging.wait_untouched, tmp_path) as job:
        session = int((tmp_path / "begun").read_text())
        with transaction.atomic():
            assert ask(NO_WAIT, job.pk) == job.pk

        # MariaDB tells what it has told before if it is asked again at once.
        let_pass(0.3)
        assert not ask(PINS, session)
    (tmp_path / "touched").mkdir()
    with at_work(hanging.wait_touched, tmp_path / "touched"):
        session = int((tmp_path / "touched" / "begun").read_text())

        let_pass(0.3)
        assert ask(PINS, session)


@has_server
def test_claims_are_as_fast_beside_a_long_job(tmp_path: Path) -> None:
    count = long(500, 30_000)
    run_and_measure(100)

    alone = run_and_measure(count)
    with at_work(hanging.wait_untouched, tmp_path):
        beside = run_and_measure(count)

    figure("40 claim alone, p99", alone * 1000, "ms")
    figure("40 claim beside a long job, p99", beside * 1000, "ms")
    figure("40 claims beside a long job, ratio", beside / alone)
    assert beside <= bound(1.2) * alone


def run_and_measure(count: int) -> float:
    """Claim and finish so many jobs; return how long all but a hundredth took."""
    schedule_many([("tests.jobs.take", [])] * count)
    worker, seconds = WorkerFactory().pk, []
    while Job.objects.due().exists():
        watch = Stopwatch()
        taken = claims.claim("default", worker, 10 if count < 1000 else 50)
        seconds.append(watch.seconds())
        Job.objects.filter(pk__in=[job.id for job in taken]).transition("succeed")
        if connection.vendor == "postgresql" and len(seconds) % 100 == 0:
            with connection.cursor() as cursor:
                cursor.execute("VACUUM async_queue_job")
    return quantiles(seconds, n=100)[-1]


@pytest.fixture
def migrating() -> Iterator[Callable[[], bool]]:
    """Add a column to the table of jobs, and tell whether that was possible."""

    def migrate() -> bool:
        with connections["default"].cursor() as cursor:
            cursor.execute(PATIENCE[connection.vendor])
            try:
                cursor.execute(ADD_COLUMN)
            except OperationalError:
                return False
            cursor.execute(DROP_COLUMN)
        return True

    yield migrate
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM async_queue_job WHERE id = 0")
        assert "extra" not in [column[0] for column in cursor.description]


@has_server
def test_table_is_altered_while_a_job_runs(
    migrating: Callable[[], bool], tmp_path: Path
) -> None:
    with at_work(hanging.wait_touched, tmp_path):
        watch = Stopwatch()
        assert elsewhere(migrating).result(30)
        figure("41 ALTER TABLE beside a job", watch.seconds())

    assert Effect.objects.count() == 1


@has_server
def test_table_that_a_job_holds_blocks_others_no_longer_than_the_migration_waits(
    migrating: Callable[[], bool], tmp_path: Path, wait_until: WaitUntil
) -> None:
    longest = 0.0
    with at_work(hanging.schedule_and_wait, tmp_path):
        altering = elsewhere(migrating)
        while not altering.done():
            watch = Stopwatch()
            schedule(jobs.leave, ["meanwhile"])
            longest = max(longest, watch.seconds())
        assert not altering.result(30)

    figure("41 schedule() beside an ALTER TABLE that waits, at most", longest)
    assert longest <= bound(1.3)
    assert Job.objects.filter(status=Status.READY).exists()


# Fault 44, and its like.


@pytest.mark.parametrize("is_atomic", [True, False])
def test_job_that_holds_a_transaction_for_long_is_told_once(
    is_atomic: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings: Any,
) -> None:
    monkeypatch.setattr(type(facts), "long_transaction", 0.3)
    settings.ASYNC_QUEUE = {"POLL_INTERVAL": 0.1}
    caplog.set_level(logging.WARNING, logger="async_queue")
    for label in ("first", "second"):
        schedule(jobs.take_time, [label, 1.0], meta={"atomic": is_atomic})

    one_pass(1).run()

    told = caplog.text.count("has held a transaction for")
    assert told == int(is_atomic)
    assert Effect.objects.count() == 2


@is_file
def test_long_job_on_sqlite_keeps_a_view_from_writing_and_says_so(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    schedule(hanging.wait_for_go, [str(tmp_path), "long"])

    with working(tmp_path, "--threads=2") as running:
        wait_until((tmp_path / "begun-long").exists)
        reading = Stopwatch()
        assert not Effect.objects.exists()
        figure("44 read beside a long job", reading.seconds())
        with pytest.raises(OperationalError, match="locked"):
            impatient(lambda: Effect.objects.create(label="web"))
        wait_until(lambda: "has held a transaction for" in running.said)
        (tmp_path / "go").touch()
        wait_until(lambda: Effect.objects.filter(label="long").exists())
        impatient(lambda: Effect.objects.create(label="web"))

    assert "tests.hanging.wait_for_go has held a transaction" in running.said
    assert "atomic=False" in running.said


@is_file
def test_long_job_on_sqlite_outside_of_transactions_keeps_nobody_from_writing(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    loose = {"atomic": False}
    schedule(hanging.wait_for_go, [str(tmp_path), "long"], meta=loose)
    errors, longest = 0, 0.0

    with working(tmp_path, "--threads=2") as running:
        wait_until((tmp_path / "begun-long").exists)
        for _ in range(long(50, 1000)):
            watch = Stopwatch()
            try:
                impatient(lambda: Effect.objects.create(label="web"))
            except Error:
                errors += 1
            longest = max(longest, watch.seconds())
        (tmp_path / "go").touch()
        wait_until(lambda: Job.objects.filter(status=Status.SUCCESSFUL).exists())

    figure("44 lock errors of a view beside a loose job", errors)
    figure("44 longest write of a view beside a loose job", longest)
    assert errors == 0
    assert "has held a transaction" not in running.said


def impatient(act: Callable[[], object]) -> None:
    """Do something as a view that waits for a tenth of a second."""
    with connection.cursor() as cursor:
        (timeout,) = cursor.execute("PRAGMA busy_timeout").fetchone()
        cursor.execute(f"PRAGMA busy_timeout = {long(1000, 100)}")
        try:
            act()
        finally:
            cursor.execute(f"PRAGMA busy_timeout = {timeout}")
