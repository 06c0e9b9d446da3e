"""One run of a job: what it raises or returns, what is recorded and announced."""

import logging
import re
from collections.abc import Iterator
from datetime import timedelta
from threading import current_thread, main_thread
from typing import Any

import pytest
from django.db import DataError, connection, transaction
from django.db.backends.signals import connection_created
from django.http import HttpResponse
from django.test import Client, override_settings
from django.urls import path

from async_queue import callables, fence, hooks, intake, schedule, schedule_many
from async_queue.db import libpq, vendor
from async_queue.exceptions import ClaimLost, InsideTransaction, NotExecutable
from async_queue.models import Attempt, Job, Status
from async_queue.signals import job_finished, job_started
from tests import jobs, misbehaving
from tests.factories import AttemptFactory, JobFactory, now
from tests.models import Effect
from tests.stepping import (
    database_settings,
    exceptions_of,
    execute_next,
    flush,
    make_due,
)

pytestmark = pytest.mark.django_db(transaction=True)

has_sessions = pytest.mark.skipif(
    not connection.settings_dict.get("HOST"),
    reason="there is no session that somebody could end",
)
claims_in_one_statement = pytest.mark.skipif(
    not vendor(connection).claims_in_one_statement,
    reason="this database's claim needs a SELECT",
)


def wait_of(job: Job) -> timedelta:
    """Return how long the job, as it is in the database, has to wait."""
    job.refresh_from_db()
    return job.run_after - now()


def is_about(wait: timedelta, seconds: float) -> bool:
    return seconds - 10 < wait.total_seconds() <= seconds


def test_success_is_recorded_with_its_result() -> None:
    job = schedule(jobs.add, [2, 3])

    outcome = execute_next()

    job.refresh_from_db()
    assert outcome.action == "succeed"
    assert (job.status, job.return_value) == (Status.SUCCESSFUL, 5)
    assert (job.attempt, job.failures, job.worker_id) == (1, 0, None)
    assert job.started_at <= job.finished_at
    assert exceptions_of(job) == []


def test_failure_is_recorded_and_leaves_no_effect() -> None:
    job = schedule(jobs.leave_then_fail)

    outcome = execute_next()

    job.refresh_from_db()
    attempt = job.attempts.get()
    assert outcome.action == "retry"
    assert (job.status, job.attempt, job.failures) == (Status.WAITING, 1, 1)
    assert job.run_after > now()
    assert (attempt.number, attempt.message) == (1, "as intended")
    assert "leave_then_fail" in attempt.traceback
    assert attempt.started_at <= attempt.finished_at
    assert not Effect.objects.exists()


def test_async_function_runs_in_the_transaction() -> None:
    job = schedule(jobs.leave_asynchronously, ["soon"])

    outcome = execute_next()

    job.refresh_from_db()
    assert outcome.action == "succeed"
    assert job.return_value == "soon"
    assert Effect.objects.count() == 1


def test_retry_with_a_delay_waits_for_it_and_is_charged() -> None:
    job = schedule(jobs.leave_then_retry, [600])

    execute_next()

    assert is_about(wait_of(job), 600)
    assert (job.status, job.failures) == (Status.WAITING, 1)
    assert exceptions_of(job) == ["Retry"]
    assert not Effect.objects.exists()


def test_retry_without_a_delay_waits_for_the_backoff() -> None:
    job = schedule(jobs.leave_then_retry, meta={"backoff": "constant"})

    execute_next()

    assert is_about(wait_of(job), 60)
    assert job.failures == 1


def test_retry_at_the_last_attempt_fails() -> None:
    job = schedule(jobs.leave_then_retry, meta={"max_attempts": 1})

    execute_next()

    job.refresh_from_db()
    assert (job.status, job.failures) == (Status.FAILED, 1)


@pytest.mark.parametrize("delay", [1e11, -600])
def test_retry_with_an_odd_delay_is_recorded(delay: float) -> None:
    job = schedule(jobs.leave_then_retry, [delay])

    outcome = execute_next()

    job.refresh_from_db()
    assert outcome.action == "retry"
    assert (job.status, job.failures) == (Status.WAITING, 1)


