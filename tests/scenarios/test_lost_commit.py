"""The connection breaks at COMMIT, and the client cannot know whether it happened."""

from collections.abc import Iterator

import pytest
from django.db import OperationalError, connection

from async_queue import executor, hooks, schedule
from async_queue.models import Job, Status
from tests import misbehaving
from tests.jobs import leave, leave_then_fail
from tests.models import Effect
from tests.proxy import Proxy, proxy
from tests.stepping import (
    claim_next,
    database_settings,
    exceptions_of,
    execute_next,
    flush,
    make_due,
)

SETTINGS = connection.settings_dict

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(
        not SETTINGS.get("HOST"), reason="there is no connection that could break"
    ),
]
# The proxy has to read what it passes on.
PLAIN = {"postgresql": {"sslmode": "disable"}, "mysql": {"ssl_mode": "DISABLED"}}


@pytest.fixture
def wire() -> Iterator[Proxy]:
    with proxy(SETTINGS["HOST"], int(SETTINGS["PORT"])) as made:
        plain = PLAIN[connection.vendor]
        with database_settings(plain, HOST="127.0.0.1", PORT=str(made.port)):
            yield made


@pytest.fixture(params=["before_fence", "after_fence"])
def point(request: pytest.FixtureRequest) -> str:
    """Where it is cut: PostgreSQL is sent both in one message if nobody is between."""
    return str(request.param)


def test_commit_that_never_arrived_is_made_again(wire: Proxy, point: str) -> None:
    job = schedule(leave)

    with hooks.at(point, lambda: setattr(wire, "cut", "before")):
        outcome = execute_next()

    job.refresh_from_db()
    # It is cut each time, so that the job is put off in the end.
    assert wire.cuts > 1
    assert outcome.action == "snooze"
    assert (job.status, job.failures) == (Status.WAITING, 0)
    assert not Effect.objects.exists()
    make_due(job)
    assert flush().outcomes == {"succeed": 1}
    assert Effect.objects.count() == 1


def test_commit_whose_answer_was_lost_is_found_and_not_repeated(
    wire: Proxy, point: str
) -> None:
    job = schedule(leave)

    with hooks.at(point, lambda: setattr(wire, "cut", "after")):
        outcome = execute_next()

    job.refresh_from_db()
    assert wire.cuts == 1
    assert outcome.action == "succeed"
    assert (job.status, job.attempt, job.failures) == (Status.SUCCESSFUL, 1, 0)
    assert exceptions_of(job) == []
    assert flush().outcomes == {}
    assert Effect.objects.count() == 1


@pytest.mark.parametrize("how", ["before", "after"])
def test_pool_survives_a_connection_cut_at_commit(
    wire: Proxy, how: str, point: str
) -> None:
    jobs = [schedule(leave) for _ in range(20)]

    def cut_once() -> None:
        if not wire.cuts:
            wire.cut = how

    with hooks.at(point, cut_once):
        flush()
    for job in jobs:
        make_due(job)
    flush()

    assert wire.cuts >= 1
    assert Job.objects.filter(status=Status.SUCCESSFUL).count() == 20
    assert Effect.objects.count() == 20


@pytest.mark.parametrize("how", ["before", "after"])
def test_lost_answer_to_the_record_of_a_failure_changes_nothing(
    wire: Proxy, how: str
) -> None:
    job = schedule(leave_then_fail)
    running = claim_next()

    wire.cut = how
    executor.execute(running)

    assert wire.cuts == 1
    job.refresh_from_db()
    assert job.status == Status.WAITING
    assert job.failures == 1
    assert exceptions_of(job) == ["ValueError"]


@pytest.mark.parametrize(
    ("how", "status", "effects"),
    [("before", Status.READY, 0), ("after", Status.SUCCESSFUL, 1)],
)
def test_execute_by_hand_raises_and_leaves_the_truth(
    wire: Proxy, how: str, status: Status, effects: int, point: str
) -> None:
    job = schedule(leave)

    with (
        hooks.at(point, lambda: setattr(wire, "cut", how)),
        pytest.raises(OperationalError),
    ):
        job.execute()

    assert job.status == status
    assert Effect.objects.count() == effects


@pytest.mark.parametrize("how", ["before", "after"])
def test_hooks_run_at_most_once_when_the_answer_is_lost(
    wire: Proxy, how: str, point: str
) -> None:
    misbehaving.called.clear()
    schedule(misbehaving.register_hooks)

    with hooks.at(point, lambda: setattr(wire, "cut", how)):
        execute_next()

    assert misbehaving.called == []
