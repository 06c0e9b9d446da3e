"""Jobs that write nothing are recorded together, and each of them on its own merits."""

from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar, copy_context
from functools import partial
from threading import Event
from typing import Any

import pytest
from django.db import connection, transaction

from async_queue import claims, current_job, executor, hooks, schedule_many
from async_queue import recorder as recorder_module
from async_queue.context import RunningJob
from async_queue.db import vendor
from async_queue.executor import Unrecorded
from async_queue.models import Job, Status
from async_queue.outcomes import Finished
from async_queue.recorder import Recorder
from async_queue.signals import job_finished
from tests import jobs, misbehaving
from tests.factories import WorkerFactory
from tests.fleet import uncommitted
from tests.models import Effect
from tests.stepping import elsewhere

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(
        not vendor(connection).begins_late,
        reason="here a transaction without a statement costs as much as another",
    ),
]

WaitUntil = Callable[..., None]
trace: ContextVar[str] = ContextVar("trace", default="nobody's")


class Ends(list[Finished]):
    """What a recorder has told of, by the jobs' ids."""

    def actions(self) -> dict[int, str]:
        return {finished.job.id: finished.outcome.action for finished in self}


@pytest.fixture
def ends() -> Ends:
    return Ends()


@pytest.fixture
def recorder(ends: Ends) -> Recorder:
    return Recorder("default", 4, ends.append)


def claimed(count: int, function: object = jobs.add) -> list[RunningJob]:
    schedule_many((function, [1, number]) for number in range(count))
    return claims.claim("default", WorkerFactory().pk, count)


def unrecorded(job: RunningJob) -> Unrecorded:
    run = executor.run(job)
    assert isinstance(run, Unrecorded)
    return run


def test_one_that_waits_for_nobody_is_recorded_at_once(
    recorder: Recorder, ends: Ends
) -> None:
    (job,) = claimed(1)

    recorder.put(unrecorded(job))

    row = Job.objects.get()
    assert (row.status, row.return_value, row.attempt) == (Status.SUCCESSFUL, 1, 1)
    assert row.worker_id is None
    assert row.started_at <= row.finished_at
    assert ends.actions() == {job.id: "succeed"}