def test_snooze_waits_and_is_not_charged() -> None:
    job = schedule(jobs.leave_then_snooze, [600], meta={"max_attempts": 1})

    outcome = execute_next()

    assert outcome.action == "snooze"
    assert is_about(wait_of(job), 600)
    assert (job.status, job.failures) == (Status.WAITING, 0)
    assert exceptions_of(job) == []
    assert not Effect.objects.exists()


def test_cancel_cancels_and_keeps_the_reason() -> None:
    job = schedule(jobs.leave_then_cancel)

    outcome = execute_next()

    job.refresh_from_db()
    assert outcome.action == "cancel"
    assert (job.status, job.failures) == (Status.CANCELLED, 0)
    assert job.finished_at is not None
    assert job.attempts.get().message == "not needed"
    assert not Effect.objects.exists()


@pytest.mark.parametrize(
    ("function", "exception"),
    [
        (jobs.leave_then_exit, "SystemExit"),
        (misbehaving.leave_then_interrupt, "KeyboardInterrupt"),
        (misbehaving.leave_then_exit_generator, "GeneratorExit"),
        (misbehaving.raise_unspeakable, "Unspeakable"),
        (misbehaving.raise_with_huge_traceback, "RuntimeError"),
    ],
)
def test_whatever_a_job_raises_is_recorded_and_ends_no_thread(
    function: Any, exception: str
) -> None:
    job = schedule(function)
    after = schedule(jobs.leave, priority=-1)

    made = flush(1)

    job.refresh_from_db()
    after.refresh_from_db()
    assert made.outcomes == {"retry": 1, "succeed": 1}
    assert (job.status, job.failures) == (Status.WAITING, 1)
    assert exceptions_of(job) == [exception]
    assert len(job.attempts.get().traceback.encode()) <= 64 * 1024
    assert after.status == Status.SUCCESSFUL
    assert Effect.objects.count() == 1


@pytest.mark.parametrize(
    ("function", "action", "failures"),
    [
        (misbehaving.leave_then_raise_bare_retry, "retry", 1),
        (misbehaving.leave_then_raise_bare_snooze, "snooze", 0),
    ],
)
def test_verdict_that_was_not_initialised_is_taken_as_it_was_meant(
    function: Any, action: str, failures: int
) -> None:
    job = schedule(function, priority=1)
    schedule(jobs.leave)

    made = flush(1)

    job.refresh_from_db()
    assert made.outcomes == {action: 1, "succeed": 1}
    # What was put off for no time at all may be due again already.
    assert job.status in (Status.WAITING, Status.READY)
    assert job.failures == failures
    assert Effect.objects.count() == 1


def _encode(text: str) -> None:
    text.encode("ascii")


def _refuse_data(text: str) -> None:
    if not text.isascii():
        raise DataError("as intended")


@pytest.mark.parametrize("take", [_encode, _refuse_data], ids=["driver", "server"])
def test_error_in_letters_that_the_database_lacks_is_recorded_in_ascii(
    take: Any,
) -> None:
    job = schedule(misbehaving.raise_in_other_letters)

    def take_ascii(execute: Any, sql: str, params: Any, *rest: Any) -> Any:
        for text in params or ():
            take(str(text))
        return execute(sql, params, *rest)

    with connection.execute_wrapper(take_ascii):
        outcome = execute_next()

    job.refresh_from_db()
    assert outcome.action == "retry"
    assert (job.status, job.failures) == (Status.WAITING, 1)
    assert job.attempts.get().message == r"f\xfcnf \u2603"


@pytest.mark.parametrize(
    "function",
    [misbehaving.leave_then_return_model, misbehaving.leave_then_return_too_much],
)
def test_result_that_cannot_be_stored_undoes_the_effects(function: Any) -> None:
    job = schedule(function)

    outcome = execute_next()

    assert outcome.action == "retry"
    assert exceptions_of(job) == ["InvalidArguments"]
    assert "the return value" in job.attempts.get().message
    assert not Effect.objects.exists()


def test_last_attempt_fails_for_good() -> None:
    job = schedule(jobs.leave_then_fail, meta={"max_attempts": 3})

    for _ in range(3):
        make_due(job)
        flush()

    job.refresh_from_db()
    assert (job.status, job.attempt, job.failures) == (Status.FAILED, 3, 3)
    assert exceptions_of(job) == ["ValueError"] * 3
    assert flush().outcomes == {}


