"""Jobs with atomic=False: at least once, in autocommit, with no transaction left."""

import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from django.db import connection

from async_queue import cancel, executor, hooks, schedule
from async_queue.db import vendor
from async_queue.models import Job, Status
from tests import hanging, jobs
from tests.fleet import let_pass
from tests.invariants import assert_nobody_works
from tests.models import Effect
from tests.stepping import (
    claim_next,
    elsewhere,
    exceptions_of,
    execute_next,
    flush,
    make_due,
)
from tests.workers import working

pytestmark = pytest.mark.django_db(transaction=True)
WaitUntil = Callable[..., None]
is_serial = vendor(connection).runs_one_job_at_a_time
has_sessions = pytest.mark.skipif(is_serial, reason="a file has no sessions to end")
LOOSE = {"atomic": False}


def labels() -> dict[str, int]:
    return Counter(Effect.objects.values_list("label", flat=True))


def has_succeeded(job: Job) -> bool:
    return Job.objects.filter(pk=job.pk, status=Status.SUCCESSFUL).exists()


def test_effects_are_seen_while_the_job_runs_and_keep_nobody_from_writing(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule(hanging.wait_for_go, [str(tmp_path)], meta=LOOSE)

    with working(tmp_path, "--threads=2"):
        wait_until((tmp_path / "begun-effect").exists)
        assert labels() == {"effect": 1}
        other = schedule(jobs.leave, ["other"])
        wait_until(lambda: has_succeeded(other))
        assert not has_succeeded(job)
        (tmp_path / "go").touch()
        wait_until(lambda: has_succeeded(job))

    assert labels() == {"effect": 1, "other": 1}


def test_job_whose_worker_is_killed_repeats_what_it_has_done(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule(hanging.leave_in_pieces, [str(tmp_path), "piece"], meta=LOOSE)

    with working(tmp_path) as doomed:
        wait_until((tmp_path / "piece-1").exists)
        doomed.kill()
    done = labels()
    with working(tmp_path):
        wait_until(lambda: has_succeeded(job))

    assert done["piece-0"] == done["piece-1"] == 1
    once_more = Counter({f"piece-{number}": 1 for number in range(3)})
    assert labels() == done + once_more
    job.refresh_from_db()
    assert (job.attempt, job.failures, job.crashes) == (2, 0, 0)


def test_job_that_is_told_to_stop_is_given_back_and_repeats_what_it_has_done(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule(hanging.wait_for_go, [str(tmp_path)], meta=LOOSE)

    with working(tmp_path, "--shutdown-timeout=0") as running:
        wait_until((tmp_path / "begun-effect").exists)
        code = running.end()
    job.refresh_from_db()
    assert code == 0, running.said
    assert (job.status, job.failures) == (Status.READY, 0)
    assert_nobody_works()

    (tmp_path / "go").touch()
    assert execute_next().action == "succeed"
    assert labels() == {"effect": 2}


def test_job_that_raises_keeps_what_it_has_done_and_is_tried_again() -> None:
    job = schedule(jobs.leave_then_fail, meta=LOOSE | {"max_attempts": 2})

    first = execute_next()
    make_due(job)
    flush()

    job.refresh_from_db()
    assert (first.action, job.status) == ("retry", Status.FAILED)
    assert exceptions_of(job) == ["ValueError", "ValueError"]
    assert labels() == {"effect": 2}


def test_transaction_that_a_job_leaves_open_is_rolled_back_and_told(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    job = schedule(hanging.leave_open_transaction, ["open"], meta=LOOSE)

    with working(tmp_path, "--threads=1") as running:
        wait_until(lambda: has_succeeded(job))
        after = schedule(jobs.leave, ["after"])
        wait_until(lambda: has_succeeded(after))

    assert f"job {job.pk} left a transaction open" in running.said
    assert labels() == {"after": 1}


@has_sessions
def test_job_that_loses_its_session_and_goes_on_has_succeeded() -> None:
    lost = {"goes_on": True}
    job = schedule(hanging.leave_then_lose_session, ["effect"], lost, meta=LOOSE)

    assert elsewhere(execute_next).result(20).action == "succeed"

    job.refresh_from_db()
    assert (job.status, job.failures) == (Status.SUCCESSFUL, 0)
    assert labels() == {"effect": 1}


@has_sessions
def test_job_that_fails_for_its_lost_session_is_put_off_uncharged() -> None:
    lost = {"goes_on": False}
    job = schedule(hanging.leave_then_lose_session, ["effect"], lost, meta=LOOSE)

    assert elsewhere(execute_next).result(20).action == "snooze"

    job.refresh_from_db()
    assert (job.status, job.failures) == (Status.WAITING, 0)
    assert labels() == {"effect": 1}


def test_worker_that_stalls_cannot_record_what_another_has_taken_over(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    """Stopped for longer than STALL_AFTER, on a server: another worker takes over."""
    if is_serial:
        pytest.skip("a worker that stands still is alive there: its lock tells")
    job = schedule(hanging.wait_for_go, [str(tmp_path)], meta=LOOSE)
    begun, impatient = (
        tmp_path / "begun-effect",
        {"STALL_AFTER": 2, "POLL_INTERVAL": 0.5},
    )

    with working(tmp_path, "--threads=1", settings=impatient) as stalled:
        wait_until(begun.exists)
        begun.unlink()
        stalled.send(signal.SIGSTOP)
        with working(tmp_path, "--threads=1", settings=impatient):
            wait_until(begun.exists, 40)
            token = begun.read_text().split()[1:]
            stalled.send(signal.SIGCONT)
            let_pass(1)
            (tmp_path / "go").touch()
            wait_until(lambda: has_succeeded(job))

    job.refresh_from_db()
    assert token == [str(job.pk), "2"]
    assert (job.attempt, job.failures) == (2, 0)
    assert labels() == {"effect": 2}


def test_outcome_of_a_job_that_was_cancelled_is_not_recorded() -> None:
    job = schedule(jobs.leave, meta=LOOSE)
    running = claim_next()

    with hooks.at("after_call", lambda: elsewhere(cancel, job).result(20)):
        outcome = executor.execute(running)

    job.refresh_from_db()
    assert outcome.action == "lose"
    assert job.status == Status.CANCELLED
    assert labels() == {"effect": 1}