def test_all_that_come_while_somebody_writes_are_one_statement(
    recorder: Recorder, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    record_many = executor.record_many
    monkeypatch.setattr(
        executor,
        "record_many",
        lambda own, runs: sizes.append(len(runs)) or record_many(own, runs),
    )
    first, *others = claimed(6)
    others_are_put = [partial(recorder.put, unrecorded(job)) for job in others]
    run = unrecorded(first)

    def put_others() -> None:
        while others_are_put:
            others_are_put.pop()()

    with hooks.at("before_fence", put_others):
        recorder.put(run)

    assert sizes == [1, 5]
    assert set(ends.actions().values()) == {"succeed"}
    assert Job.objects.filter(status=Status.SUCCESSFUL).count() == 6


def test_row_that_somebody_has_locked_keeps_no_other_waiting(
    recorder: Recorder, ends: Ends, wait_until: WaitUntil
) -> None:
    locked, other = claimed(2)
    row = Job.objects.filter(pk=locked.id)

    with uncommitted(lambda: row.update(queue="elsewhere")):
        puts = [
            elsewhere(recorder.put, unrecorded(locked)),
            elsewhere(recorder.put, unrecorded(other)),
        ]
        wait_until(ends.actions)
        assert ends.actions() == {other.id: "succeed"}

    for put in puts:
        put.result(20)
    assert ends.actions()[locked.id] == "succeed"


def test_what_comes_while_a_locked_row_is_waited_for_is_not_left_behind(
    recorder: Recorder, ends: Ends, wait_until: WaitUntil
) -> None:
    locked, *others = claimed(4)
    run, *come = [unrecorded(job) for job in (locked, *others)]
    row = Job.objects.filter(pk=locked.id)

    def let_one_come() -> None:
        if come:
            recorder._open.append(come.pop())

    with (
        uncommitted(lambda: row.update(queue="elsewhere")),
        hooks.at("before_fence", let_one_come),
    ):
        put = elsewhere(recorder.put, run)
        wait_until(lambda: not come)

    put.result(20)
    assert ends.actions() == {job.id: "succeed" for job in (locked, *others)}


def test_claim_that_was_lost_meanwhile_is_no_success(
    recorder: Recorder, ends: Ends
) -> None:
    lost, held = claimed(2)
    runs = [unrecorded(lost), unrecorded(held)]
    Job.objects.filter(pk=lost.id).transition("cancel")

    for run in runs:
        recorder.put(run)

    assert ends.actions() == {lost.id: "lose", held.id: "succeed"}
    assert Job.objects.get(pk=lost.id).status == Status.CANCELLED


def test_attempt_that_is_not_the_latest_is_no_success(
    recorder: Recorder, ends: Ends
) -> None:
    (job,) = claimed(1)
    run = unrecorded(job)
    Job.objects.filter(pk=job.id).update(attempt=2)

    recorder.put(run)

    assert ends.actions() == {job.id: "lose"}
    assert Job.objects.get().status == Status.RUNNING


def test_session_that_ends_at_the_fence_loses_no_outcome(
    recorder: Recorder, ends: Ends
) -> None:
    (job,) = claimed(1)
    run = unrecorded(job)
    misbehaving.called.clear()

    def end_once() -> None:
        if not misbehaving.called:
            misbehaving.called.append("ended")
            misbehaving.end_own_session()

    with hooks.at("before_fence", end_once):
        recorder.put(run)

    assert ends.actions() == {job.id: "succeed"}
    assert Job.objects.get().status == Status.SUCCESSFUL


def test_end_is_announced_once_it_is_recorded(recorder: Recorder) -> None:
    statuses = []

    def note(job: RunningJob, **kwargs: object) -> None:
        statuses.append(Job.objects.get(pk=job.id).status)

    (job,) = claimed(1)
    job_finished.connect(note)
    try:
        recorder.put(unrecorded(job))
    finally:
        job_finished.disconnect(note)

    assert statuses == [Status.SUCCESSFUL]


@pytest.fixture
def receiver() -> Iterator[Callable[[Callable[..., None]], None]]:
    """Connects a receiver of ends until the test is over."""
    connected = []

    def connect(function: Callable[..., None]) -> None:
        job_finished.connect(function)
        connected.append(function)

    yield connect
    for function in connected:
        job_finished.disconnect(function)


def test_receiver_that_ends_its_thread_strands_no_other_job(
    recorder: Recorder, ends: Ends, receiver: Any
) -> None:
    def leave(**kwargs: object) -> None:
        raise SystemExit

    runs = [unrecorded(job) for job in claimed(3)]
    receiver(leave)

    first, *others = runs
    recorder._open.extend(others)
    recorder.put(first)

    assert set(ends.actions().values()) == {"succeed"}
    assert Job.objects.filter(status=Status.SUCCESSFUL).count() == len(ends) == 3


def test_receiver_that_hangs_keeps_nobody_from_recording(
    ends: Ends, receiver: Any
) -> None:
    is_there, may_go_on = Event(), Event()

    def hang(job: RunningJob, **kwargs: object) -> None:
        if job.id == slow.id:
            is_there.set()
            assert may_go_on.wait(20)

    slow, *others = claimed(9)
    receiver(hang)
    recorder = Recorder("default", 1, ends.append)
    hanging = elsewhere(recorder.put, unrecorded(slow))
    assert is_there.wait(20)

    for job in others:
        recorder.put(unrecorded(job))

    assert ends.actions() == {job.id: "succeed" for job in others}
    may_go_on.set()
    hanging.result(20)
    assert len(ends) == 9


@pytest.mark.parametrize(("seconds", "wait"), [(60.0, 16), (0.0, 4)])
def test_who_hangs_while_recording_keeps_few_and_nobody_for_long(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, seconds: float, wait: int
) -> None:
    monkeypatch.setattr(recorder_module, "_PATIENCE", 0.05)
    monkeypatch.setattr(recorder_module, "_COMMIT", seconds)
    is_there, may_go_on = Event(), Event()

    def hang() -> None:
        if not is_there.is_set():
            is_there.set()
            assert may_go_on.wait(20)

    slow, *others = claimed(20)
    recorder = Recorder("default", 1, ends.append)
    with hooks.at("before_fence", hang):
        hanging = elsewhere(recorder.put, unrecorded(slow))
        assert is_there.wait(20)
        for job in others:
            recorder.put(unrecorded(job))
        assert len(ends) == 20 - wait
        may_go_on.set()
        hanging.result(20)

    assert set(ends.actions().values()) == {"succeed"}
    assert len(ends) == 20


def test_run_that_is_taken_away_meanwhile_keeps_nobody_from_recording(
    recorder: Recorder, ends: Ends
) -> None:
    class Shrinking(deque[Unrecorded]):
        """One that has gone by the time that it would be taken."""

        def __len__(self) -> int:
            return super().__len__() + bool(super().__len__())

    recorder._open = Shrinking()
    first, second = claimed(2)

    recorder.put(unrecorded(first))
    recorder.put(unrecorded(second))

    assert ends.actions() == {first.id: "succeed", second.id: "succeed"}


def test_end_is_told_of_in_the_context_of_its_job(
    recorder: Recorder, receiver: Any
) -> None:
    told = {}
    receiver(lambda job, **kwargs: told.update({job.id: (trace.get(), current_job())}))
    first, second = claimed(2)

    def run_second() -> None:
        trace.set("second")
        recorder._open.append(unrecorded(second))

    trace.set("first")
    copy_context().run(run_second)
    recorder.put(unrecorded(first))

    assert told == {first.id: ("first", None), second.id: ("second", None)}


def test_run_that_was_ended_from_outside_is_not_recorded() -> None:
    (job,) = claimed(1)

    with hooks.at("after_call", lambda: setattr(job.control, "is_ended", True)):
        outcome = executor.run(job)

    assert outcome.action == "lose"
    assert Job.objects.get().status == Status.RUNNING


def with_hook(a: int, b: int) -> None:
    transaction.on_commit(Effect(label="hook").save)


def with_query(a: int, b: int) -> int:
    return Effect.objects.count()


def through_the_driver(a: int, b: int) -> None:
    connection.connection.execute("INSERT INTO tests_effect (label) VALUES ('raw')")


@pytest.mark.parametrize("function", [with_hook, with_query, through_the_driver])
def test_job_with_anything_to_commit_is_recorded_with_it(function: object) -> None:
    (job,) = claimed(1, function)

    outcome = executor.run(job)

    assert not isinstance(outcome, Unrecorded)
    assert outcome.action == "succeed"
    assert Job.objects.get().status == Status.SUCCESSFUL