def test_error_to_be_discarded_cancels() -> None:
    job = schedule(jobs.leave_then_fail, meta={"discard_on": [ValueError]})

    execute_next()

    job.refresh_from_db()
    assert (job.status, job.failures) == (Status.CANCELLED, 0)
    assert exceptions_of(job) == ["ValueError"]


@pytest.mark.parametrize(
    ("retry_on", "status"),
    [
        (["ValueError"], Status.WAITING),
        (["builtins.ValueError"], Status.WAITING),
        (["Exception"], Status.WAITING),
        (["KeyError"], Status.FAILED),
    ],
)
def test_only_errors_to_be_retried_are(retry_on: Any, status: str) -> None:
    job = schedule(jobs.leave_then_fail, meta={"retry_on": retry_on})

    execute_next()

    job.refresh_from_db()
    assert job.status == status


@pytest.mark.parametrize(
    ("age", "status"), [(50, Status.SUCCESSFUL), (70, Status.CANCELLED)]
)
def test_job_that_was_not_started_in_time_is_cancelled(age: int, status: str) -> None:
    job = JobFactory(
        meta='{"expires_after":{"$timedelta":60000000}}',
        run_after=now() - timedelta(seconds=age),
    )

    execute_next()

    job.refresh_from_db()
    assert job.status == status
    assert Effect.objects.exists() == (status == Status.SUCCESSFUL)


@pytest.mark.parametrize(
    "backoff",
    [
        misbehaving.broken_backoff,
        misbehaving.backoff_of_no_duration,
        misbehaving.backoff_without_end,
    ],
)
def test_backoff_that_is_broken_does_not_harm_its_job(backoff: Any) -> None:
    job = schedule(jobs.leave_then_fail, meta={"backoff": backoff})

    outcome = execute_next()

    job.refresh_from_db()
    assert outcome.action == "retry"
    assert (job.status, job.failures) == (Status.WAITING, 1)
    assert exceptions_of(job) == ["ValueError"]


def test_ancestors_backoff_lets_the_job_fall_behind() -> None:
    job = schedule(jobs.leave_then_fail, meta={"backoff": "ancestor"}, priority=5)

    execute_next()

    assert is_about(wait_of(job), 60)
    assert job.priority == 4


def test_ancestors_backoff_stops_at_the_lowest_priority() -> None:
    job = schedule(jobs.leave_then_fail, meta={"backoff": "ancestor"}, priority=-100)

    execute_next()

    job.refresh_from_db()
    assert job.priority == -100


@pytest.fixture
def _unavailable() -> Iterator[None]:
    yield
    callables.resolve.cache_clear()


@pytest.mark.usefixtures("_unavailable")
def test_unavailable_function_waits_uncharged_until_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = JobFactory(function="tests.misbehaving.to_come", meta='{"max_attempts":1}')

    first = execute_next()
    assert is_about(wait_of(job), 5)
    monkeypatch.setattr(misbehaving, "to_come", jobs.leave, raising=False)
    make_due(job)
    flush()

    job.refresh_from_db()
    assert first.action == "snooze"
    assert (job.status, job.failures) == (Status.SUCCESSFUL, 0)
    assert exceptions_of(job) == ["FunctionUnavailable"]


def test_unknown_key_waits_uncharged_until_it_is_known() -> None:
    with override_settings(SECRET_KEY="of newer code"):
        job = JobFactory()

    first = execute_next()
    make_due(job)
    with override_settings(SECRET_KEY_FALLBACKS=["of newer code"]):
        flush()

    job.refresh_from_db()
    assert first.action == "snooze"
    assert (job.status, job.failures) == (Status.SUCCESSFUL, 0)
    assert exceptions_of(job) == ["UnknownSealKey"]


@pytest.mark.parametrize(
    ("hours", "status"), [(23, Status.WAITING), (25, Status.FAILED)]
)
@pytest.mark.parametrize("exception", ["FunctionUnavailable", "UnknownSealKey"])
def test_job_that_nobody_can_run_fails_after_a_day(
    exception: str, hours: int, status: str
) -> None:
    with override_settings(SECRET_KEY="of newer code"):
        unknown = JobFactory()
    unavailable = JobFactory(function="tests.misbehaving.never")
    job = unknown if exception == "UnknownSealKey" else unavailable
    AttemptFactory(
        job=job,
        exception=f"async_queue.exceptions.{exception}",
        finished_at=now() - timedelta(hours=hours),
    )

    flush()

    job.refresh_from_db()
    assert job.status == status


def test_tampered_row_fails_at_once() -> None:
    job = schedule(jobs.leave, ["mine"])
    Job.objects.update(args='["theirs"]')

    outcome = execute_next()

    job.refresh_from_db()
    assert outcome.action == "fail"
    assert job.status == Status.FAILED
    assert exceptions_of(job) == ["SealBroken"]


@pytest.fixture
def announced() -> Iterator[list[Any]]:
    heard: list[Any] = []

    def start(*, job: Any, **kwargs: Any) -> None:
        heard.append((job.id, connection.in_atomic_block))

    def finish(*, job: Any, outcome: Any, seconds: float, **kwargs: Any) -> None:
        status = Job.objects.get(pk=job.id).status
        heard.append((job.id, outcome.action, status, connection.in_atomic_block))
        assert seconds >= 0

    job_started.connect(start)
    job_finished.connect(finish)
    yield heard
    job_started.disconnect(start)
    job_finished.disconnect(finish)


def test_start_and_end_are_announced_outside_of_the_transaction(
    announced: list[Any],
) -> None:
    good = schedule(jobs.leave).pk
    bad = schedule(jobs.leave_then_fail).pk

    execute_next()
    execute_next()

    assert announced == [
        (good, False),
        (good, "succeed", Status.SUCCESSFUL, False),
        (bad, False),
        (bad, "retry", Status.WAITING, False),
    ]


def test_receivers_that_raise_change_nothing() -> None:
    def fail(**kwargs: Any) -> None:
        raise ValueError("of a receiver")

    job = schedule(jobs.leave)
    job_started.connect(fail)
    job_finished.connect(fail)

    try:
        outcome = execute_next()
    finally:
        job_started.disconnect(fail)
        job_finished.disconnect(fail)

    job.refresh_from_db()
    assert outcome.action == "succeed"
    assert job.status == Status.SUCCESSFUL
    assert Effect.objects.count() == 1


@pytest.mark.parametrize("function", [jobs.add, jobs.leave_then_fail])
def test_log_that_cannot_be_written_changes_nothing(
    function: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise KeyError("request_id")

    seen = []

    def note(outcome: Any, **kwargs: Any) -> None:
        seen.append(outcome.action)

    schedule(function, [1, 2] if function is jobs.add else [])
    log = logging.getLogger("async_queue")
    caplog.set_level(logging.DEBUG, "async_queue")
    log.addFilter(refuse)
    job_finished.connect(note)
    try:
        outcome = execute_next()
    finally:
        job_finished.disconnect(note)
        log.removeFilter(refuse)

    assert [outcome.action] == seen
    assert outcome.action in ("succeed", "retry")


@has_sessions
def test_session_ended_before_the_fence_again_and_again_puts_the_job_off() -> None:
    job = schedule(jobs.leave)

    with hooks.at("before_fence", misbehaving.end_own_session):
        outcome = execute_next()

    job.refresh_from_db()
    assert outcome.action == "snooze"
    assert (job.status, job.failures) == (Status.WAITING, 0)
    assert not Effect.objects.exists()
    make_due(job)
    assert flush().outcomes == {"succeed": 1}
    assert Effect.objects.count() == 1


@has_sessions
def test_outcome_is_recorded_once_the_database_is_back() -> None:
    misbehaving.called.clear()
    backoff = misbehaving.end_session_the_first_time
    job = schedule(jobs.leave_then_fail, meta={"backoff": backoff})

    outcome = execute_next()

    job.refresh_from_db()
    assert misbehaving.called == ["ended"]
    assert outcome.action == "retry"
    assert (job.status, job.failures) == (Status.WAITING, 1)
    assert exceptions_of(job) == ["ValueError"]


def test_execute_by_hand_returns_what_the_function_returns() -> None:
    job = schedule(jobs.add, [2, 3])

    assert job.execute() == 5

    assert (job.status, job.attempt, job.return_value) == (Status.SUCCESSFUL, 1, 5)
    assert Job.objects.count() == 1
    assert flush().outcomes == {}


def test_execute_by_hand_does_not_wait_for_the_moment() -> None:
    job = JobFactory(waiting=True)

    job.execute()

    assert job.status == Status.SUCCESSFUL
    assert Effect.objects.count() == 1


def test_execute_by_hand_records_and_raises_what_the_function_raises() -> None:
    job = schedule(jobs.leave_then_fail)

    with pytest.raises(ValueError, match="as intended"):
        job.execute()

    assert (job.status, job.attempt, job.failures) == (Status.WAITING, 1, 1)
    assert exceptions_of(job) == ["ValueError"]
    assert not Effect.objects.exists()


@pytest.mark.parametrize("trait", ["running", "successful", "failed", "cancelled"])
def test_execute_by_hand_refuses_what_is_not_to_be_run(trait: str) -> None:
    job = JobFactory(**{trait: True})
    before = Job.objects.values().get()

    with pytest.raises(NotExecutable):
        job.execute()

    assert Job.objects.values().get() == before
    assert not Effect.objects.exists()


def test_execute_by_hand_of_a_deleted_job_is_refused() -> None:
    job = JobFactory()
    Job.objects.all().delete()

    with pytest.raises(NotExecutable):
        job.execute()

    assert not Effect.objects.exists()


def test_execute_by_hand_that_is_interrupted_leaves_the_job_as_it_was() -> None:
    job = schedule(misbehaving.leave_then_interrupt)
    before = Job.objects.values().get()

    with pytest.raises(KeyboardInterrupt):
        job.execute()

    assert Job.objects.values().get() == before
    assert not Attempt.objects.exists()
    assert not Effect.objects.exists()


def test_execute_by_hand_of_a_job_that_exits_fails() -> None:
    job = schedule(jobs.leave_then_exit)

    with pytest.raises(SystemExit):
        job.execute()

    assert (job.status, job.failures) == (Status.WAITING, 1)
    assert exceptions_of(job) == ["SystemExit"]
    assert not Effect.objects.exists()


def test_execute_by_hand_of_a_job_that_takes_its_row_away_fails() -> None:
    job = schedule(misbehaving.cancel_own_row)

    with pytest.raises(ClaimLost):
        job.execute()

    assert (job.status, job.failures) == (Status.WAITING, 1)
    assert not Effect.objects.exists()


def test_execute_by_hand_inside_a_transaction_is_refused() -> None:
    job = schedule(jobs.leave)

    with transaction.atomic(), pytest.raises(InsideTransaction):
        job.execute()

    job.refresh_from_db()
    assert (job.status, job.attempt) == (Status.READY, 0)
    assert not Effect.objects.exists()


def test_execute_by_hand_without_autocommit_is_refused() -> None:
    job = schedule(jobs.leave)

    with (
        database_settings({}, AUTOCOMMIT=False),
        pytest.raises(InsideTransaction, match="AUTOCOMMIT"),
    ):
        job.execute()

    job.refresh_from_db()
    assert (job.status, job.attempt) == (Status.READY, 0)
    assert not Effect.objects.exists()


def test_transaction_without_autocommit_is_refused_though_it_was_on_before() -> None:
    with database_settings({}, AUTOCOMMIT=False):
        own = connection.copy()
        own.ensure_connection()
        own.set_autocommit(True)
        own.close_if_unusable_or_obsolete()  # as Django does between requests
        assert own.connection is None

        with pytest.raises(InsideTransaction, match="AUTOCOMMIT"):
            fence.transaction(own)
        own.close()


def test_execute_by_hand_inside_a_job_is_refused() -> None:
    inner = schedule(jobs.leave, run_after=timedelta(hours=1))
    outer = schedule(misbehaving.execute_another, [inner.pk])

    execute_next()

    inner.refresh_from_db()
    assert exceptions_of(outer) == ["InsideTransaction"]
    assert inner.status == Status.WAITING


def execute_job(request: Any, number: int) -> Any:
    return Job.objects.get(pk=number).execute()


def execute_job_freely(request: Any, number: int) -> HttpResponse:
    Job.objects.get(pk=number).execute()
    return HttpResponse("done")


urlpatterns = [
    path("atomic/<int:number>", execute_job),
    path("free/<int:number>", transaction.non_atomic_requests(execute_job_freely)),
]


@pytest.fixture
def _atomic_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)


@pytest.mark.urls(__name__)
@pytest.mark.usefixtures("_atomic_requests")
def test_execute_in_an_atomic_view_is_refused(client: Client) -> None:
    job = schedule(jobs.leave)

    with pytest.raises(InsideTransaction, match="non_atomic_requests"):
        client.get(f"/atomic/{job.pk}")

    job.refresh_from_db()
    assert job.status == Status.READY
    assert not Effect.objects.exists()


@pytest.mark.urls(__name__)
@pytest.mark.usefixtures("_atomic_requests")
def test_execute_in_a_view_that_is_not_atomic_works(client: Client) -> None:
    job = schedule(jobs.leave)

    assert client.get(f"/free/{job.pk}").content == b"done"

    job.refresh_from_db()
    assert job.status == Status.SUCCESSFUL
    assert Effect.objects.count() == 1


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """The thread that sent it, and the statement, for all new connections."""
    statements: list[tuple[str, str]] = []
    # What goes past Django's cursors.
    for name in ("conclude", "pairs", "rows"):
        monkeypatch.setattr(libpq, name, noted(statements, getattr(libpq, name)))

    def note(execute: Any, sql: str, *rest: Any) -> Any:
        statements.append((current_thread().name, sql))
        return execute(sql, *rest)

    def watch(*, connection: Any, **kwargs: Any) -> None:
        connection.execute_wrappers.append(note)

    connection_created.connect(watch)
    yield statements
    connection_created.disconnect(watch)


def noted(statements: list[tuple[str, str]], send: Any) -> Any:
    def note(connection: Any, sql: str, *rest: Any) -> Any:
        statements.append((current_thread().name, sql))
        return send(connection, sql, *rest)

    return note


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    # Many are claimed at once while jobs are short, which they are on any machine.
    monkeypatch.setattr(intake, "_AHEAD", 60.0)


def by_thread(sent: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Return what the threads of jobs have sent, and what the dispatcher has."""
    by_jobs = [sql for thread, sql in sent if re.fullmatch(r"async_queue-\d+", thread)]
    main = main_thread().name
    return by_jobs, [sql.lstrip() for thread, sql in sent if thread == main]


@claims_in_one_statement
@pytest.mark.usefixtures("_short")
def test_successful_job_costs_its_share_of_a_claim_and_one_update(
    sent: list[tuple[str, str]],
) -> None:
    schedule_many((jobs.leave,) for _ in range(100))

    flush(4)

    by_jobs, by_dispatcher = by_thread(sent)
    claims = [sql for sql in by_dispatcher if sql.startswith("WITH picked")]
    heads = [sql for sql in by_dispatcher if sql.startswith("WITH RECURSIVE heads")]
    updates = [sql for sql in by_jobs if sql.startswith("UPDATE async_queue_job SET")]
    inserts = [sql for sql in by_jobs if sql.startswith("INSERT")]
    assert (len(updates), len(inserts)) == (100, 100)
    # When it opens its session, a thread marks it as the worker's.
    assert len(by_jobs) - len(updates) - len(inserts) <= 4 * 2
    assert 0 < len(claims) < 50 > len(heads)
    # To look at the clock, and once for suspects.
    assert len(by_dispatcher) - len(claims) - len(heads) <= 5


@claims_in_one_statement
@pytest.mark.usefixtures("_short")
def test_job_that_writes_nothing_costs_its_share_of_an_update(
    sent: list[tuple[str, str]],
) -> None:
    schedule_many((jobs.add, [1, number]) for number in range(100))

    flush(4)

    by_jobs, _ = by_thread(sent)
    updates = [sql for sql in by_jobs if sql.startswith("WITH run")]
    assert 0 < len(updates) <= 100
    assert len(by_jobs) - len(updates) <= 4 * 2
    results = Job.objects.order_by("pk").values_list("result", flat=True)
    assert list(results) == [str(1 + number) for number in range(100)]
